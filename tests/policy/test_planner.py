"""The planner: every demand gets a slot, nothing that is needed is forgotten, the same accesses give the same plans."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmoe.config import EVICTIONS, ON_MISS, CacheOptions
from offmoe.errors import ConfigError
from offmoe.policy.eviction.lru import LRU
from offmoe.policy.planner import Planner, build_planner
from offmoe.profile import MissCosts
from offmoe.simulate.replay import Recording, replay
from offmoe.trace.trace import read_trace
from offmoe.types import Access, CacheShape, CacheStats, Demand, ExpertKey, count_demands
from tests.policy.invariants import check_planner

SHAPE = CacheShape(experts=(6, 6, 8), top_k=(2, 2, 2), expert_bytes=(10, 10, 20))
FAST_LINK, FAST_HOST = MissCosts(1, 5, 50, 60, 9, 1), MissCosts(50, 5, 1, 2, 1, 1, handoff_us=1)
COSTS = (FAST_LINK, FAST_HOST, MissCosts(10, 5, 10, 15, 2, 1))


def access(layer, experts, predicted=(), tail=1):
    return Access(layer, tuple(Demand(e, 1, 1) for e in sorted(experts)), tail, tuple(predicted))


@st.composite
def accesses(draw):
    out = []
    for _ in range(draw(st.integers(1, 25))):
        rows = draw(st.sampled_from([1, 1, 1, 4, 70]))
        for layer in range(3):
            n = SHAPE.experts[layer]
            ids = draw(
                st.lists(
                    st.lists(st.integers(0, n - 1), min_size=2, max_size=2, unique=True), min_size=rows, max_size=rows
                )
            )
            demands, tail = count_demands(np.array(ids), n)
            ahead = SHAPE.experts[layer + 1] if layer < 2 else 0
            predicted = draw(st.lists(st.integers(0, ahead - 1), max_size=4, unique=True)) if ahead else []
            out.append(Access(layer, demands, tail, tuple(predicted)))
    return out


@settings(max_examples=60, deadline=None)
@given(
    accesses(),
    st.sampled_from(EVICTIONS),
    st.sampled_from(["layer", "model"]),
    st.sampled_from([1, 2, 3, 6, (2, 4, 8), (1, 1, 0), (0, 3, 0)]),
    st.sampled_from([0, 1, 3, "auto"]),
    st.sampled_from(ON_MISS),
    st.sampled_from([None, *COSTS]),
)
def test_slots_hold_what_plans_say(steps, eviction, scope, slots, prefetch, on_miss, costs):
    """Mirror every fetch into a dict of slots: each wave must find each of its experts where the plan says. Scratch
    slots are empty again after each access. A pool may have fewer slots than there are layers, down to two in all."""
    scope = "model" if isinstance(slots, tuple) and 0 in slots else scope
    popularity = tuple(tuple(float(e % 4) for e in range(n)) for n in SHAPE.experts) if eviction == "static" else None
    options = CacheOptions(eviction, scope, slots, prefetch, popularity=popularity, on_miss=on_miss)
    if costs is not None:
        options = dataclasses.replace(options, miss_costs=costs, host_slots=3)
    planner, twin = build_planner(options, SHAPE), build_planner(options, SHAPE)
    held: dict[int, ExpertKey] = {}
    ahead: tuple[ExpertKey, ...] = ()
    stats = CacheStats.for_layers(3)
    for step in steps:
        plan = planner.plan(step)
        assert plan == twin.plan(step)
        served = []
        assert costs is not None or not plan.on_host
        for wave in plan.on_host + plan.waves:
            for fetch in wave.fetches:
                assert held.get(fetch.slot) == fetch.evicted or fetch.slot >= planner.num_slots
                assert fetch.key not in held.values()
                held[fetch.slot] = fetch.key
            for expert, slot in wave.experts:
                assert held[slot] == (step.layer, expert)
                served.append(expert)
                if slot >= planner.num_slots and costs is not None:
                    del held[slot]
        assert sorted(served) == [d.expert for d in step.demands]
        assert {f.key for wave in plan.on_host + plan.waves for f in wave.fetches if f.read_ahead} <= {*ahead}
        ahead = plan.read_ahead
        assert all(key.layer == step.layer + 1 and key.expert in step.predicted for key in ahead)
        assert not {*ahead} & {*held.values()}
        for fetch in plan.prefetches:
            if fetch.key.layer == step.layer + 1:
                assert fetch.key.expert in step.predicted
                assert not fetch.read
            else:  # what the host has computed, and RAM holds
                assert fetch.key in [f.key for wave in plan.on_host for f in wave.fetches]
                assert not fetch.read
            assert held.get(fetch.slot) == fetch.evicted
            held[fetch.slot] = fetch.key
        through = [f for wave in plan.on_host + plan.waves for f in wave.fetches if f.slot >= planner.num_slots]
        assert len(through) == plan.host_computed <= plan.misses + plan.pending
        assert all(f.slot < planner.num_slots + planner.num_scratch for f in through)
        for slot in range(planner.num_slots, planner.num_slots + planner.num_scratch):
            held.pop(slot, None)
        assert len(held) <= planner.num_slots
        assert plan.hits + plan.pending + plan.misses == len(step.demands)
        check_planner(planner)
        stats.add(plan, SHAPE)
    if on_miss == "cpu" and prefetch == 0 and costs is None:
        assert stats.evictions == 0
    assert stats.demands == sum(len(s.demands) for s in steps)
    assert stats.h2d_bytes == sum(s.h2d_bytes for s in stats.by_layer)
    assert stats.prefetched_used <= stats.prefetched


def test_a_layer_never_forgets_what_it_needs_now():
    planner = build_planner(CacheOptions("lru", slots_per_layer=2), SHAPE)
    planner.plan(access(0, [0, 1]))
    plan = planner.plan(access(0, [0, 2]))
    assert (plan.hits, plan.misses) == (1, 1)
    assert plan.waves[0].fetches[0].evicted == ExpertKey(0, 1)


def test_waves_start_with_the_residents_and_leave_the_best():
    planner = build_planner(CacheOptions(slots_per_layer=4), CacheShape((8,), (2,), (1,)))
    for _ in range(5):
        planner.plan(access(0, [6, 7]))
    demands = tuple(Demand(e, 9 if e in (1, 3) else 1, 9 if e in (1, 3) else 1) for e in range(8))
    plan = planner.plan(Access(0, demands, 64))
    assert [e for e, _ in plan.waves[0].experts] == [6, 7]
    assert len(plan.waves) > 1
    after = planner.plan(access(0, [1, 3]))
    assert after.misses == 0


def test_residents_that_make_room_are_computed_first():
    planner = build_planner(CacheOptions("lru", slots_per_layer=4), CacheShape((9,), (2,), (1,)))
    for experts in ([0, 1], [2, 3]):
        planner.plan(access(0, experts))
    plan = planner.plan(access(0, range(9), tail=64))
    in_place = [slot for _, slot in plan.waves[0].experts]
    turns = [fetch.slot for wave in plan.waves[1:] for fetch in wave.fetches]
    assert len(in_place) == 4
    assert in_place[: len(set(turns))] == list(dict.fromkeys(turns))


def test_pending_counts_once():
    planner = build_planner(CacheOptions(slots_per_layer=3, prefetch=2), SHAPE)
    plan = planner.plan(access(0, [0, 1], predicted=[4, 5]))
    assert plan.read_ahead == (ExpertKey(1, 4), ExpertKey(1, 5))
    assert not plan.prefetches, "what is on disk takes no slot before it is demanded"
    first, second = planner.plan(access(1, [4, 5])), planner.plan(access(1, [4, 5]))
    assert all(fetch.read_ahead for fetch in first.waves[0].fetches)
    assert (first.pending, first.hits, first.misses) == (2, 0, 0)
    assert (second.pending, second.hits, second.misses) == (0, 2, 0)


def test_what_is_read_ahead_is_for_the_next_access_alone():
    planner = build_planner(CacheOptions(slots_per_layer=3, prefetch=2), SHAPE)
    planner.plan(access(0, [0, 1], predicted=[4, 5]))
    planner.plan(access(1, [0, 4]))
    plan = planner.plan(access(1, [0, 5]))
    assert (plan.pending, plan.misses) == (0, 1)
    assert not plan.waves[0].fetches[0].read_ahead


def test_what_is_in_ram_goes_into_a_slot_ahead():
    planner = build_planner(CacheOptions("lru", slots_per_layer=2, prefetch=2, host_slots=4), SHAPE)
    for pair in ([0, 1], [2, 3], [4, 5]):
        planner.plan(access(1, pair))
    plan = planner.plan(access(0, [0, 1], predicted=[2, 0]))
    assert len(plan.prefetches) + len(plan.read_ahead) == 2
    assert all(not fetch.read for fetch in plan.prefetches)
    assert plan.prefetches
    after = planner.plan(access(1, [0, 2]))
    assert (after.hits, after.pending, after.misses) == (0, 2, 0)


def test_no_prediction_is_wanted_where_everything_is_resident():
    planner = build_planner(CacheOptions(slots_per_layer=6, prefetch=2), SHAPE)
    for pair in ([0, 1], [2, 3], [4, 5]):
        planner.plan(access(1, pair))
    assert not planner.wants_prediction(1)
    assert planner.wants_prediction(2)
    assert not planner.wants_prediction(3)


@pytest.mark.parametrize(
    ("scope", "slots", "message"),
    [
        ("layer", (2, 0, 2), "slots_per_layer=0 for MoE layer 1.*scope='model'"),
        ("model", (0, 1, 0), "1 slots in all: at least 2"),
        ("model", (0, 0, 0), "0 slots in all: at least 2"),
        ("model", (2, -1, 2), "non-negative|positive"),
    ],
)
def test_too_few_slots_are_refused(scope, slots, message):
    with pytest.raises(ConfigError, match=message):
        build_planner(CacheOptions(scope=scope, slots_per_layer=slots), SHAPE)


@pytest.mark.parametrize(("scope", "slots"), [("layer", 1), ("model", (1, 1, 0)), ("model", (0, 0, 2))])
def test_fewer_slots_than_top_k_compute_in_waves(scope, slots):
    planner = build_planner(CacheOptions(scope=scope, slots_per_layer=slots), CacheShape((6,) * 3, (4,) * 3, (1,) * 3))
    for _ in range(3):
        for layer in range(3):
            plan = planner.plan(access(layer, [0, 2, 3, 5]))
            assert sorted(e for wave in plan.waves for e, _ in wave.experts) == [0, 2, 3, 5]
            assert len(plan.waves) > 1


def test_the_best_stays_in_a_pool_of_two():
    """An expert of every token beside experts of one token each: LRU would never hit."""
    shape = CacheShape((40,) * 4, (1,) * 4, (1,) * 4)
    planner = build_planner(CacheOptions(scope="model", slots_per_layer=(2, 0, 0, 0)), shape)
    hits = 0
    for token in range(40):
        for layer in range(4):
            hits += planner.plan(access(layer, [7 if layer == 0 else token])).hits
    assert hits >= 37


def test_one_value_per_layer_is_asked_for():
    with pytest.raises(ConfigError, match="2 values, but the model has 3"):
        build_planner(CacheOptions(slots_per_layer=(2, 2)), SHAPE)


@settings(max_examples=60, deadline=None)
@given(
    accesses(),
    st.sampled_from(EVICTIONS),
    st.sampled_from(["layer", "model"]),
    st.sampled_from([1, 2, 6, (0, 3, 8)]),
    st.sampled_from([0, 2]),
    st.sampled_from(ON_MISS),
    st.sampled_from([3, (1, 1, 0)]),
)
def test_ram_holds_what_plans_say(steps, eviction, scope, host_slots, prefetch, on_miss, slots):
    """Mirror what is read into a dict of RAM slots: what a plan copies without reading must be there."""
    popularity = tuple(tuple(float(e % 4) for e in range(n)) for n in SHAPE.experts) if eviction == "static" else None
    scope = "model" if isinstance(slots, tuple) else scope
    options = CacheOptions(
        eviction, scope, slots, prefetch, popularity=popularity, host_slots=host_slots, on_miss=on_miss
    )
    planner, bare = build_planner(options, SHAPE), build_planner(dataclasses.replace(options, host_slots=0), SHAPE)
    held: dict[int, ExpertKey] = {}
    stats = CacheStats.for_layers(3)
    for step in steps:
        plan, without = planner.plan(step), bare.plan(step)
        if not prefetch:  # what is in RAM takes slots ahead
            assert plan.hits == without.hits, "RAM has no say in what the device holds"
        for fetch in [f for wave in plan.waves for f in wave.fetches] + list(plan.prefetches):
            if not fetch.read:
                assert held[fetch.host] == fetch.key
            elif fetch.host is not None:
                assert fetch.key not in held.values()
                held[fetch.host] = fetch.key
        assert len(held) <= planner.num_host_slots
        check_planner(planner)
        stats.add(plan, SHAPE)
    for_nothing = sum(
        (s.prefetched - s.prefetched_used) * n for s, n in zip(stats.by_layer, SHAPE.expert_bytes, strict=True)
    )
    assert stats.disk_bytes <= stats.h2d_bytes + for_nothing


def test_ram_keeps_what_the_device_does_not_have():
    planner = build_planner(CacheOptions(slots_per_layer=2, host_slots=2), CacheShape((6,), (2,), (1,)))
    for pair in ([0, 1], [2, 3], [0, 1], [2, 3]):
        reads = [fetch.read for fetch in planner.plan(access(0, pair)).waves[0].fetches]
    assert reads == [False, True], "four experts in two slots and two in RAM: what has no copy there was on the device"


@pytest.mark.parametrize(
    ("slots", "host_slots", "most"),
    [(8, 8, 0.55), pytest.param(6, 12, 0.36, marks=pytest.mark.slow), pytest.param(8, 24, 0.1, marks=pytest.mark.slow)],
)
def test_ram_on_real_routing(slots, host_slots, most):
    """Share of gpt-oss-20b's misses that go to the disk; the best that could write back would need 0.30 at 8 and 8."""
    trace = read_trace(Path(__file__).parents[1] / "data" / "gptoss20b_6req.npz")
    stats = replay(trace, CacheOptions(slots_per_layer=slots, host_slots=host_slots)).stats
    assert stats.disk_bytes < most * stats.h2d_bytes


