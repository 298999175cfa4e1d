"""Tuning: the bounds bound every policy, what is fitted helps elsewhere too, processes change nothing."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmoe.config import EVICTIONS, CacheOptions
from offmoe.errors import CapacityError, ConfigError
from offmoe.policy.planner import build_planner
from offmoe.profile import CostModel
from offmoe.simulate.replay import Recording, belady, belady_with_bypass, replay, shuffled
from offmoe.simulate.search import search
from offmoe.simulate.sweep import (
    Settings,
    affordable,
    capacities,
    evaluate,
    fit_quotas,
    gain_of_doubling,
    gap_closed,
    grid,
    knee,
    popularity,
    rank,
    split_requests,
    sweep,
)
from offmoe.trace.trace import Trace, read_trace
from offmoe.types import CacheShape

DATA = Path(__file__).parents[1] / "data"
COSTS = CostModel(disk_gb_s=1.0, expert_us_device=10.0, dense_us_per_token=100.0)


def make(experts, num_experts=6, request=None, expert_bytes=1000):
    experts = np.asarray(experts, np.int16)
    tokens, layers, k = experts.shape
    shape = CacheShape((num_experts,) * layers, (k,) * layers, (expert_bytes,) * layers)
    request = np.zeros(tokens, np.int32) if request is None else np.asarray(request, np.int32)
    return Trace("test", shape, experts, request, np.arange(tokens, dtype=np.int32))


def random_trace(tokens=120, layers=2, num_experts=8, requests=4, seed=0, same_skew=True):
    """Skewed and sticky routing of top-2."""
    rng = np.random.default_rng(seed)
    popular = rng.random((layers, num_experts)) ** 2 if same_skew else np.ones((layers, num_experts))
    sticky = np.zeros((layers, num_experts))
    rows = []
    for _ in range(tokens):
        sticky = 0.8 * sticky + rng.random((layers, num_experts)) * 0.5
        rows.append(np.argsort(-(popular + sticky), axis=1)[:, :2])
    return make(rows, num_experts, np.repeat(np.arange(requests), tokens // requests))


@pytest.fixture(scope="module")
def real_trace():
    return read_trace(DATA / "gptoss20b_6req.npz")


@pytest.fixture(scope="module")
def part_of_real(real_trace):
    """500 tokens of two layers: enough for what does not depend on depth."""
    few = slice(0, 500)
    shape = CacheShape(real_trace.shape.experts[:2], real_trace.shape.top_k[:2], real_trace.shape.expert_bytes[:2])
    return Trace("part", shape, real_trace.experts[few, 8:10], real_trace.request[few], np.arange(500, dtype=np.int32))


# --- bounds

pairs = st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True), min_size=1, max_size=10)


def most_with_bypass(sequence, capacity):
    """Hits of the best cache that may leave out what was demanded, by exhaustive search."""
    best = {frozenset(): 0}
    for row in sequence:
        need, after = frozenset(row), {}
        for held, hits in best.items():
            worth = hits + len(held & need)
            everything = held | need
            for keep in itertools.combinations(sorted(everything), min(capacity, len(everything))):
                after[frozenset(keep)] = max(after.get(frozenset(keep), -1), worth)
        best = after
    return max(best.values())


@settings(max_examples=50, deadline=None)
@given(pairs, st.integers(2, 4))
def test_belady_with_bypass_is_the_exhaustive_optimum(sequence, capacity):
    rate = belady_with_bypass(make([[row] for row in sequence]), CacheOptions(slots_per_layer=capacity))
    assert round(rate * 2 * len(sequence)) == most_with_bypass(sequence, capacity)


@settings(max_examples=100, deadline=None)
@given(
    pairs,
    st.integers(2, 6),
    st.sampled_from(EVICTIONS),
    st.sampled_from(["layer", "model"]),
)
def test_no_policy_beats_its_bounds(sequence, capacity, eviction, scope):
    trace = make([[row, row[::-1]] for row in sequence])
    options = CacheOptions(eviction, scope, capacity, popularity=popularity(trace) if eviction == "static" else None)
    best = belady(trace, options).hit_rate
    assert replay(trace, options).stats.hit_rate <= best + 1e-12
    assert best <= belady_with_bypass(trace, options) + 1e-12


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([e for e in EVICTIONS if e != "static"]), st.integers(2, 5))
def test_bypass_bounds_long_steps_too(seed, eviction, capacity):
    trace = random_trace(tokens=24, requests=1, seed=seed)
    trace = replace(trace, step=(np.arange(24) // 5).astype(np.int32))
    options = CacheOptions(eviction, slots_per_layer=capacity)
    assert replay(trace, options).stats.hit_rate <= belady_with_bypass(trace, options) + 1e-12


def test_shuffling_keeps_the_tokens_and_loses_the_memory(part_of_real):
    mixed, options = shuffled(part_of_real), CacheOptions("lru", slots_per_layer=8)
    assert sorted(mixed.experts.tolist()) == sorted(part_of_real.experts.tolist())
    assert replay(mixed, options).stats.hit_rate < replay(part_of_real, options).stats.hit_rate - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("slots", [6, 8, 12, 16, 24])
def test_aged_lfu_is_nowhere_below_the_others_on_real_routing(real_trace, slots):
    """Above top_k, where all are alike; popularity of the same trace included."""
    recording = Recording(real_trace)
    rates = {
        o.eviction: replay(recording, o).stats.hit_rate for o in grid(real_trace, [slots], ("aged-lfu", "lru", "sieve"))
    }
    assert rates["aged-lfu"] >= rates["sieve"] >= rates["lru"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("slots", sorted({*range(5, 32)} - {6, 8, 12, 16, 24}))
def test_aged_lfu_is_never_below_lru_at_any_capacity(real_trace, slots):
    rates = {e: replay(real_trace, CacheOptions(e, slots_per_layer=slots)).stats.hit_rate for e in ("lru", "aged-lfu")}
    assert rates["aged-lfu"] >= rates["lru"]


POLICIES = json.loads((DATA / "gptoss20b_policies.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("slots", POLICIES["slots"])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "slots"])
def test_all_policies_agree_with_an_independent_simulator(real_trace, policy, slots):
    """To 0.3 point over the whole trace; it passes protected keys on in its queues, where ours stay."""
    want = POLICIES[policy][POLICIES["slots"].index(slots)]
    options = CacheOptions(policy if policy in EVICTIONS else "lru", slots_per_layer=slots)
    if policy == "belady-bypass":
        rate = belady_with_bypass(real_trace, options)
    else:
        rate = (belady(real_trace, options) if policy == "belady" else replay(real_trace, options).stats).hit_rate
    assert rate == pytest.approx(want, abs=0.003)


# --- replaying


def test_train_and_test_add_up_to_the_replay(part_of_real):
    test = split_requests(part_of_real) or frozenset({int(part_of_real.request[0])})
    options = CacheOptions(slots_per_layer=8)
    outcome = evaluate(Recording(part_of_real), options, Settings(test_requests=test))
    assert outcome.whole.stats == replay(part_of_real, options).stats
    assert outcome.train.tokens + outcome.test.tokens == 500


def test_every_other_request_is_tested_on():
    assert split_requests(make(np.zeros((6, 1, 1)), request=[7, 7, 3, 3, 9, 1])) == {3, 1}
    assert split_requests(make(np.zeros((2, 1, 1)))) == frozenset()


def test_clearing_between_requests_costs_cold_misses():
    trace = random_trace()
    options, recording = CacheOptions(slots_per_layer=8), Recording(trace)
    warm = evaluate(recording, options, Settings()).whole.stats
    cold = evaluate(recording, options, Settings(clear_between_requests=True)).whole.stats
    alone = [replay(Recording(trace, part.steps), options).stats.misses for part in recording.by_request()]
    assert cold.misses == sum(alone) > warm.misses


def test_processes_change_nothing():
    trace = random_trace()
    candidates = grid(trace, [2, 4], ("lru", "static"), ("layer", "model"))
    bounds = [CacheOptions(slots_per_layer=4)]
    steps = []
    here = sweep(trace, candidates, bounds, Settings(COSTS))
    there = sweep(
        trace, candidates, bounds, Settings(COSTS), jobs=2, progress=lambda done, everything: steps.append(done)
    )
    assert there == here
    assert [o.options for o in there[0]] == candidates
    assert steps == list(range(1, 10))


def test_what_does_not_fit_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="has 1 values, but the model has"):
        sweep(random_trace(), [CacheOptions(slots_per_layer=(1,))], jobs=2)


# --- choosing


def test_popularity_sees_the_train_requests_only():
    trace = make([[[0, 1]], [[0, 2]], [[5, 4]]], request=[0, 0, 1])
    assert popularity(trace, frozenset({1})) == ((2.0, 1.0, 1.0, 0.0, 0.0, 0.0),)
    static = grid(trace, [2], ("static",), test_requests=frozenset({1}))[0]
    build_planner(static, trace.shape)
    with pytest.raises(ConfigError, match="another model"):
        build_planner(static, CacheShape((8,), (2,), (1,)))


def test_quotas_go_where_they_are_worth_most():
    """Layer 0 needs two experts for ever, layer 1 goes round six."""
    trace = make([[[0, 1], [2 * t % 6, (2 * t + 1) % 6]] for t in range(60)], request=np.arange(60) // 15)
    test = split_requests(trace)
    outcomes, _ = sweep(trace, grid(trace, range(2, 7), ("lru",)), settings=Settings(test_requests=test))
    fitted = fit_quotas({o.options.slots_per_layer: o for o in outcomes}, 4, trace.shape)
    assert fitted == (2, 6)
    unequal = evaluate(Recording(trace), CacheOptions("lru", slots_per_layer=fitted), Settings(test_requests=test))
    assert unequal.test.stats.hit_rate > outcomes[2].test.stats.hit_rate + 0.2


def test_the_knee_and_what_doubling_adds():
    curve = {2: 0.2, 4: 0.6, 8: 0.7, 16: 0.8}
    assert knee(curve) == 4
    assert gain_of_doubling(curve, 3) == pytest.approx(0.65 - 0.4)
    assert knee({4: 0.5}) == 4
    assert knee({4: 1.0, 8: 1.0}) == 4
    assert gap_closed(0.7, 0.6, 0.8) == pytest.approx(0.5)
    assert gap_closed(0.6, 0.6, 0.6) is None


def test_capacities_cover_the_range():
    assert capacities(CacheShape((32,), (4,), (1,))) == [4, 6, 8, 12, 16, 24, 32]
    assert capacities(CacheShape((8,), (2,), (1,))) == [2, 3, 4, 6, 8]
    assert capacities(CacheShape((1,), (1,), (1,))) == [1]


def test_a_budget_in_bytes():
    shape = CacheShape((8, 8), (2, 2), (100, 300))
    assert affordable(shape, 1999) == 4
    assert affordable(shape, 10**9) == 8
    assert affordable(shape, 799) == 1
    with pytest.raises(CapacityError, match=r"needs 400 bytes.*--scope model --slots-per-layer 1,1"):
        affordable(shape, 399)


def test_bytes_decide_without_costs_and_time_with_them():
    """Predictions that are wrong now and then move more bytes, but most of them while others compute."""
    trace = random_trace(layers=4)
    wrong = np.random.default_rng(0).random(trace.experts.shape) < 0.3
    trace = replace(trace, predicted=np.where(wrong, (trace.experts + 1) % 8, trace.experts).astype(np.int16))
    candidates = grid(trace, [4], ("lru",), prefetches=(0, 2))
    costs = CostModel(disk_gb_s=0.1, expert_us_device=5.0, dense_us_per_token=400.0)
    by_bytes = rank(sweep(trace, candidates)[0])
    by_time = rank(sweep(trace, candidates, settings=Settings(costs))[0])
    assert by_bytes[0].options.prefetch == 0
    assert by_time[0].options.prefetch == 2
    assert by_time[0].whole.stats.stall_s < by_time[1].whole.stats.stall_s


def test_search_tries_everything_at_one_capacity():
    trace = random_trace(same_skew=False)
    trace = replace(trace, predicted=trace.experts)
    test = split_requests(trace)
    found = search(
        trace, Settings(test_requests=test), lambda c, b: sweep(trace, c, b, Settings(test_requests=test)), [2, 3, 4, 8]
    )
    chosen = [outcome.options for outcome in found.ranked]
    assert {o.eviction for o in chosen} == set(EVICTIONS)
    assert {o.scope for o in chosen} == {"layer", "model"}
    assert {o.prefetch for o in chosen} == {0, 1, 2, "auto"}
    assert found.slots in (2, 3, 4, 8)
    assert found.best.train.bytes_per_token == min(o.train.bytes_per_token for o in found.ranked)
    assert found.predictions()["recorded"][1].recall == 1.0
    assert all(o.options.slots_per_layer != found.slots for o in found.others())
    json.dumps(found.best.options.to_dict())


@pytest.mark.parametrize(("recorded", "asked", "tried"), [(4, None, {4, 2, 0}), (0, None, {0}), (0, [0, 3], {3, 0})])
def test_search_tries_less_ram_with_the_best(recorded, asked, tried):
    trace = random_trace()
    trace = replace(trace, options=CacheOptions(slots_per_layer=3, host_slots=recorded))
    found = search(trace, Settings(), lambda c, b: sweep(trace, c, b), [2, 3], slots=3, host_sizes=asked)
    assert {outcome.options.host_slots for outcome in found.ranked} == tried
    assert found.best.options.host_slots == max(tried), "without costs, RAM is free and saves reads"
    by_ram = {
        o.options.host_slots: o.whole
        for o in reversed(found.ranked)
        if o.options == replace(found.best.options, host_slots=o.options.host_slots)
    }
    read = [by_ram[n].disk_bytes_per_token for n in sorted(by_ram)]
    assert read == sorted(read, reverse=True)
    assert len({part.bytes_per_token for part in by_ram.values()}) == 1, "what the device gets does not depend on RAM"


def test_search_says_what_it_cannot_answer():
    trace = random_trace()
    with pytest.raises(ConfigError, match="no predictions"):
        search(trace, Settings(), lambda c, b: sweep(trace, c, b), [4], prefetches=[2])
