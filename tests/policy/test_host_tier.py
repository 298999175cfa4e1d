"""The RAM tier decides as a scan of all its copies would, whatever the policy, the scope and the sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmoe.config import EVICTIONS, ON_MISS, CacheOptions
from offmoe.policy import host_tier
from offmoe.policy.host_tier import DISTANCE
from offmoe.policy.planner import Planner, build_planner
from offmoe.profile import MissCosts
from offmoe.types import Access, CacheShape, Demand, Plan, count_demands
from tests.policy.invariants import check_planner

SHAPE = CacheShape(experts=(7, 7, 12), top_k=(2, 2, 2), expert_bytes=(10, 10, 20))


class Scan:
    """What one layer's copies are worth, worked out anew for every decision."""

    def __init__(self, cache):
        self.cache, self.policy = cache, cache.policy
        self.free, self.held = sorted(cache.host_tier.slots, reverse=True), {}

    def on_access(self, keys):
        pass

    def on_evict(self, key):
        pass

    def holds(self, key):
        return key in self.held

    def worth(self, key, threshold):
        own = self.policy.score(key)
        if not self.cache.is_resident(key):
            return own
        return threshold - DISTANCE * (own - threshold) if own > threshold else threshold

    def place(self, key):
        if key in self.held:
            return self.held[key], False
        if self.free:
            slot = self.free.pop()
        else:
            victim = self.cache.residency.victim(())
            threshold = 0.0 if victim is None else self.policy.score(victim)
            least, dropped = min((self.worth(k, threshold), k) for k in self.held)
            if least >= self.worth(key, threshold):
                return None, True
            slot = self.held.pop(dropped)
        self.held[key] = slot
        return slot, True


def scanning(options: CacheOptions, shape: CacheShape) -> Planner:
    planner = build_planner(options, shape)
    for cache in planner.layers:
        if cache.host_tier is not None:
            scan: Any = Scan(cache)
            cache.host_tier = scan
    return planner


def options_of(eviction, scope, host_slots, prefetch, shape=SHAPE, slots=3):
    popular = tuple(tuple(float(e * 7 % 4) for e in range(n)) for n in shape.experts) if eviction == "static" else None
    return CacheOptions(eviction, scope, slots, prefetch, popularity=popular, host_slots=host_slots)


def routed(seed: int, steps: int, shape: CacheShape) -> list[Access]:
    """Skewed routing that drifts, a prompt now and then, predictions that are right now and then."""
    chance = np.random.default_rng(seed)
    drift = [chance.standard_normal(n) for n in shape.experts]
    out = []
    for step in range(steps):
        rows = 1 if step % 40 else int(chance.integers(1, 90))
        ids = []
        for layer, n in enumerate(shape.experts):
            drift[layer] = 0.9 * drift[layer] + 0.4 * chance.standard_normal(n)
            score = drift[layer] + 0.5 * chance.standard_normal((rows, n))
            ids.append(np.argsort(-score, axis=1)[:, : shape.top_k[layer]])
        for layer, n in enumerate(shape.experts):
            demands, tail = count_demands(ids[layer], n)
            last = layer == shape.layers - 1
            ahead = () if last else (int(ids[layer + 1][0, 0]), int(chance.integers(shape.experts[layer + 1])))
            out.append(Access(layer, demands, tail, tuple(dict.fromkeys(ahead))))
    return out


def decisions(planner: Planner, accesses: list[Access]) -> list[Plan]:
    return [planner.plan(access) for access in accesses]


@settings(max_examples=150)
@given(
    st.integers(0, 10**6),
    st.sampled_from(EVICTIONS),
    st.sampled_from(["layer", "model"]),
    st.sampled_from([1, 2, 5, (0, 3, 9), (4, 0, 12)]),
    st.sampled_from([0, 2, "auto"]),
    st.sampled_from([2, 3, 5]),
    st.sampled_from(ON_MISS),
)
def test_every_decision_is_that_of_a_scan(seed, eviction, scope, host_slots, prefetch, slots, on_miss):
    """Also of experts that the host computes, which the device never holds."""
    options = options_of(eviction, scope, host_slots, prefetch, slots=slots)
    options = replace(options, on_miss=on_miss, miss_costs=MissCosts(10, 5, 10, 15, 2, 1, 1))
    accesses = routed(seed, 12, SHAPE)
    planner, oracle = build_planner(options, SHAPE), scanning(options, SHAPE)
    for access in accesses:
        assert planner.plan(access) == oracle.plan(access)
        check_planner(planner)


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_long_run_with_heaps_that_are_cleared_out(eviction, scope, monkeypatch):
    monkeypatch.setattr(host_tier, "SPARE_ENTRIES", 0)
    shape = CacheShape((40, 40), (4, 4), (1, 1))
    options = options_of(eviction, scope, (16, 20), 1, shape, slots=10)
    planner, accesses = build_planner(options, shape), routed(5, 300, shape)
    assert decisions(planner, accesses) == decisions(scanning(options, shape), accesses)
    check_planner(planner)  # also of the heaps' lengths


def test_a_broken_state_is_found():
    planner = build_planner(options_of("lru", "layer", 2, 0), SHAPE)
    planner.plan(Access(0, (Demand(1, 1, 1), Demand(2, 1, 1)), 1))
    check_planner(planner)
    residency = planner.layers[0].residency
    residency.admit(3, ())
    assert residency.admit(4, (3,)) == (0, 1)  # an eviction that the tier does not hear of
    with pytest.raises(AssertionError):
        check_planner(planner)