def test_host_slots_are_checked():
    with pytest.raises(ConfigError, match="host_slots has 2 values, but the model has 3"):
        build_planner(CacheOptions(host_slots=(2, 2)), SHAPE)
    with pytest.raises(ConfigError, match="host_slots=-1"):
        CacheOptions(host_slots=-1)
    options = CacheOptions(host_slots=(1, 0, 2))
    assert CacheOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_what_gets_no_slot_passes_through_scratch_slots_by_turns():
    planner = build_planner(CacheOptions(slots_per_layer=2, on_miss="cpu"), CacheShape((9,), (2,), (1,)))
    assert planner.plan(access(0, [7, 8])).host_computed == 0, "slots were free"
    plan = planner.plan(access(0, [1, 2, 3, 4, 5, 8]))
    assert [wave.experts for wave in plan.waves] == [((8, 1), (1, 2), (2, 3)), ((3, 2), (4, 3)), ((5, 2),)]
    assert (plan.hits, plan.misses, plan.host_computed) == (1, 5, 5)
    assert planner.plan(access(0, [7, 8])).hits == 2
    everything = CacheOptions(slots_per_layer=9, on_miss="auto")
    assert build_planner(everything, CacheShape((9,), (2,), (1,))).num_scratch == 0


def test_a_wide_step_keeps_the_best_without_waves_through_slots():
    planner = build_planner(CacheOptions(slots_per_layer=4, on_miss="auto"), CacheShape((9,), (2,), (1,)))
    for _ in range(5):
        planner.plan(access(0, [6, 7]))
    demands = tuple(Demand(e, 9 if e in (1, 3) else 1, 9 if e in (1, 3) else 1) for e in range(9))
    plan = planner.plan(Access(0, demands, 64))
    assert (plan.hits, plan.misses, plan.host_computed) == (2, 7, 5)
    assert planner.plan(access(0, [1, 3])).misses == 0
    assert planner.plan(access(0, [6, 7])).misses == 0


