"""prefetch="auto": what it learns from, when it reads ahead, and how much it may read for nothing."""

from __future__ import annotations

import numpy as np
import pytest

from offmoe.config import CacheOptions
from offmoe.io_limits import STOP_BYTES
from offmoe.policy.planner import Planner, build_planner
from offmoe.policy.prefetch import WORTH_BYTES, AutoPrefetch, Candidate
from offmoe.types import Access, CacheShape, CacheStats, Demand
from tests.policy.invariants import check_planner

SHAPE = CacheShape((16, 16), (2, 2), (WORTH_BYTES, WORTH_BYTES))


def access(layer: int, experts, predicted=(), tail: int = 1) -> Access:
    return Access(layer, tuple(Demand(e, 1, 1) for e in sorted(experts)), tail, tuple(predicted))


def routing(steps: int, seed: int = 0) -> list[list[int]]:
    """Two of 16 experts for each step, in router order."""
    chance = np.random.default_rng(seed)
    return [chance.permutation(16)[:2].tolist() for _ in range(steps)]


def run(planner: Planner, wanted: list[list[int]], predict) -> CacheStats:
    """Layer 0 never misses after its first step, layer 1 wants what it is told. predict: of (step, experts)."""
    stats = CacheStats.for_layers(2)
    for step, experts in enumerate(wanted):
        stats.add(planner.plan(access(0, [0, 1], predict(step, experts))), SHAPE)
        stats.add(planner.plan(access(1, experts)), SHAPE)
        check_planner(planner)
    return stats


def auto() -> Planner:
    return build_planner(CacheOptions(slots_per_layer=4, prefetch="auto"), SHAPE)


def wrong(experts: list[int]) -> list[int]:
    return [e for e in range(16) if e not in experts][:2]


def test_right_predictions_are_acted_on():
    stats = run(auto(), routing(600), lambda _, experts: experts)
    assert stats.prefetched == stats.prefetched_used
    assert stats.prefetched_used > 0.8 * (stats.prefetched_used + stats.misses)


def test_learning_that_predictions_are_wrong_reads_nothing():
    planner = auto()
    stats = run(planner, routing(600), lambda _, experts: wrong(experts))
    assert stats.prefetched == 0
    assert not planner.wants_prediction(1)


def test_pauses_grow_and_end():
    planner, asked = auto(), []
    for experts in routing(20_000):
        asked.append(planner.wants_prediction(1))
        planner.plan(access(0, [0, 1], wrong(experts)))
        planner.plan(access(1, experts))
    edges = np.flatnonzero(np.diff(np.array(asked, np.int8)))
    pauses = np.diff(edges)[::2].tolist()
    assert pauses[:5] == [128, 256, 512, 1024, 2048]
    assert set(pauses[5:]) == {2048}


def test_a_new_good_place_starts_the_pauses_anew():
    planner = auto()
    run(planner, routing(1500), lambda _, experts: wrong(experts))
    good = run(planner, routing(4000, seed=1), lambda _, experts: experts)
    assert good.prefetched_used > 1000
    run(planner, routing(200, seed=2), lambda _, experts: wrong(experts))  # no place is trusted any more
    asked = 0
    for experts in routing(AutoPrefetch.TRIAL + 1, seed=3):
        asked += planner.wants_prediction(1)
        planner.plan(access(0, [0, 1], wrong(experts)))
        planner.plan(access(1, experts))
    assert asked


def test_only_the_places_that_are_precise_are_fetched():
    fetched = [0, 0]
    planner = auto()
    for experts in routing(800):
        predicted = [experts[0], wrong(experts)[0]]
        plan = planner.plan(access(0, [0, 1], predicted))
        for key in plan.read_ahead:
            fetched[predicted.index(key.expert)] += 1
        planner.plan(access(1, experts))
    assert fetched[0] > 300
    assert fetched[1] == 0


