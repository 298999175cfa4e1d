"""The memory planner: divides the device's memory before anything is loaded.

The device holds the dense weights, the expert slots, the KV cache and a workspace; if its memory is the host's, the
staging buffers too. Slots get what the others leave. Every token needs the dense weights and only some need an expert,
so dense weights come first, and experts do with what is left, down to two slots for the whole model (scope.py). If the
dense weights do not fit beside those, the last decoder layers are kept outside the device and streamed through one
shared buffer, one layer at a time. Every refusal names the smallest budget that works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from offmoe.budget.memory_plan import MemoryPlan
from offmoe.budget.needs import ModelBytes
from offmoe.budget.scope import choose_scope
from offmoe.config import MIN_SLOTS, OffloadConfig
from offmoe.errors import CapacityError
from offmoe.policy.planner import SCRATCH_SLOTS
from offmoe.text import format_size, size_option
from offmoe.types import DISK, HOST, CacheShape

MIN_CONTEXT = 256
"""Tokens. A KV cache for fewer would make a model useless, so no plan goes below unless max_context says so."""
KV_SHARE = 0.25
"""If max_context is not set: the most that the KV cache takes of the memory left by everything else but slots."""
SCARCE_KV_SHARE, SCARCE_CONTEXT = 1 / 16, 2048
"""If max_context is not set and not every layer can have top_k slots: the KV cache takes this share of the memory left
by everything else but slots, up to so many tokens, and what is less than a slot."""
KV_SEQUENCES = 8
"""If max_context is not set: the most sequences of full length that the KV cache holds, for a batch or beams."""
BYPASS_SHARE = 1 / 6
"""Share of all experts up to which a pool is better off with two slots fewer and two scratch slots, through which
on_miss="auto" passes what is not worth a slot. Of gpt-oss-20b's demands 10 slots hit 4.3 % and 8 beside scratch 6.1 %;
34 and 32: 19.6 and 20.5 %; 130 and 128: 53.8 and 53.9 %; 162 and 160 of 768: 61.7 and 61.6 %.
"""


def plan_on_miss(
    config: OffloadConfig,
    shape: CacheShape,
    model: ModelBytes,
    *,
    free: int,
    auto: int | None = None,
    host_free: int = 0,
) -> tuple[str, MemoryPlan]:
    """(resolved on_miss, `plan_memory`) where the device computes every expert, also those that get no slot.

    These pass through scratch slots on the device. "auto" becomes "fetch" where they do not pay: in a large pool
    (`BYPASS_SHARE`), where every expert has a slot, and with a quota of slots per layer, where decoding with "auto"
    took 0.98 to 1.01 of the time of "fetch" in six set-ups (tools/bench/on_miss.py). Arguments as `plan_memory`.
    """

    def plan(config: OffloadConfig, num_scratch: int) -> MemoryPlan:
        scratch = num_scratch * max(model.slot_bytes)
        return plan_memory(config, shape, model, free=free, auto=auto, host_free=host_free, scratch=scratch)

    if config.on_miss == "cpu":
        with_scratch = plan(config, SCRATCH_SLOTS)
        return "cpu", (plan(config, 0) if with_scratch.slots_per_layer == shape.experts else with_scratch)
    without = plan(config, 0)
    if config.on_miss == "fetch" or without.scope == "layer" or without.slots_per_layer == shape.experts:
        return "fetch", without
    try:
        with_scratch = plan(replace(config, scope="model"), SCRATCH_SLOTS)
    except CapacityError:
        return "fetch", without
    pays = sum(with_scratch.slots_per_layer) <= BYPASS_SHARE * shape.num_keys
    if config.slots_per_layer is None and (not pays or with_scratch.offloaded_layers > without.offloaded_layers):
        return "fetch", without
    return "auto", replace(
        with_scratch, reason=without.reason, smallest=without.smallest, smallest_dense=without.smallest_dense
    )


def plan_memory(
    config: OffloadConfig,
    shape: CacheShape,
    model: ModelBytes,
    *,
    free: int,
    auto: int | None = None,
    host_free: int = 0,
    scratch: int = 0,
) -> MemoryPlan:
    """Divide the device's memory.

    Args:
        config: the options.
        shape: experts and top_k of each MoE layer.
        model: what the model needs.
        free: bytes of the device's memory that are free.
        auto: those that device_memory="auto" takes; None: all of them.
        host_free: bytes of RAM that offloaded dense layers may take; if they do not fit there, they stay on the disk.
        scratch: bytes of scratch slots.

    Raises:
        CapacityError: the model does not fit; the message names the smallest budget that works.
    """
    if config.device_memory == "auto":
        budget = free if auto is None else auto
    else:
        budget = min(int(config.device_memory), free)
    division = _Division(config, shape, model, budget, free, host_free, scratch)
    if config.scope != "auto":
        return division.plan(config.scope)
    if config.slots_per_layer is not None:
        return division.plan(config.cache().scope)
    pool = division.plan("model")
    try:
        layers = division.plan("layer", least=_top_k(shape))
    except CapacityError:
        layers = None
    chosen, reason = choose_scope(config, shape, pool, layers)
    return replace(chosen, smallest=pool.smallest, smallest_dense=pool.smallest_dense, reason=reason)


@dataclass(frozen=True)
class _Division:
    """A budget to divide; as the arguments of `plan_memory`."""

    config: OffloadConfig
    shape: CacheShape
    model: ModelBytes
    budget: int
    free: int
    host_free: int
    scratch: int

    def plan(self, scope: str, least: tuple[int, ...] | None = None) -> MemoryPlan:
        """The division with slots shared as `scope` says.

        least: the fewest slots of each layer; None: one, or MIN_SLOTS in one pool.

        Raises:
            CapacityError: the model does not fit; the message names the smallest budget that works.
        """
        config, shape, model, budget = self.config, self.shape, self.model, self.budget
        slot_bytes = model.slot_bytes
        if scope == "model":  # one pool for all layers, whose slots hold the largest expert
            slot_bytes = (max(slot_bytes),) * shape.layers
        if least is None:
            least = shape.spread(MIN_SLOTS) if scope == "model" else (1,) * shape.layers
        explicit = None if config.slots_per_layer is None else replace(config, scope=scope).cache().quotas(shape)
        min_slots = _bytes(explicit or least, slot_bytes)
        fixed = model.staging + model.workspace + self.scratch
        min_kv = model.kv_per_token * _min_context(config, model)
        smallest = max(model.loading, model.min_dense + fixed + min_kv + _bytes(least, slot_bytes))
        num_offloaded = model.num_offloaded(budget - fixed - min_kv - min_slots)
        if num_offloaded is None or budget < model.loading:
            needed = max(model.loading, model.min_dense + fixed + min_kv + min_slots)
            raise self._too_small(needed, least, smallest)
        resident, in_flight = model.dense_with(num_offloaded)
        room = budget - resident - in_flight - fixed  # for slots and KV cache
        context = _context(config, model, room - min_slots, room - _bytes(_top_k(shape), slot_bytes))
        slots = explicit or _spread(room - model.kv_per_token * context, shape, slot_bytes, least)
        if scope == "model" and explicit is None and config.max_context is None:  # what is less than a slot
            context = _longer(context, model, room - _bytes(slots, slot_bytes))
        offloaded = model.dense - resident
        return MemoryPlan(
            budget=budget,
            dense=resident,
            slots=_bytes(slots, slot_bytes),
            kv=model.kv_per_token * context,
            staging=model.staging,
            workspace=model.workspace,
            scratch=self.scratch,
            smallest=smallest,
            max_context=context,
            slots_per_layer=slots,
            smallest_dense=smallest - model.min_dense + model.dense,
            in_flight=in_flight,
            offloaded=offloaded,
            offloaded_layers=num_offloaded,
            offloaded_in=None if not num_offloaded else HOST if offloaded <= self.host_free else DISK,
            scope=scope,
        )

    def _too_small(self, needed: int, least: tuple[int, ...], smallest: int) -> CapacityError:
        """Why the model does not fit, and what would. least: the slots that the smallest budget holds."""
        slots, budget = self.config.slots_per_layer, self.budget
        name = "device_memory" if budget == self.config.device_memory else "what is free"
        asked = ""
        if slots is not None:
            asked = f" for slots_per_layer={slots}, which needs {needed} bytes ({format_size(needed)})"
        remedy = f": --device-memory {size_option(smallest)}"
        if smallest > self.free:  # the option cannot take what is not free
            remedy = f"; {format_size(smallest - self.free)} more must be free for it"
        return CapacityError(
            f"{name}, {format_size(budget)}, is too small{asked}. The smallest device_memory that works for this model "
            f"is {smallest} bytes ({format_size(smallest)}), with {sum(least)} expert slots in all{remedy}."
        )


def _top_k(shape: CacheShape) -> tuple[int, ...]:
    """top_k slots in each layer, or as many as it has experts."""
    return tuple(map(min, shape.top_k, shape.experts))


def _min_context(config: OffloadConfig, model: ModelBytes) -> int:
    """Tokens that the KV cache holds at least."""
    return config.max_context or min(model.context_limit, MIN_CONTEXT)


def _context(config: OffloadConfig, model: ModelBytes, spare: int, beyond_top_k: int) -> int:
    """Tokens that the KV cache holds.

    Args:
        spare: bytes that the smallest number of slots leaves for it.
        beyond_top_k: bytes that top_k slots in every layer leave; may be negative.
    """
    if config.max_context is not None:
        return config.max_context
    most = KV_SEQUENCES * model.context_limit
    if model.kv_per_token == 0:
        return most
    if config.slots_per_layer is None:  # more slots are worth more than more context
        few = min(int(spare * SCARCE_KV_SHARE), model.kv_per_token * SCARCE_CONTEXT)
        spare = max(int(beyond_top_k * KV_SHARE), few, model.kv_per_token * _min_context(config, model))
    return min(most, spare // model.kv_per_token)


def _longer(context: int, model: ModelBytes, room: int) -> int:
    """Tokens that fit into `room` bytes, where that is more than `context`."""
    if model.kv_per_token == 0:
        return context
    return max(context, min(KV_SEQUENCES * model.context_limit, room // model.kv_per_token))


def _spread(room: int, shape: CacheShape, slot_bytes: Sequence[int], least: Sequence[int]) -> tuple[int, ...]:
    """Slots of each layer in `room` bytes: equal quotas, at least `least`; the remainder goes to the first layers."""
    quotas = list(least)
    room -= _bytes(quotas, slot_bytes)
    while growing := [layer for layer, experts in enumerate(shape.experts) if quotas[layer] < experts]:
        lowest = min(quotas[layer] for layer in growing)
        for layer in growing:
            if quotas[layer] == lowest:
                if slot_bytes[layer] > room:
                    return tuple(quotas)
                quotas[layer] += 1
                room -= slot_bytes[layer]
    return tuple(quotas)


def _bytes(quotas: Sequence[int], slot_bytes: Sequence[int]) -> int:
    """Bytes of `quotas` slots per layer."""
    return sum(n * size for n, size in zip(quotas, slot_bytes, strict=True))
