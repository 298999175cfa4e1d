"""Victims named one access ahead: who takes which slot, and that it costs no hits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmoe.config import EVICTIONS, CacheOptions, OffloadConfig
from offmoe.errors import ConfigError
from offmoe.policy.planner import Planner, build_planner
from offmoe.policy.victims import MOST_ROWS
from offmoe.simulate.replay import Recording, replay
from offmoe.trace.trace import read_trace, write_trace
from offmoe.types import Access, CacheShape, ExpertKey, Plan, count_demands
from tests.policy.invariants import check_planner

SHAPE = CacheShape(experts=(12, 9, 16), top_k=(2, 3, 2), expert_bytes=(10, 10, 20))
QUEUES = ("sieve", "s3-fifo")
DATA = Path(__file__).parents[1] / "data" / "gptoss20b_6req.npz"


def options_of(eviction: str, slots: int | tuple[int, ...] = 6, **others) -> CacheOptions:
    popularity = tuple(tuple(float(e % 4) for e in range(n)) for n in SHAPE.experts) if eviction == "static" else None
    return CacheOptions(eviction, slots_per_layer=slots, popularity=popularity, lag=1, **others)


@st.composite
def accesses(draw) -> list[Access]:
    """Steps of one token, of small batches, and of prompts."""
    out = []
    for _ in range(draw(st.integers(1, 30))):
        rows = draw(st.sampled_from([1, 1, 1, 1, 2, MOST_ROWS, MOST_ROWS + 1, 70]))
        seed = draw(st.integers(0, 999))
        for layer, (n, k) in enumerate(zip(SHAPE.experts, SHAPE.top_k, strict=True)):
            ids = np.random.default_rng((seed, layer)).permuted(np.tile(np.arange(n), (rows, 1)), axis=1)[:, :k]
            out.append(Access(layer, *count_demands(ids, n)))
    return out


def by_the_rule(planner: Planner, access: Access) -> list[tuple[int, int, ExpertKey | None]] | None:
    """What an access does to slots, from the words of the rule: (expert, slot, who was there) of each miss; None if the
    rule does not hold."""
    places, cache = list(planner.next_places(access.layer)), planner.layers[access.layer]
    demanded = {demand.expert for demand in access.demands}
    held = {cache.residency.slot_of[key]: e for e, key in enumerate(cache.keys) if cache.is_resident(key)}
    moves = []
    for expert in sorted(demanded - set(held.values())):
        while places and held.get(places[0].slot) in demanded:
            places.pop(0)
        if not places:
            return None
        slot = places.pop(0).slot
        moves.append((expert, slot, ExpertKey(access.layer, held[slot]) if slot in held else None))
    return moves if access.tail <= MOST_ROWS and planner.next_places(access.layer) else None


def moves_of(plan: Plan) -> list[tuple[int, int, ExpertKey | None]]:
    return sorted((f.key.expert, f.slot, f.evicted) for wave in plan.waves for f in wave.fetches)


@settings(max_examples=30, deadline=None)
@given(accesses(), st.sampled_from(EVICTIONS), st.sampled_from([6, (4, 6, 16), (3, 6, 5), 12]), st.sampled_from([0, 3]))
def test_misses_take_the_slots_that_were_named(steps, eviction, slots, host_slots):
    options = options_of(eviction, slots, host_slots=host_slots)
    planner, twin = build_planner(options, SHAPE), build_planner(options, SHAPE)
    for step in steps:
        expected = by_the_rule(planner, step)  # the twin is not asked in between: asking changes nothing
        plan = planner.plan(step)
        assert plan == twin.plan(step)
        if expected is not None:
            assert len(plan.waves) == 1
            assert moves_of(plan) == expected
        check_planner(planner)


@settings(max_examples=30, deadline=None)
@given(
    accesses(),
    st.sampled_from([name for name in EVICTIONS if name not in QUEUES]),
    st.sampled_from([6, 9, (4, 6, 5)]),
    st.sampled_from([0, 3]),
    st.sampled_from(["layer", "model"]),
)
def test_naming_ahead_changes_nothing_where_scores_decide(steps, eviction, slots, host_slots, scope):
    """An access changes the scores of what it demands, and evicts none of that."""
    options = options_of(eviction, slots, host_slots=host_slots, scope=scope)
    planner = build_planner(options, SHAPE)
    at_once = build_planner(dataclasses.replace(options, lag=0), SHAPE)
    for step in steps:
        assert planner.plan(step) == at_once.plan(step)


@settings(max_examples=20, deadline=None)
@given(accesses(), st.sampled_from(EVICTIONS), st.lists(st.integers(0, 11), max_size=20))
def test_fills_and_smaller_caches_leave_the_list_anew(steps, eviction, filled):
    options = options_of(eviction, 8)
    planner = build_planner(options, SHAPE)
    for number, step in enumerate(steps):
        if number < len(filled):
            planner.fill(ExpertKey(0, filled[number]))
        if number == len(steps) // 2:
            planner.resize(dataclasses.replace(options, slots_per_layer=6))
        expected = by_the_rule(planner, step)
        plan = planner.plan(step)
        assert expected is None or moves_of(plan) == expected
        check_planner(planner)


@settings(max_examples=30, deadline=None)
@given(
    accesses(),
    st.sampled_from(EVICTIONS),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 8)), max_size=20),
)
def test_lists_that_were_asked_for_change_no_plan(steps, eviction, filled):
    """A list is kept until its layer's next access, unless a fill or a resize changes who holds slots."""
    options = options_of(eviction, 8, host_slots=4)
    planner, twin = build_planner(options, SHAPE), build_planner(options, SHAPE)
    for number, step in enumerate(steps):
        for layer in range(SHAPE.layers):
            planner.next_places(layer)
        if number < len(filled):
            assert planner.fill(ExpertKey(*filled[number])) == twin.fill(ExpertKey(*filled[number]))
        if number == len(steps) // 2:
            for each in (planner, twin):
                each.resize(dataclasses.replace(options, slots_per_layer=7))
        assert planner.plan(step) == twin.plan(step)
        assert planner.next_places(step.layer) == twin.next_places(step.layer)


