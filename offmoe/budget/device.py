"""What goes where before anything is loaded: one budget, divided once, with the numbers that divided it.

What moves: nothing. On the device stand the dense weights, the expert slots, the KV cache and a workspace; on a CPU
also the staging buffers. Slots take what the others leave. Dense weights are needed by every token, an expert only by
some, so as many decoder layers as fit keep theirs on the device; the last ones give them up where nothing else helps,
and then share one piece of memory, to which their weights come when their turn is. Must never promise what does not
fit: the smallest budget that works is part of every refusal."""

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
"""Tokens of KV cache without which a model is not usable."""
KV_SHARE = 0.25
"""Most of what is not needed otherwise that an unstated max_context may take; the slots get the rest."""
KV_SEQUENCES = 8
"""Full-length sequences that an unstated max_context makes room for at most: a batch, or beams."""


SLOTS_PER_SCRATCH = 128
"""Slots beside which a scratch slot is worth its memory to on_miss="auto": choosing who gets a slot saves 1 to 4 % of
the misses, and two slots less in a hundred lose as much."""

"""Where dense layers are that are not on the device."""


@dataclass(frozen=True)
class MemoryPlan:
    """The division of the device's memory, bytes; `budget` is the cap that the parts add up to at most.

    dense: what is always on the device. offloaded_layers: how many decoder layers, the last ones, keep their dense
    weights (`offloaded` bytes) in `offloaded_in` and stream them to the device one layer at a time (`in_flight`).
    smallest: the least budget that works at all; smallest_dense: with the whole dense part on the device.
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
    """For experts that are computed without a slot."""
    host: HostPlan | None = None
    """RAM that experts are kept in beside the device; None where RAM is the device."""

    @property
    def used(self) -> int:
        return self.dense + self.in_flight + self.slots + self.scratch + self.kv + self.staging + self.workspace

    @property
    def parked(self) -> int:
        """`offloaded`, under the name that it had first."""
        return self.offloaded

    @property
    def parked_layers(self) -> int:
        """`offloaded_layers`, under the name that it had first."""
        return self.offloaded_layers

    @property
    def parked_in(self) -> str | None:
        """`offloaded_in`, under the name that it had first."""
        return self.offloaded_in

    def to_dict(self) -> dict[str, Any]:
        """The plan for JSON, whose keys say "parked" for offloaded."""
        values = {name.replace("offloaded", "parked"): value for name, value in asdict(self).items()}
        return {**values, "slots_per_layer": list(self.slots_per_layer), "used": self.used}

    def describe(self) -> str:
        """One line for people."""
        parts = [("dense", self.dense), ("expert slots", self.slots), (f"KV of {self.max_context} tokens", self.kv)]
        parts += [("scratch", self.scratch), ("staging", self.staging), ("workspace", self.workspace)]
        parts[1:1] = [("a dense layer in flight", self.in_flight)]
        text = ", ".join(f"{name} {format_size(size)}" for name, size in parts if size)
        if self.offloaded_layers:
            text += f"; dense weights of {self.offloaded_layers} layers, {format_size(self.offloaded)}, come from "
            text += f"{self.offloaded_in} in every pass"
        if self.host is not None:
            text += f"; {self.host.describe()}"
        return f"{format_size(self.budget)}: {text}"


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
        found = plan(SCRATCH_SLOTS)
    except CapacityError:
        if config.on_miss == "cpu":
            raise
        return "fetch", plan(0)
    if config.on_miss == "cpu":
        return "cpu", found if found.slots_per_layer != shape.experts else plan(0)
    enough = config.slots_per_layer is not None or sum(found.slots_per_layer) >= SLOTS_PER_SCRATCH * SCRATCH_SLOTS
    return ("auto", found) if enough and found.slots_per_layer != shape.experts else ("fetch", plan(0))


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
    """Divide the device's memory, of which `free` bytes can be had and "auto" takes `share`.

    host_free: bytes of a memory other than the device's that dense layers may take; what does not fit there stays on
    disk. scratch: bytes for experts that get no slot. CapacityError naming the smallest budget that works. A pool of
    all layers sizes each slot for the largest expert.
    """
    budget = int(free * share) if config.device_memory == "auto" else min(int(config.device_memory), free)
    if config.scope == "model":
        model = replace(model, slot_bytes=(max(model.slot_bytes),) * shape.layers)
    least = tuple(min(k, e) for k, e in zip(shape.top_k, shape.experts, strict=True))
    explicit = None if config.slots_per_layer is None else config.cache().quotas(shape)
    wanted_context = config.max_context or min(model.context_limit, MIN_CONTEXT)
    around = model.staging + model.workspace + scratch + model.kv_per_token * wanted_context
    dense_parts = [sum(model.dense_with(n)) for n in range(len(model.layers) + 1)]
    smallest = min(dense_parts) + around + _bytes(least, model.slot_bytes)
    around += _bytes(explicit or least, model.slot_bytes)
    num_offloaded = next((n for n, dense in enumerate(dense_parts) if dense + around <= budget), None)
    if num_offloaded is None:
        asked = f"slots_per_layer={config.slots_per_layer}" if explicit else f"top_k={max(shape.top_k)} slots per layer"
        raise _too_small(min(dense_parts) + around, budget, asked, config, smallest)
    resident, in_flight = model.dense_with(num_offloaded)
    fixed = resident + in_flight + model.staging + model.workspace + scratch
    if config.max_context is not None:
        context = config.max_context
    elif model.kv_per_token == 0:
        context = KV_SEQUENCES * model.context_limit
    else:
        room = budget - fixed - _bytes(explicit or least, model.slot_bytes)
        reserve = room if explicit else max(int(room * KV_SHARE), model.kv_per_token * wanted_context)
        context = min(KV_SEQUENCES * model.context_limit, reserve // model.kv_per_token)
    kv = model.kv_per_token * context
    slots = explicit or _spread(budget - fixed - kv, shape, model.slot_bytes, least)
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
        smallest_dense=smallest - min(dense_parts) + model.dense,
        in_flight=in_flight,
        offloaded=model.dense - resident,
        offloaded_layers=num_offloaded,
        offloaded_in=None if not num_offloaded else HOST if model.dense - resident <= host_free else DISK,
    )


def _spread(room: int, shape: CacheShape, slot_bytes: Sequence[int], least: Sequence[int]) -> tuple[int, ...]:
    """Equal quotas as far as they go, what is left over to the first layers that still can take one more."""
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
    return sum(n * size for n, size in zip(quotas, slot_bytes, strict=True))


def _too_small(needed: int, budget: int, what: str, config: OffloadConfig, smallest: int) -> CapacityError:
    have = "device_memory" if budget == config.device_memory else "what is free"
    return CapacityError(
        f"{have}, {format_size(budget)}, is too small: {what} needs {needed} bytes ({format_size(needed)}). "
        f"The smallest device_memory that works for this model is {smallest} bytes ({format_size(smallest)})."
    )
