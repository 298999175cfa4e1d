"""Finds the best cache for a trace: replays many configurations, compares them with bounds and ranks them.

Requests are split into two halves. Everything that is fitted (popularity, quotas, the choice itself) sees the train
half only; the test half shows what the choice is worth. Only the bounds know the future. A sweep takes one replay per
configuration, at 30,000 accesses per second and core or more, spread over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from offmoe.config import EVICTIONS, MIN_SLOTS, CacheOptions
from offmoe.errors import CapacityError
from offmoe.eviction_names import Factory, register_eviction, registered_evictions
from offmoe.policy.planner import Planner, build_planner
from offmoe.profile import CostModel
from offmoe.simulate.clock import Clock
from offmoe.simulate.fills import fill, fills_by_access
from offmoe.simulate.processes import run_tasks
from offmoe.simulate.replay import Recording, belady, belady_with_bypass, replay, shuffled, uniform_hit_rate
from offmoe.text import size_option
from offmoe.trace.trace import Trace
from offmoe.types import CacheShape, CacheStats

Progress = Callable[[int, int], None]
"""Called with (configurations done, all configurations)."""


@dataclass
class Totals:
    """Totals over some of the requests.

    Attributes:
        stats: the counts of the cache.
        tokens, seconds: of all steps. Seconds are 0 without costs.
        single_tokens, single_seconds: of the steps with one token, which is decoding.
    """

    stats: CacheStats
    tokens: int = 0
    seconds: float = 0.0
    single_tokens: int = 0
    single_seconds: float = 0.0

    @property
    def misses_per_token(self) -> float:
        return self.stats.misses / self.tokens if self.tokens else 0.0

    @property
    def bytes_per_token(self) -> float:
        return self.stats.h2d_bytes / self.tokens if self.tokens else 0.0

    @property
    def disk_bytes_per_token(self) -> float:
        return self.stats.disk_bytes / self.tokens if self.tokens else 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Speed of decoding, or of all steps if no step had one token; None without costs."""
        if self.single_seconds:
            return self.single_tokens / self.single_seconds
        return self.tokens / self.seconds if self.seconds else None

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


@dataclass(frozen=True)
class Outcome:
    """One configuration over a whole trace, counted separately for train and test requests."""

    options: CacheOptions
    train: Totals
    test: Totals

    @property
    def whole(self) -> Totals:
        return self.train + self.test

    @property
    def judged(self) -> Totals:
        """The totals that show what the choice is worth: test, or train if there is no test request."""
        return self.test if self.test.tokens else self.train


@dataclass(frozen=True)
class Bounds:
    """Hit rates at one capacity to compare every policy with.

    Attributes:
        belady: upper bound for prefetch 0 where every miss gets a slot; exact for single-token steps.
        belady_bypass: upper bound for every cache that fetches on demand.
        uniform: routing without skew and without memory.
        shuffled: LRU on the tokens in random order: skew without memory.
    """

    slots_per_layer: int | tuple[int, ...]
    scope: str
    belady: float
    belady_bypass: float
    uniform: float
    shuffled: float


@dataclass(frozen=True)
class Settings:
    """How all configurations of a sweep are replayed. test_requests: as `split_requests` gives them. fills: whether the
    recorded run's own configuration is filled in the background as the run was; a comparison is fair without."""

    costs: CostModel | None = None
    clear_between_requests: bool = False
    test_requests: frozenset[int] = field(default_factory=frozenset)
    fills: bool = False


def split_requests(trace: Trace) -> frozenset[int]:
    """The test requests: every other request. Empty if there is only one, which then is the train half."""
    in_order = list(dict.fromkeys(trace.request.tolist()))
    return frozenset(in_order[1::2])


def evaluate(recording: Recording, options: CacheOptions, settings: Settings) -> Outcome:
    """Replay one configuration from an empty cache, which is emptied again between requests if the settings say so."""
    shape = recording.shape
    train, test = Totals(CacheStats.for_layers(shape.layers)), Totals(CacheStats.for_layers(shape.layers))
    clock = None if settings.costs is None else Clock(settings.costs, shape)
    planner: Planner | None = None
    request = -1
    fills = fills_by_access(recording.fills if settings.fills else None, recording.trace.options, options)
    number = 0
    for step in recording.steps:
        if planner is None or (settings.clear_between_requests and step.request != request):
            planner = build_planner(options, shape)
        request = step.request
        part = test if request in settings.test_requests else train
        plan_of, add, stats = planner.plan, part.stats.add, part.stats
        began = 0.0 if clock is None else clock.now_s
        for access in step.accesses:
            if number in fills:
                fill(planner, fills[number], stats)
            number += 1
            plan = plan_of(access)
            add(plan, shape)
            if clock is not None:
                waited = clock.stall_s
                clock.add(access, plan, step.rows)
                stats.stalled(access.layer, clock.stall_s - waited)
        part.tokens += step.rows
        seconds = 0.0 if clock is None else clock.now_s - began
        part.seconds += seconds
        if step.rows == 1:
            part.single_tokens += 1
            part.single_seconds += seconds
    return Outcome(options, train, test)


