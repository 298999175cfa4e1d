"""What goes where before anything is loaded: one budget, divided once, with the numbers that divided it.

What moves: nothing. On the device stand the dense weights, the expert slots, the KV cache and a workspace; on a CPU
also the staging buffers. Slots take what the others leave. Must never promise what does not fit: the smallest budget
that works is part of every refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from offmoe.config import OffloadConfig, format_size
from offmoe.errors import CapacityError
from offmoe.types import CacheShape

MIN_CONTEXT = 256
"""Tokens of KV cache without which a model is not usable."""
KV_SHARE = 0.25
"""Most of what is not needed otherwise that an unstated max_context may take; the slots get the rest."""
KV_SEQUENCES = 8
"""Full-length sequences that an unstated max_context makes room for at most: a batch, or beams."""


@dataclass(frozen=True)
class ModelBytes:
    """What a model needs apart from its experts. slot_bytes: a slot of each MoE layer. context_limit: of a sequence."""

    dense: int
    kv_per_token: int
    context_limit: int
    slot_bytes: tuple[int, ...]
    staging: int
    workspace: int


@dataclass(frozen=True)
class MemoryPlan:
    """The division of the device's memory, bytes; `budget` is the cap that the parts add up to at most."""

    budget: int
    dense: int
    slots: int
    kv: int
    staging: int
    workspace: int
    smallest: int
    max_context: int
    slots_per_layer: tuple[int, ...]

    @property
    def used(self) -> int:
        return self.dense + self.slots + self.kv + self.staging + self.workspace

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "slots_per_layer": list(self.slots_per_layer), "used": self.used}

    def describe(self) -> str:
        """One line for people."""
        parts = [("dense", self.dense), ("expert slots", self.slots), (f"KV of {self.max_context} tokens", self.kv)]
        parts += [("staging", self.staging), ("workspace", self.workspace)]
        return f"{format_size(self.budget)}: " + ", ".join(
            f"{name} {format_size(size)}" for name, size in parts if size
        )


def plan_memory(
    config: OffloadConfig, shape: CacheShape, model: ModelBytes, *, free: int, share: float = 1.0
) -> MemoryPlan:
    """Divide the device's memory, of which `free` bytes can be had and "auto" takes `share`.

    CapacityError naming the smallest budget that works. A pool of all layers sizes each slot for the largest expert.
    """
    budget = int(free * share) if config.device_memory == "auto" else min(int(config.device_memory), free)
    if config.scope == "model":
        model = replace(model, slot_bytes=(max(model.slot_bytes),) * shape.layers)
    fixed = model.dense + model.staging + model.workspace
    least = tuple(min(k, e) for k, e in zip(shape.top_k, shape.experts, strict=True))
    wanted_context = config.max_context or min(model.context_limit, MIN_CONTEXT)
    smallest = fixed + model.kv_per_token * wanted_context + _bytes(least, model.slot_bytes)
    explicit = None
    if config.slots_per_layer is not None:
        explicit = config.cache().quotas(shape)
        needed = fixed + model.kv_per_token * wanted_context + _bytes(explicit, model.slot_bytes)
        _check(needed, budget, f"slots_per_layer={config.slots_per_layer}", config, smallest)
    else:
        _check(smallest, budget, f"top_k={max(shape.top_k)} slots per layer", config, smallest)
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
        dense=model.dense,
        slots=_bytes(slots, model.slot_bytes),
        kv=kv,
        staging=model.staging,
        workspace=model.workspace,
        smallest=smallest,
        max_context=context,
        slots_per_layer=slots,
    )


def _spread(room: int, shape: CacheShape, slot_bytes: Sequence[int], least: Sequence[int]) -> tuple[int, ...]:
    """Equal quotas as far as they go, what is left over to the first layers that still can take one more."""
    quotas = list(least)
    room -= _bytes(quotas, slot_bytes)
    grown = True
    while grown:
        grown = False
        for layer, size in enumerate(slot_bytes):
            if quotas[layer] < shape.experts[layer] and quotas[layer] == min(
                q for q, e in zip(quotas, shape.experts, strict=True) if q < e
            ):
                if size > room:
                    return tuple(quotas)
                quotas[layer] += 1
                room -= size
                grown = True
    return tuple(quotas)


def _bytes(quotas: Sequence[int], slot_bytes: Sequence[int]) -> int:
    return sum(n * size for n, size in zip(quotas, slot_bytes, strict=True))


def _check(needed: int, budget: int, what: str, config: OffloadConfig, smallest: int) -> None:
    if needed <= budget:
        return
    have = "device_memory" if budget == config.device_memory else "what is free"
    raise CapacityError(
        f"{have}, {format_size(budget)}, is too small: {what} needs {needed} bytes ({format_size(needed)}). "
        f"The smallest device_memory that works for this model is {smallest} bytes ({format_size(smallest)})."
    )