@pytest.mark.parametrize(
    ("slots", "least"),
    [pytest.param(6, 0.007, marks=pytest.mark.slow), (8, 0.002), pytest.param(16, -0.001, marks=pytest.mark.slow)],
)
def test_choosing_who_gets_a_slot_on_real_routing(slots, least):
    """Points of hit rate over giving everything a slot, on gpt-oss-20b."""
    trace = Recording(read_trace(Path(__file__).parents[1] / "data" / "gptoss20b_6req.npz"))
    rates = {
        how: replay(trace, CacheOptions(slots_per_layer=slots, on_miss=how)).stats.hit_rate for how in ("fetch", "auto")
    }
    assert rates["auto"] - rates["fetch"] > least


@pytest.mark.parametrize(("costs", "on_host"), [(FAST_LINK, 0), (FAST_HOST, 2)])
def test_beside_a_device_the_faster_way_takes_what_is_missed(costs, on_host):
    planner = build_planner(
        CacheOptions(slots_per_layer=4, on_miss="auto", miss_costs=costs), CacheShape((9,), (2,), (10,))
    )
    assert planner.plan(access(0, [1, 2, 3, 4])).host_computed == 0, "slots were free"
    plan = planner.plan(access(0, [1, 5, 6]))
    assert plan.host_computed == sum(len(wave.experts) for wave in plan.on_host) == on_host
    assert [expert for expert, _ in plan.waves[0].experts] == [1] + [5, 6] * (not on_host)