def bound(recording: Recording, options: CacheOptions, settings: Settings) -> Bounds:
    """Compute the bounds at the capacity and scope of `options`."""
    lru = replace(options, eviction="lru", prefetch=0, popularity=None, on_miss="fetch", host_slots=0)
    parts = recording.by_request() if settings.clear_between_requests else [recording]
    demands = [sum(len(access.demands) for access in part.accesses()) for part in parts]
    total = sum(demands) or 1
    best = sum(belady(part, lru).hits for part in parts) / total
    bypass = sum(n * belady_with_bypass(part, lru) for n, part in zip(demands, parts, strict=True)) / total
    mixed = replay(shuffled(recording.trace), lru).stats.hit_rate
    return Bounds(lru.slots_per_layer, lru.scope, best, bypass, uniform_hit_rate(recording, lru), mixed)


def sweep(
    trace: Trace,
    candidates: Sequence[CacheOptions],
    bounds: Sequence[CacheOptions] = (),
    settings: Settings | None = None,
    *,
    jobs: int = 1,
    progress: Progress = lambda done, total: None,
) -> tuple[list[Outcome], list[Bounds]]:
    """Replay every candidate, and compute bounds.

    Args:
        trace: the recorded routing.
        candidates: configurations to replay.
        bounds: configurations whose capacity and scope are bounded.
        settings: how to replay.
        jobs: number of processes. With more than one, a script must guard its main module, as multiprocessing requires.
        progress: called after every configuration.

    Raises:
        ConfigError: a configuration does not fit the model.
    """
    settings = settings or Settings()
    for options in [*candidates, *bounds]:
        build_planner(options, trace.shape)
    tasks: list[Callable[[Recording], Any]] = [
        *(partial(evaluate, options=options, settings=settings) for options in candidates),
        *(partial(bound, options=options, settings=settings) for options in bounds),
    ]
    names = {options.eviction for options in candidates}
    evictions = {name: factory for name, factory in registered_evictions().items() if name in names}
    results = run_tasks(_prepare, (trace, evictions), tasks, jobs, progress)
    return results[: len(candidates)], results[len(candidates) :]


def _prepare(raw: tuple[Trace, Mapping[str, Factory]]) -> Recording:
    """The accesses of a trace, and the caller's eviction policies registered in a process of the sweep's own."""
    trace, evictions = raw
    for name, factory in evictions.items():
        register_eviction(name, factory)
    return Recording(trace)


def grid(
    trace: Trace,
    slots: Iterable[int | tuple[int, ...]],
    evictions: Sequence[str] = EVICTIONS,
    scopes: Sequence[str] = ("layer",),
    prefetches: Sequence[int | str] = (0,),
    on_misses: Sequence[str] = ("fetch",),
    test_requests: frozenset[int] = frozenset(),
    host_slots: int | tuple[int, ...] = 0,
) -> list[CacheOptions]:
    """All combinations of the values, each with `host_slots` in RAM.

    The popularity that the policy "static" needs is counted on the requests outside `test_requests`.
    """
    popular = {"static": popularity(trace, test_requests)} if "static" in evictions else {}
    return [
        CacheOptions(
            eviction, scope, n, prefetch, popularity=popular.get(eviction), host_slots=host_slots, on_miss=on_miss
        )
        for n, eviction, scope, prefetch, on_miss in product(slots, evictions, scopes, prefetches, on_misses)
    ]


def popularity(trace: Trace, without: frozenset[int] = frozenset()) -> tuple[tuple[float, ...], ...]:
    """Tokens routed to each expert, by layer and expert, in the requests that are not in `without`."""
    rows = ~np.isin(trace.request, list(without))
    counts = []
    for layer, num_experts in enumerate(trace.shape.experts):
        ids = trace.experts[rows, layer].ravel()
        counts.append(tuple(np.bincount(ids[ids >= 0], minlength=num_experts).astype(float).tolist()))
    return tuple(counts)


