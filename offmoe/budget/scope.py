"""Chooses what shares slots where scope="auto": every layer has its own, or all layers share one pool.

The measure is the bytes that one token is expected to move. A dense weight is used by every token, an expert by top_k
of E, so a byte of dense weights outside the device costs more than a byte of experts. Slots of layers' own need top_k
in each layer, for which dense layers may have to move out; a pool works with `MIN_SLOTS` in all.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from offmoe.budget.memory_plan import MemoryPlan
from offmoe.config import OffloadConfig
from offmoe.profile import Profile
from offmoe.text import format_size, span
from offmoe.types import CacheShape

SAME = 0.05
"""A pool must be expected to move this much less than slots of layers' own. With as many slots, layers' own hit 1 to 4
points more of the demands on recorded routing (docs/design/eviction.md), which uniform routing does not show."""


def choose_scope(
    config: OffloadConfig, shape: CacheShape, pool: MemoryPlan, layers: MemoryPlan | None
) -> tuple[MemoryPlan, str]:
    """The better of two plans, and why in one line.

    Args:
        config: the options; its profile may know hit rates of a recorded routing.
        shape: experts and top_k of each MoE layer.
        pool: the plan with one pool of all layers.
        layers: the plan with at least top_k slots in each layer; None if those do not fit.
    """
    if layers is not None and layers.slots_per_layer == shape.experts:
        return layers, "every expert has a slot"
    rates = recorded_hit_rates(config, shape)
    known = "by the profile's trace" if rates else "if all experts were equally likely"
    in_pool = expected_bytes(shape, pool.slots_per_layer, "model", rates) + pool.offloaded
    one_pool = f"one pool for all layers, {format_size(in_pool)} per token expected {known}"
    if layers is None:
        return pool, f"{one_pool}: top_k={span(shape.top_k)} slots in each of {shape.layers} layers do not fit"
    in_layers = expected_bytes(shape, layers.slots_per_layer, "layer", rates) + layers.offloaded
    more_moved_out = layers.offloaded_layers > pool.offloaded_layers
    if in_layers > in_pool * (1 if rates or more_moved_out else 1 + SAME):
        own = f"top_k={span(shape.top_k)} slots in each layer would take {format_size(in_layers)}"
        moved = f", with {layers.offloaded_layers} dense layers moved out for them" if more_moved_out else ""
        return pool, f"{one_pool}: {own}{moved}"
    own = f"slots of each layer's own, {format_size(in_layers)} per token expected {known}"
    return layers, f"{own}: one pool would take {format_size(in_pool)}"


def expected_bytes(
    shape: CacheShape, slots: tuple[int, ...], scope: str, rates: Mapping[str, tuple[list[int], list[float]]] | None
) -> float:
    """Bytes of experts that one token is expected to move into slots.

    Args:
        slots: of each MoE layer; of a pool only their sum counts.
        rates: by scope, hit rates of a recorded routing (`recorded_hit_rates`); None: all experts are equally likely.
    """
    demanded = [k * nbytes for k, nbytes in zip(shape.top_k, shape.expert_bytes, strict=True)]
    if rates is not None:
        counts, hit_rates = rates[scope]
        return float(sum(demanded) * (1.0 - np.interp(sum(slots), counts, hit_rates)))
    if scope == "model":
        slots = _in_use_order(shape, sum(slots))
    return sum(n * (1.0 - held / e) for n, held, e in zip(demanded, slots, shape.experts, strict=True))


def _in_use_order(shape: CacheShape, slots: int) -> tuple[int, ...]:
    """How many slots of a pool each layer's experts hold: those that tokens use most often come first."""
    held = [0] * shape.layers
    for layer in sorted(range(shape.layers), key=lambda i: -shape.top_k[i] / shape.experts[i]):
        held[layer] = min(slots, shape.experts[layer])
        slots -= held[layer]
    return tuple(held)


def recorded_hit_rates(config: OffloadConfig, shape: CacheShape) -> dict[str, tuple[list[int], list[float]]] | None:
    """By scope, (slots in all, hit rate) curves of the profile's trace.

    None without a profile, or if it is of another model or has no curve of both scopes.
    """
    if not isinstance(config.profile, Profile):
        return None
    curves = config.profile.expected.get("hit_rates")
    if not isinstance(curves, Mapping):
        return None
    found = {}
    for scope in ("layer", "model"):
        try:
            points = sorted((int(slots), float(rate)) for slots, rate in curves[scope].items())
        except (KeyError, AttributeError, TypeError, ValueError):
            return None
        if not points or points[-1][0] != shape.num_keys or not all(0.0 <= rate <= 1.0 for _, rate in points):
            return None
        found[scope] = [0, *(n for n, _ in points)], [0.0, *(rate for _, rate in points)]
    return found
