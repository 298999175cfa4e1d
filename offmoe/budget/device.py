"""The memory planner: divides the device's memory before anything is loaded.

The device holds the dense weights, the expert slots, the KV cache and a workspace; if its memory is the host's, the
staging buffers too. Slots get what the others leave. Every token needs the dense weights and only some need an expert,
so dense weights come first. If they do not fit, the last decoder layers are kept outside the device and streamed
through one shared buffer, one layer at a time. Every refusal names the smallest budget that works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from offmoe.budget.host import HostPlan
from offmoe.budget.needs import ModelBytes
from offmoe.config import OffloadConfig
from offmoe.errors import CapacityError
from offmoe.policy.planner import SCRATCH_SLOTS
from offmoe.text import format_size
from offmoe.types import DISK, HOST, CacheShape

MIN_CONTEXT = 256
"""Tokens. A KV cache for fewer would make a model useless, so no plan goes below unless max_context says so."""
KV_SHARE = 0.25
"""If max_context is not set: the most that the KV cache takes of the memory left by everything else but slots."""
KV_SEQUENCES = 8
"""If max_context is not set: the most sequences of full length that the KV cache holds, for a batch or beams."""
SLOTS_PER_SCRATCH = 128
"""on_miss="auto" needs this many slots per scratch slot to pay. Choosing who gets a slot saves 1 to 4 % of the misses;
two slots fewer in a hundred cost as much.
"""


@dataclass(frozen=True)
class MemoryPlan:
    """The division of the device's memory. All figures are bytes unless they say otherwise.

    Args:
        budget: the most that all parts may take.
        dense: dense weights that stay on the device.
        slots: all expert slots.
        kv: the KV cache.
        staging: staging buffers; 0 if they are not on the device.
        workspace: activations, logits and temporary bytes of one expert.
        smallest: the smallest budget that works.
        max_context: tokens that the KV cache holds, over all sequences.
        slots_per_layer: number of slots of each MoE layer.
        smallest_dense: the smallest budget that works with all dense weights on the device.
        in_flight: the buffers that offloaded dense layers are streamed through.
        offloaded: dense weights that are kept outside the device.
        offloaded_layers: number of decoder layers, the last ones, that these belong to.
        offloaded_in: where they are kept, HOST or DISK; None if there are none.
        scratch: slots for experts that compute without becoming resident.
        host: the plan of RAM; None on a device whose memory is the host's.
    """

    budget: int
    dense: int
    slots: int
    kv: int
    staging: int
    workspace: int
    smallest: int
    max_context: int
    slots_per_layer: tuple[int, ...]
    smallest_dense: int = 0
    in_flight: int = 0
    offloaded: int = 0
    offloaded_layers: int = 0
    offloaded_in: str | None = None
    scratch: int = 0
    host: HostPlan | None = None

    @property
    def used(self) -> int:
        """Bytes of all parts together."""
        return self.dense + self.in_flight + self.slots + self.scratch + self.kv + self.staging + self.workspace

    def to_dict(self) -> dict[str, Any]:
        """The plan for JSON, whose keys say "parked" for offloaded."""
        values = {name.replace("offloaded", "parked"): value for name, value in asdict(self).items()}
        return {**values, "slots_per_layer": list(self.slots_per_layer), "used": self.used}

    def describe(self) -> str:
        """The plan in one line."""
        parts = [("dense", self.dense), ("expert slots", self.slots), (f"KV of {self.max_context} tokens", self.kv)]
        parts += [("scratch", self.scratch), ("staging", self.staging), ("workspace", self.workspace)]
        parts[1:1] = [("a dense layer in flight", self.in_flight)]
        text = ", ".join(f"{name} {format_size(size)}" for name, size in parts if size)
        if self.offloaded_layers:
            text += f"; dense weights of {self.offloaded_layers} layers, {format_size(self.offloaded)}, come from "
            text += f"{self.offloaded_in} in every pass"
        if self.host is not None:
            text += f"; {self.host.describe()}"
        return f"{format_size(self.used)} of {format_size(self.budget)}: {text}"


def plan_on_miss(
    config: OffloadConfig, shape: CacheShape, model: ModelBytes, *, free: int, share: float
) -> tuple[str, MemoryPlan]:
    """(resolved on_miss, `plan_memory`) for a device whose memory is the host's.

    "auto" becomes "fetch" where choosing who gets a slot does not pay: in a small pool (`SLOTS_PER_SCRATCH`), where
    every expert has a slot, and with a quota of slots per layer, where decoding with "auto" took 0.98 to 1.01 of the
    time of "fetch" in six set-ups (tools/bench/on_miss.py). Any other on_miss takes scratch slots.
    """

    def plan(scratch: int) -> MemoryPlan:
        return plan_memory(config, shape, model, free=free, share=share, scratch=scratch * max(model.slot_bytes))

    if config.on_miss == "fetch" or (config.on_miss == "auto" and config.scope == "layer"):
        return "fetch", plan(0)
    try:
        with_scratch = plan(SCRATCH_SLOTS)
    except CapacityError:
        if config.on_miss == "cpu":
            raise
        return "fetch", plan(0)
    if with_scratch.slots_per_layer == shape.experts:
        return ("cpu" if config.on_miss == "cpu" else "fetch"), plan(0)
    enough = config.slots_per_layer is not None or (
        sum(with_scratch.slots_per_layer) >= SLOTS_PER_SCRATCH * SCRATCH_SLOTS
    )
    return (config.on_miss, with_scratch) if config.on_miss == "cpu" or enough else ("fetch", plan(0))


def plan_memory(
    config: OffloadConfig,
    shape: CacheShape,
    model: ModelBytes,
    *,
    free: int,
    share: float = 1.0,
    host_free: int = 0,
    scratch: int = 0,
) -> MemoryPlan:
    """Divide the device's memory.

    Args:
        config: the options.
        shape: experts and top_k of each MoE layer.
        model: what the model needs.
        free: bytes of the device's memory that are free.
        share: the share of these that device_memory="auto" takes.
        host_free: bytes of RAM that offloaded dense layers may take; if they do not fit there, they stay on the disk.
        scratch: bytes of scratch slots.

    Raises:
        CapacityError: the model does not fit; the message names the smallest budget that works.
    """
    budget = int(free * share) if config.device_memory == "auto" else min(int(config.device_memory), free)
    if config.scope == "model":  # one pool for all layers, whose slots hold the largest expert
        model = replace(model, slot_bytes=(max(model.slot_bytes),) * shape.layers)
    least = tuple(min(k, e) for k, e in zip(shape.top_k, shape.experts, strict=True))
    explicit = None if config.slots_per_layer is None else config.cache().quotas(shape)
    min_slots = _bytes(explicit or least, model.slot_bytes)
    fixed = model.staging + model.workspace + scratch
    min_kv = model.kv_per_token * _min_context(config, model)
    smallest = model.min_dense + fixed + min_kv + _bytes(least, model.slot_bytes)
    num_offloaded = model.num_offloaded(budget - fixed - min_kv - min_slots)
    if num_offloaded is None:
        raise _too_small(model.min_dense + fixed + min_kv + min_slots, budget, config, shape, smallest)
    resident, in_flight = model.dense_with(num_offloaded)
    room = budget - resident - in_flight - fixed  # for slots and KV cache
    context = _context(config, model, room - min_slots)
    kv = model.kv_per_token * context
    slots = explicit or _spread(room - kv, shape, model.slot_bytes, least)
    offloaded = model.dense - resident
    return MemoryPlan(
        budget=budget,
        dense=resident,
        slots=_bytes(slots, model.slot_bytes),
        kv=kv,
        staging=model.staging,
        workspace=model.workspace,
        scratch=scratch,
        smallest=smallest,
        max_context=context,
        slots_per_layer=slots,
        smallest_dense=smallest - model.min_dense + model.dense,
        in_flight=in_flight,
        offloaded=offloaded,
        offloaded_layers=num_offloaded,
        offloaded_in=None if not num_offloaded else HOST if offloaded <= host_free else DISK,
    )


def _min_context(config: OffloadConfig, model: ModelBytes) -> int:
    """Tokens that the KV cache holds at least."""
    return config.max_context or min(model.context_limit, MIN_CONTEXT)


def _context(config: OffloadConfig, model: ModelBytes, spare: int) -> int:
    """Tokens that the KV cache holds. spare: bytes that the smallest number of slots leaves for it."""
    if config.max_context is not None:
        return config.max_context
    most = KV_SEQUENCES * model.context_limit
    if model.kv_per_token == 0:
        return most
    if config.slots_per_layer is None:  # more slots are worth more than more context
        spare = max(int(spare * KV_SHARE), model.kv_per_token * _min_context(config, model))
    return min(most, spare // model.kv_per_token)


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


def _too_small(needed: int, budget: int, config: OffloadConfig, shape: CacheShape, smallest: int) -> CapacityError:
    name = "device_memory" if budget == config.device_memory else "what is free"
    asked = ""
    if config.slots_per_layer is not None:
        asked = f" for slots_per_layer={config.slots_per_layer}, which needs {needed} bytes ({format_size(needed)})"
    return CapacityError(
        f"{name}, {format_size(budget)}, is too small{asked}. The smallest device_memory that works for this model is "
        f"{smallest} bytes ({format_size(smallest)}), with top_k={max(shape.top_k)} slots per layer."
    )
