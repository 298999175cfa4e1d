"""Replay a trace through the runtime's own planner and count what would have happened. No torch, no weights, no clock.

Bound: the planner, some 10 us per (step, layer). `replay(trace).stats` equals the statistics of the run that recorded
the trace, exactly, when the options are the run's (rule R2). Must never take a decision of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from offmoe.config import CacheOptions
from offmoe.policy.eviction import Belady
from offmoe.policy.planner import Planner, build_planner
from offmoe.trace import Trace
from offmoe.types import Access, CacheShape, CacheStats


@dataclass(frozen=True)
class Replay:
    """Outcome of one configuration: the options it ran with and what it counted."""

    options: CacheOptions
    stats: CacheStats


def replay(trace: Trace, options: CacheOptions) -> Replay:
    """Count one configuration over a trace, from an empty cache. ConfigError if the options do not fit the model."""
    return Replay(options, _count(build_planner(options, trace.shape), trace.accesses(), trace.shape))


def belady(trace: Trace, options: CacheOptions) -> CacheStats:
    """The same cache with perfect knowledge of the future: the bound for prefetch 0 and forced admission.

    It bounds single-token steps; in longer steps waves may pass an expert through that MIN would not have admitted.
    """
    options = CacheOptions(slots_per_layer=options.slots_per_layer, scope=options.scope, prefetch=0)
    accesses = [access._replace(predicted=()) for access in trace.accesses()]
    uses = _uses(accesses, trace.shape, options.scope)
    planner = Planner(trace.shape, options, lambda pool, _: Belady(uses[pool]))
    return _count(planner, accesses, trace.shape)


def uniform_hit_rate(trace: Trace, options: CacheOptions) -> float:
    """What routing without skew or memory would hit on average: the demand-weighted share of experts that have a
    slot.
    """
    quotas = options.quotas(trace.shape)
    if options.scope == "model":
        return min(1.0, sum(quotas) / sum(trace.shape.experts))
    demands = [0] * trace.shape.layers
    for access in trace.accesses():
        demands[access.layer] += len(access.demands)
    total = sum(demands)
    return (
        sum(d * q / e for d, q, e in zip(demands, quotas, trace.shape.experts, strict=True)) / total if total else 0.0
    )


def _count(planner: Planner, accesses: Iterable[Access], shape: CacheShape) -> CacheStats:
    stats = CacheStats.for_layers(shape.layers)
    for access in accesses:
        stats.add(planner.plan(access), shape)
    return stats


def _uses(accesses: Iterable[Access], shape: CacheShape, scope: str) -> list[list[list[int]]]:
    """Per pool and key, the indices of the pool's accesses that demand the key."""
    if scope == "layer":
        uses: list[list[list[int]]] = [[[] for _ in range(n)] for n in shape.experts]
        counts = [0] * shape.layers
        for access in accesses:
            for demand in access.demands:
                uses[access.layer][demand.expert].append(counts[access.layer])
            counts[access.layer] += 1
        return uses
    first = [sum(shape.experts[:layer]) for layer in range(shape.layers)]
    pooled: list[list[int]] = [[] for _ in range(sum(shape.experts))]
    for i, access in enumerate(accesses):
        for demand in access.demands:
            pooled[first[access.layer] + demand.expert].append(i)
    return [pooled]