def test_named_victims_are_hits_until_they_are_taken():
    planner = build_planner(options_of("lru", 6), SHAPE)
    for pair in ([0, 1], [2, 3], [4, 5]):
        planner.plan(Access(0, *count_demands(np.array([pair]), 12)))
    assert [place.key for place in planner.next_places(0)] == [0, 1, 2, 3]
    plan = planner.plan(Access(0, *count_demands(np.array([[1, 7]]), 12)))
    assert (plan.hits, plan.misses) == (1, 1)
    assert plan.waves[0].fetches[0].evicted == ExpertKey(0, 0)
    assert [place.key for place in planner.next_places(0)] == [2, 3, 4, 5]


def test_free_slots_are_named_first():
    planner = build_planner(options_of("lru", 6), SHAPE)
    planner.plan(Access(0, *count_demands(np.array([[0, 1], [2, 9]]), 12)))
    assert [(place.slot, place.key) for place in planner.next_places(0)] == [(4, None), (5, None), (0, 0), (1, 1)]


def test_a_batch_that_the_list_is_too_short_for_chooses_at_once():
    planner = build_planner(options_of("lru", 8), SHAPE)
    for pairs in ([[0, 1], [2, 3]], [[4, 5], [6, 7]]):
        planner.plan(Access(0, *count_demands(np.array(pairs), 12)))
    assert [place.key for place in planner.next_places(0)] == [0, 1, 2, 3]
    access = Access(0, *count_demands(np.array([[0, 1], [2, 8], [9, 10]]), 12))  # one victim is left, three are missed
    assert by_the_rule(planner, access) is None
    plan = planner.plan(access)
    assert sorted(fetch.evicted.expert for fetch in plan.waves[0].fetches if fetch.evicted) == [3, 4, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lag": 2}, "lag=2 must be 0 or 1"),
        ({"lag": True}, "lag=True must be 0 or 1"),
        ({"lag": 1, "prefetch": 2}, "lag=1 takes prefetch=0, not 2"),
        ({"lag": 1, "on_miss": "auto"}, "lag=1 takes on_miss='fetch', not 'auto'"),
    ],
)
def test_options_that_contradict_the_lag(options, message):
    with pytest.raises(ConfigError, match=message):
        CacheOptions(**options)


def test_the_lag_fills_in_what_it_takes():
    config = OffloadConfig(lag=1, slots_per_layer=6)
    assert (config.prefetch, config.on_miss, config.cache().lag) == (0, "fetch", 1)
    with pytest.raises(ConfigError, match="lag=1 takes on_miss"):
        OffloadConfig(lag=1, on_miss="cpu")


def test_the_lag_is_recorded_and_older_traces_have_none(tmp_path):
    lagged = options_of("sieve")
    assert CacheOptions.from_dict(json.loads(json.dumps(lagged.to_dict()))) == lagged
    assert "lag" not in dataclasses.replace(lagged, lag=0).to_dict()
    trace = dataclasses.replace(read_trace(DATA), options=CacheOptions("sieve", slots_per_layer=8, lag=1))
    write_trace(tmp_path / "lagged.npz", trace)
    assert read_trace(tmp_path / "lagged.npz").options == trace.options


def loss(recording: Recording, eviction: str, slots: int) -> float:
    at_once, ahead = (
        replay(recording, CacheOptions(eviction, slots_per_layer=slots, lag=lag)).stats.hit_rate for lag in (0, 1)
    )
    return at_once - ahead


@pytest.fixture(scope="module")
def start_of_real() -> Recording:
    trace = read_trace(DATA)
    start = slice(150)
    return Recording(
        dataclasses.replace(
            trace, experts=trace.experts[start], request=trace.request[start], step=trace.step[start],
            token=None, probs=None, predicted=None,
        )
    )  # fmt: skip


@pytest.mark.parametrize("slots", [8, 16])
@pytest.mark.parametrize("eviction", QUEUES)
def test_queues_lose_little_on_real_routing(start_of_real, eviction, slots):
    assert abs(loss(start_of_real, eviction, slots)) < 0.003


@pytest.mark.slow
@pytest.mark.parametrize("slots", [8, 16])
@pytest.mark.parametrize("eviction", ["aged-lfu", *QUEUES])
def test_little_is_lost_on_all_of_the_real_routing(eviction, slots):
    assert abs(loss(Recording(read_trace(DATA)), eviction, slots)) < 0.003


@given(accesses())
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_hits_of_others_leave_a_list_of_scores_as_it_is(eviction: str, steps: list[Access]) -> None:
    """So a host need not name the same slots again (`EvictionPolicy.ranks_by_score`)."""
    planner = build_planner(options_of(eviction), SHAPE)
    for access in steps:
        cache, before = planner.layers[access.layer], planner.next_places(access.layer)
        demanded = {cache.keys[demand.expert] for demand in access.demands}
        plan = planner.plan(access)
        if cache.policy.ranks_by_score and not plan.misses and demanded.isdisjoint(place.key for place in before):
            assert planner.next_places(access.layer) == before
    assert cache.policy.ranks_by_score == (eviction not in QUEUES)