def capacities(shape: CacheShape) -> list[int]:
    """Slots per layer that a sweep tries: from top_k to all experts, in steps of about 1.4x."""
    top_k, most = max(shape.top_k), max(shape.experts)
    steps = {top_k << i for i in range(20)} | {top_k * 3 << i >> 1 for i in range(20)}
    return sorted({n for n in steps if top_k <= n < most} | {most})


def affordable(shape: CacheShape, budget: int) -> int:
    """The most slots per layer that fit `budget` bytes. Raises CapacityError if one in every layer does not fit."""
    each = sum(shape.expert_bytes)
    if budget < each:
        slots = shape.spread(max(MIN_SLOTS, budget // max(shape.expert_bytes)))
        raise CapacityError(
            f"a budget of {budget} bytes is too small: a slot in every layer needs {each} bytes. Use --budget "
            f"{size_option(each)} or more. With less there is one pool: offmoe simulate TRACE --scope model "
            f"--slots-per-layer {','.join(map(str, slots))}."
        )
    return int(min(budget // each, max(shape.experts)))


def fit_quotas(by_slots: Mapping[int, Outcome], slots: int, shape: CacheShape) -> tuple[int, ...]:
    """Distribute the memory of `slots` per layer unequally, greedily by hits gained per byte.

    A layer's cache does not depend on the other layers, so its hits at n slots are known from the run in which every
    layer had n slots. Hits between two measured capacities are interpolated linearly.

    Args:
        by_slots: outcomes of one policy at several equal capacities. Only their train halves are used.
        slots: mean slots per layer.
        shape: the model.

    Returns:
        Slots of each layer.
    """
    known = sorted(by_slots)
    curves = [
        np.interp(range(most + 1), known, [by_slots[n].train.stats.by_layer[layer].hits for n in known])
        for layer, most in enumerate(shape.experts)
    ]
    quotas = [min(k, e, slots) for k, e in zip(shape.top_k, shape.experts, strict=True)]
    room = slots * sum(shape.expert_bytes) - sum(n * b for n, b in zip(quotas, shape.expert_bytes, strict=True))
    while True:
        gains = [
            (float(_best_slope(curve, quota)) / nbytes, -layer)
            for layer, (curve, quota, nbytes) in enumerate(zip(curves, quotas, shape.expert_bytes, strict=True))
            if quota < shape.experts[layer] and nbytes <= room
        ]
        if not gains:
            return tuple(quotas)
        layer = -max(gains)[1]
        quotas[layer] += 1
        room -= shape.expert_bytes[layer]


def _best_slope(curve: np.ndarray, at: int) -> float:
    """Hits per slot of the best next step of any width: behind a flat stretch of the curve may be a steep one."""
    widths = np.arange(1, len(curve) - at)
    return float(((curve[at + 1 :] - curve[at]) / widths).max())


def knee(curve: Mapping[int, float]) -> int:
    """The knee of hit rate over slots: the capacity farthest above the line from the first point to the last."""
    first, last = min(curve), max(curve)
    if last == first or curve[last] <= curve[first]:
        return first
    rise = (curve[last] - curve[first]) / (last - first)
    return max(sorted(curve), key=lambda n: curve[n] - rise * n)


def gain_of_doubling(curve: Mapping[int, float], slots: int) -> float:
    """Hit rate (0 to 1) that twice the slots would add, interpolated linearly between capacities."""
    known = sorted(curve)
    at = np.interp([slots, 2 * slots], known, [curve[n] for n in known])
    return float(at[1] - at[0])


def gap_closed(rate: float, lru: float, best: float) -> float | None:
    """Share of the distance from LRU to Belady that `rate` closes; None if LRU is as good as Belady."""
    return (rate - lru) / (best - lru) if best > lru + 1e-12 else None


def rank(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Sort outcomes, best first, by their train halves.

    With costs the criterion is tokens per second. Without costs it is the fewest bytes read from disk, then the fewest
    bytes moved, then the highest hit rate. Equal outcomes keep their order.
    """

    def worth(outcome: Outcome) -> tuple[float, ...]:
        train = outcome.train
        if train.tokens_per_s is not None:
            return (-train.tokens_per_s,)
        return train.disk_bytes_per_token, train.bytes_per_token, -train.stats.hit_rate

    return sorted(outcomes, key=worth)
