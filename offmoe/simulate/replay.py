"""Replays a trace through the runtime's own planner and counts what a cache would have done.

No torch, no weights and no clock are involved. `replay(trace).stats` equals the statistics of the run that recorded the
trace, exactly, if the options are that run's. So this module must never take a decision of its own. A replay costs one
plan, about 10 us, per (step, layer); `Recording` computes the accesses of a trace once for many replays.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np

from offmoe.config import CacheOptions
from offmoe.policy.eviction.belady import Belady
from offmoe.policy.planner import Planner, build_planner
from offmoe.simulate.fills import fill, fills_by_access
from offmoe.trace.trace import Trace
from offmoe.types import Access, CacheShape, CacheStats


class Recording:
    """A trace with its accesses, for replaying it many times.

    A part of a trace (`by_request`) is replayed without the trace's background fills.
    """

    def __init__(self, trace: Trace, steps: Sequence[Step] | None = None):
        self.trace = trace
        self.shape = trace.shape
        self.fills = trace.fills if steps is None else None
        if steps is None:
            steps = [
                Step(int(trace.request[rows.start]), rows.stop - rows.start, tuple(trace.step_accesses(rows)))
                for rows in trace.steps()
            ]
        self.steps = steps

    def accesses(self) -> Iterator[Access]:
        for step in self.steps:
            yield from step.accesses

    def by_request(self) -> list[Recording]:
        """One recording per series of steps of one request. A batch counts as the request of its first row."""
        return [Recording(self.trace, list(steps)) for _, steps in groupby(self.steps, lambda step: step.request)]


class Step(NamedTuple):
    """One forward pass: the request of its first row, its number of rows (tokens), and its accesses."""

    request: int
    rows: int
    accesses: tuple[Access, ...]


@dataclass(frozen=True)
class Replay:
    """The statistics of one configuration."""

    options: CacheOptions
    stats: CacheStats


def replay(trace: Trace | Recording, options: CacheOptions) -> Replay:
    """Count one configuration over a trace, from an empty cache.

    Experts that were filled in the background during the recording are filled at the same accesses if the options are
    those of the run. Any other configuration would have been filled at other times, and is replayed without fills.

    Raises:
        ConfigError: options and model do not fit.
    """
    planner, stats = build_planner(options, trace.shape), CacheStats.for_layers(trace.shape.layers)
    recording = trace.trace if isinstance(trace, Recording) else trace
    fills = fills_by_access(trace.fills, recording.options, options)
    for i, access in enumerate(trace.accesses()):
        if i in fills:
            fill(planner, fills[i], stats)
        stats.add(planner.plan(access), trace.shape)
    return Replay(options, stats)


def belady(trace: Trace | Recording, options: CacheOptions) -> CacheStats:
    """Count the same cache with Belady's MIN policy, which knows the future.

    This bounds every cache with prefetch 0 that gives a slot to every miss, in single-token steps. In longer steps,
    waves may pass an expert through that MIN would not have admitted. Method: Belady, "A study of replacement
    algorithms for a virtual-storage computer", 1966.
    """
    options = CacheOptions(slots_per_layer=options.slots_per_layer, scope=options.scope, prefetch=0)
    accesses = list(trace.accesses())
    uses = _uses(accesses, trace.shape, options.scope)
    planner = Planner(trace.shape, options, lambda pool: Belady({key: uses[key] for key in pool.keys}))
    return _count(planner, accesses, trace.shape)


def belady_with_bypass(trace: Trace | Recording, options: CacheOptions) -> float:
    """Hit rate of MIN if an expert may be used without taking a slot.

    No cache that fetches on demand does better, whatever it admits and however long the steps are.
    """
    accesses = list(trace.accesses())
    quotas = options.quotas(trace.shape)
    pooled = options.scope == "model"
    uses, first = _uses(accesses, trace.shape, options.scope), trace.shape.first_key
    pools = [_Min(uses, sum(quotas))] * trace.shape.layers if pooled else [_Min(uses, quota) for quota in quotas]
    hits = demands = 0
    for access in accesses:
        hits += pools[access.layer].use([first[access.layer] + demand.expert for demand in access.demands])
        demands += len(access.demands)
    return hits / demands if demands else 0.0


class _Min:
    """Keeps the keys whose next use is nearest, among those held and those demanded. A lazy heap by next use."""

    def __init__(self, uses: Sequence[Sequence[int]], capacity: int):
        self._uses, self._capacity = uses, capacity
        self._next: dict[int, int] = defaultdict(int)
        self._held: set[int] = set()
        self._farthest: list[tuple[float, int]] = []

    def use(self, keys: Sequence[int]) -> int:
        """How many of the keys are held before the access."""
        hits = sum([key in self._held for key in keys])
        for key in keys:
            self._next[key] += 1
            self._held.add(key)
            heapq.heappush(self._farthest, (-self._when(key), key))
        while len(self._held) > self._capacity:
            when, key = heapq.heappop(self._farthest)
            if key in self._held and -when == self._when(key):
                self._held.remove(key)
        return hits

    def _when(self, key: int) -> float:
        uses, i = self._uses[key], self._next[key]
        return uses[i] if i < len(uses) else math.inf


def shuffled(trace: Trace, seed: int = 0) -> Trace:
    """The trace with its tokens in random order: experts keep their popularity, and routing loses its memory."""
    order = np.random.default_rng(seed).permutation(trace.tokens)
    return replace(trace, experts=trace.experts[order], token=None, probs=None, predicted=None, fills=None)


def uniform_hit_rate(trace: Trace | Recording, options: CacheOptions) -> float:
    """Mean hit rate of routing without skew and memory: the demand-weighted share of experts that have a slot."""
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


def _uses(accesses: Iterable[Access], shape: CacheShape, scope: str) -> list[list[int]]:
    """For each key: the indices of the accesses of its pool that demand it."""
    uses: list[list[int]] = [[] for _ in range(shape.num_keys)]
    counts = [0] * shape.layers
    for i, access in enumerate(accesses):
        index = counts[access.layer] if scope == "layer" else i
        counts[access.layer] += 1
        for demand in access.demands:
            uses[shape.first_key[access.layer] + demand.expert].append(index)
    return uses