@pytest.mark.parametrize("period", [10, 60, 200, 1000])
def test_reads_for_nothing_stay_below_their_share(period):
    """Predictions that earn trust and then betray it, at any rhythm."""
    stats = run(auto(), routing(4000), lambda step, experts: experts if step // period % 2 == 0 else wrong(experts))
    needed = stats.misses + stats.prefetched_used
    assert stats.prefetched > 0 or period == 10
    assert stats.prefetched - stats.prefetched_used <= needed / AutoPrefetch.READS_PER_WASTE + 2


def test_prefetches_under_way_count_as_read_for_nothing():
    policy = AutoPrefetch((2, 2), SHAPE.expert_bytes)
    both = [Candidate(0, 4), Candidate(1, 5)]
    for _ in range(AutoPrefetch.EVIDENCE):
        assert not policy.choose(1, both, single=True)
        policy.on_access(1, [4, 5], 2)
    policy.on_access(0, [0], 2 * AutoPrefetch.READS_PER_WASTE - 2 * AutoPrefetch.EVIDENCE - 1)
    assert list(policy.choose(1, both, single=True)) == both[:1]
    policy.issued(1, 1)
    assert not policy.choose(1, both, single=True)


def test_many_tokens_are_judged_apart_from_one():
    policy = AutoPrefetch((2, 2), SHAPE.expert_bytes)
    candidates = [Candidate(0, 4)]
    for _ in range(AutoPrefetch.EVIDENCE):
        policy.choose(1, candidates, single=False)
        policy.on_access(1, [4], 50)
    assert not policy.choose(1, candidates, single=True)
    assert list(policy.choose(1, candidates, single=False)) == candidates


@pytest.mark.parametrize(
    ("stops", "right", "acts"), [(1, 0.7, False), (2, 0.6, False), (2, 0.85, True), (33, 0.3, True), (33, 0.05, False)]
)
def test_reads_that_can_be_stopped_need_less_trust(stops, right, acts):
    """Of an expert of 69 MB, a wrong prediction costs a 33rd of a read."""
    shape = CacheShape((16, 16), (2, 2), (stops * STOP_BYTES,) * 2)
    planner = build_planner(CacheOptions(slots_per_layer=4, prefetch="auto"), shape)
    chance = np.random.default_rng(3)
    stats = run(planner, routing(2000), lambda _, experts: experts if chance.random() < right else wrong(experts))
    assert (stats.prefetched > 500) is acts
    assert acts or stats.prefetched < 100


@pytest.mark.parametrize(("stops", "at_once"), [(4, False), (33, True)])
def test_what_costs_little_is_tried_before_anything_is_known(stops, at_once):
    shape = CacheShape((16, 16), (2, 2), (stops * STOP_BYTES,) * 2)
    planner = build_planner(CacheOptions(slots_per_layer=4, prefetch="auto"), shape)
    planner.plan(access(1, range(4)))  # what is missed allows reads for nothing
    assert bool(planner.plan(access(0, [0, 1], [8, 9])).read_ahead) is at_once


def test_layers_learn_from_each_other_at_first():
    """Ten layers know after three tokens what one alone would know after twelve."""
    layers = 10
    shape = CacheShape((16,) * layers, (2,) * layers, (WORTH_BYTES,) * layers)
    planner, acted = build_planner(CacheOptions(slots_per_layer=2, prefetch="auto"), shape), []
    for token in range(40):
        wanted = routing(layers + 1, seed=token)
        for layer in range(layers):
            plan = planner.plan(access(layer, wanted[layer], wanted[layer + 1] if layer + 1 < layers else ()))
            acted += [token] * len(plan.read_ahead)
    assert 2 <= min(acted) <= 8


def test_experts_that_are_read_as_fast_as_foretold_are_left_alone():
    small = CacheShape((16, 16), (2, 2), (WORTH_BYTES - 1, WORTH_BYTES - 1))
    asks = [
        build_planner(CacheOptions(slots_per_layer=4, prefetch=prefetch), shape).wants_prediction(1)
        for shape, prefetch in ((SHAPE, "auto"), (small, "auto"), (small, 1), (SHAPE, 0))
    ]
    assert asks == [True, False, True, False]


@pytest.mark.parametrize("option", ["auto", 0, 1, 2])
def test_what_is_chosen_is_of_the_ranks_that_could_be(option: int | str) -> None:
    """A caller may carry an access out before it is planned, if nothing of `ranks` is missing."""
    planner = build_planner(CacheOptions(slots_per_layer=4, prefetch=option), SHAPE)
    chance, outside, inside = np.random.default_rng(0), 0, 0
    for step, experts in enumerate(routing(3000)):
        is_good = step // 300 % 2 == 0
        predicted = (
            experts if is_good else [experts[0], *wrong(experts)][:2] if chance.random() < 0.5 else wrong(experts)
        )
        ranks = planner.ranks(1)
        missing = [rank for rank, e in enumerate(predicted) if planner.missing(1, [e])]
        plan = planner.plan(access(0, [0, 1], predicted))
        read = [predicted.index(key.expert) for key in plan.read_ahead]
        assert all(ranks >> rank & 1 for rank in read)
        outside += any(not ranks >> rank & 1 for rank in missing)
        inside += bool(read)
        planner.plan(access(1, experts))
    assert bool(inside) == (option != 0)
    assert bool(outside) == (option in (0, "auto"))


def test_ranks_of_a_layer_with_a_tier_in_ram_are_all() -> None:
    """Its prefetches evict, so a caller must not go on before they are planned."""
    planner = build_planner(CacheOptions(slots_per_layer=4, host_slots=4, prefetch="auto"), SHAPE)
    assert planner.ranks(1) & 0b11 == 0b11