def test_what_the_host_computed_and_will_be_wanted_is_fetched_afterwards():
    options = CacheOptions("lru", slots_per_layer=2, on_miss="auto", miss_costs=FAST_HOST, host_slots=6)
    planner = build_planner(options, CacheShape((6,), (2,), (10,)))
    filled = []
    for _ in range(30):  # a newcomer is always wanted before what it would replace
        for pair in ([0, 1], [2, 3], [2, 3]):
            plan = planner.plan(access(0, pair))
            filled += plan.prefetches
            check_planner(planner)
    assert filled
    assert all(not fetch.read for fetch in filled)
    assert planner.plan(access(0, [2, 3])).pending + planner.plan(access(0, [2, 3])).hits


def test_where_every_expert_has_a_slot_the_host_computes_nothing():
    options = CacheOptions(slots_per_layer=8, on_miss="auto", miss_costs=FAST_HOST)
    planner = build_planner(options, CacheShape((8,), (2,), (10,)))
    assert planner.num_scratch == 0
    for pair in ([0, 1], [6, 7], [0, 7]):
        assert planner.plan(access(0, pair)).on_host == ()
    assert planner.plan(access(0, [0, 7])).hits == 2


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_an_expert_has_one_key_in_every_scope(scope):
    seen = []

    class Watching(LRU):
        def on_access(self, keys, demands, tail):
            seen.append(list(keys))
            super().on_access(keys, demands, tail)

    planner = Planner(SHAPE, CacheOptions("lru", scope, slots_per_layer=3), lambda pool: Watching())
    for layer in range(3):
        planner.plan(access(layer, [1, 5]))
    assert seen == [[1, 5], [7, 11], [13, 17]]
    assert (SHAPE.first_key, SHAPE.num_keys) == ((0, 6, 12), 20)
    experts = [ExpertKey(layer, e) for layer, n in enumerate(SHAPE.experts) for e in range(n)]
    assert [SHAPE.expert(key) for key in range(SHAPE.num_keys)] == experts
    assert dataclasses.replace(SHAPE) == SHAPE, "what was looked up is no part of the shape"
