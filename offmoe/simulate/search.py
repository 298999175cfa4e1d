"""The search behind `offmoe tune`: which configurations are replayed, and which of them is best.

The first round replays every policy at every capacity. The second round stays at one capacity and tries the other
options (scope, prefetch, unequal quotas, on_miss) with the two best policies. Crossing all options in one round would
take hundreds of replays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from offmoe.config import EVICTIONS, MIN_SLOTS, CacheOptions
from offmoe.errors import ConfigError
from offmoe.simulate.predictions import PredictionQuality, analyze, transition_predictions
from offmoe.simulate.sweep import Bounds, Outcome, Settings, fit_quotas, gap_closed, grid, knee, rank
from offmoe.trace.trace import Trace
from offmoe.types import CacheShape

REFINED = 2
"""Number of policies that the second round varies."""

Sweep = Callable[[Sequence[CacheOptions], Sequence[CacheOptions]], tuple[list[Outcome], list[Bounds]]]
"""(candidates, bounds) -> outcomes: `sweep.sweep` with its other arguments bound."""


@dataclass(frozen=True)
class SearchResult:
    """Everything that was replayed.

    Attributes:
        slots: the capacity in slots per layer, requested or found at the knee of the curve.
        ranked: the outcomes of that capacity, best first.
        pools: by slots in all, one pool of all layers under the best policy, which gives every miss a slot; empty if
            scopes were requested.
    """

    trace: Trace
    settings: Settings
    outcomes: list[Outcome]
    bounds: list[Bounds]
    slots: int
    ranked: list[Outcome]
    pools: dict[int, Outcome] = field(default_factory=dict)

    @property
    def best(self) -> Outcome:
        return self.ranked[0]

    @property
    def policies(self) -> list[str]:
        return list(dict.fromkeys(outcome.options.eviction for outcome in self.outcomes))

    def curve(self, eviction: str) -> dict[int, float]:
        """Hit rate by slots per layer, for one policy with equal quotas and without prefetch."""
        return {n: outcome.whole.stats.hit_rate for n, outcome in _equal_quotas(self.outcomes, eviction).items()}

    def hit_rates(self) -> dict[str, dict[str, float]]:
        """By scope, the hit rates of the test requests by slots in all: what loading chooses the scope by.

        Empty if only one scope was tried.
        """
        if not self.pools:
            return {}
        policy, shape = next(iter(self.pools.values())).options.eviction, self.trace.shape
        layers = {o.options.quotas(shape): o for o in _equal_quotas(self.outcomes, policy).values()}
        return {
            "layer": {str(sum(quotas)): o.judged.stats.hit_rate for quotas, o in layers.items()},
            "model": {str(slots): o.judged.stats.hit_rate for slots, o in self.pools.items()},
        }

    def gap(self, outcome: Outcome) -> float | None:
        """Share of the distance from LRU to Belady that is closed; None if Belady is no bound, or LRU was not tried."""
        slots = outcome.options.slots_per_layer
        bound = next((b for b in self.bounds if b.slots_per_layer == slots), None)
        lru = next((rate for n, rate in self.curve("lru").items() if n == slots), None)
        options = outcome.options
        if bound is None or lru is None or (options.scope, options.prefetch, options.on_miss) != ("layer", 0, "fetch"):
            return None
        return gap_closed(outcome.whole.stats.hit_rate, lru, bound.belady)

    def others(self) -> list[Outcome]:
        """The outcomes of other capacities."""
        ranked = {id(outcome) for outcome in self.ranked}
        return [outcome for outcome in self.outcomes if id(outcome) not in ranked]

    def predictions(self) -> dict[str, list[PredictionQuality]]:
        """Quality of predictions, per layer, compared with the best cache.

        "recorded" are the predictions of the trace, if it has any. "transitions" is a baseline that counts transitions
        between layers. Both are judged on the requests that the baseline did not count.
        """
        trace, test = self.trace, self.settings.test_requests
        if trace.shape.layers < 2:
            return {}
        cache = replace(self.best.options, prefetch=0)
        counted = replace(trace, predicted=transition_predictions(trace, test))
        baseline = {"transitions": analyze(counted, cache, test or None)}
        if trace.predicted is None:
            return baseline
        return {"recorded": analyze(trace, cache, test or None), **baseline}


def search(
    trace: Trace,
    settings: Settings,
    sweep: Sweep,
    sizes: Sequence[int],
    slots: int | None = None,
    evictions: Sequence[str] = EVICTIONS,
    scopes: Sequence[str] | None = None,
    prefetches: Sequence[int | str] | None = None,
    on_misses: Sequence[str] | None = None,
    host_sizes: Sequence[int] | None = None,
) -> SearchResult:
    """Replay the configurations that are worth it.

    Args:
        trace: the recorded routing.
        settings: how every configuration is replayed.
        sweep: replays candidates and bounds.
        sizes: capacities of the first round, in slots per layer.
        slots: the capacity to choose for; None chooses the knee of the hit-rate curve.
        evictions: policies of the first round.
        scopes, prefetches, on_misses: values to cross with every policy and size. None stands for scope "layer",
            prefetch 0 and on_miss "fetch" in the first round; the second round then tries the others.
        host_sizes: slots per layer in RAM behind the device's slots. The most are used everywhere, fewer in the second
            round. None stands for those of the recorded run, and half of them.

    Raises:
        ConfigError: the trace cannot answer, because it holds no predictions.
    """
    if trace.predicted is None and any(prefetch != 0 for prefetch in prefetches or ()):
        raise ConfigError("--prefetch: the trace holds no predictions; record one with 'offmoe generate --prefetch N'.")
    sizes = sorted({*sizes, *([slots] if slots else [])})
    in_ram, fewer = _host_sizes(trace, host_sizes)
    candidates = grid(
        trace,
        sizes,
        evictions,
        scopes or ("layer",),
        prefetches or (0,),
        on_misses or ("fetch",),
        settings.test_requests,
        in_ram,
    )
    outcomes, bounds = sweep(candidates, [CacheOptions(slots_per_layer=n) for n in sizes])
    if slots is None:
        slots = knee(
            {n: max(o.train.stats.hit_rate for o in outcomes if o.options.slots_per_layer == n) for n in sizes}
        )
    first = rank(outcome for outcome in outcomes if outcome.options.slots_per_layer == slots)
    requested = {"scope": scopes, "prefetch": prefetches, "on_miss": on_misses}
    varied = [name for name, values in requested.items() if values is None]
    refined = _refinements(trace, outcomes, first, slots, varied, fewer)
    pools = _pools(trace.shape, first[0].options, sizes) if scopes is None else {}
    second, _ = sweep([*refined, *pools.values()], [])
    best_pools = dict(zip(pools, second[len(refined) :], strict=True))
    return SearchResult(trace, settings, outcomes, bounds, slots, rank([*first, *second[: len(refined)]]), best_pools)


def _pools(shape: CacheShape, base: CacheOptions, sizes: Sequence[int]) -> dict[int, CacheOptions]:
    """By slots in all: one pool under the policy of `base`, as large as `sizes` slots per layer and smaller."""
    plain = replace(base, scope="model", prefetch=0, on_miss="fetch")
    few = {max(MIN_SLOTS, shape.layers // part) for part in (4, 2, 1)}
    totals = few | {sum(min(n, experts) for experts in shape.experts) for n in sizes}
    return {
        total: replace(plain, slots_per_layer=shape.spread(total))
        for total in sorted(totals)
        if total <= shape.num_keys
    }


def _refinements(
    trace: Trace,
    outcomes: list[Outcome],
    first: list[Outcome],
    slots: int,
    varied: Collection[str],
    host_sizes: Sequence[int],
) -> list[CacheOptions]:
    """Second-round candidates at capacity `slots`. first: the outcomes of that capacity, best first.

    varied: the options that the second round varies, of "scope", "prefetch" and "on_miss".
    """
    refined = []
    for policy in list(dict.fromkeys(outcome.options.eviction for outcome in first))[:REFINED]:
        base = next(outcome.options for outcome in first if outcome.options.eviction == policy)
        curve = _equal_quotas(outcomes, policy)
        if "scope" in varied:
            refined.append(replace(base, scope="model"))
        if "prefetch" in varied and trace.predicted is not None:
            counts: list[int | str] = list(dict.fromkeys([1, max(trace.shape.top_k), "auto"]))
            refined += [replace(base, prefetch=n) for n in counts]
        if "on_miss" in varied:
            refined += [replace(base, on_miss="cpu"), replace(base, on_miss="auto")]
        refined += [replace(base, host_slots=n) for n in host_sizes]
        if len(curve) > 1:
            fitted = fit_quotas(curve, slots, trace.shape)
            if len(set(fitted)) > 1:
                refined.append(replace(base, scope="layer", prefetch=0, on_miss="fetch", slots_per_layer=fitted))
    return refined


def _host_sizes(trace: Trace, sizes: Sequence[int] | None) -> tuple[int | tuple[int, ...], tuple[int, ...]]:
    """Slots per layer in RAM: those of the first round, and the smaller numbers of the second round."""
    if sizes is not None:
        in_order = sorted({*sizes}, reverse=True)
        return in_order[0], tuple(in_order[1:])
    own = 0 if trace.options is None else trace.options.host_slots
    half = (own if isinstance(own, int) else max(own)) // 2
    return own, (half, 0) if half else ()


def _equal_quotas(outcomes: Sequence[Outcome], eviction: str) -> dict[int, Outcome]:
    """Outcomes of one policy by slots per layer, with equal quotas, prefetch 0 and on_miss "fetch"."""
    return {
        o.options.slots_per_layer: o
        for o in outcomes
        if isinstance(o.options.slots_per_layer, int)
        and (o.options.eviction, o.options.scope, o.options.prefetch, o.options.on_miss)
        == (eviction, "layer", 0, "fetch")
    }
