"""Costs that are wrong by known factors, corrected by steps that a clock with the right ones has timed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from offmoe.config import CacheOptions
from offmoe.policy.planner import build_planner
from offmoe.profile import CostModel
from offmoe.simulate.clock import Clock
from offmoe.simulate.fit_costs import TimedStep, corrected
from offmoe.types import Access, CacheShape, single_demands

SHAPE = CacheShape((16,) * 4, (2,) * 4, (10**6,) * 4)
TRUE = CostModel(2.0, 500.0, 4000.0, read_latency_us=200.0, ram_gb_s=5.0, fetch_us=300.0)
LINKED = replace(TRUE, ram_gb_s=None, h2d_gb_s=10.0, expert_us_host=400.0, expert_us_host_overlapped=600.0)


def accesses(steps: int, seed: int) -> list[list[Access]]:
    chance = np.random.default_rng(seed)
    worth = chance.random((4, 16))
    found = []
    for _ in range(steps):
        worth = np.where(chance.random(worth.shape) < 0.7, worth, chance.random(worth.shape))
        top = np.argsort(-worth, axis=1)[:, :2]
        found.append([Access(layer, single_demands(top[layer].tolist(), 16), 1) for layer in range(4)])
    return found


def timed(costs: CostModel, steps: int = 80, seed: int = 0, noise: float = 0.0, **options) -> list[TimedStep]:
    """What a machine of such costs would have done. noise: share of each step's time, on average upwards."""
    planner = build_planner(CacheOptions(**{"slots_per_layer": 5, **options}), SHAPE)
    clock, chance = Clock(costs, SHAPE), np.random.default_rng(1)
    found = []
    for step in accesses(steps, seed):
        began, waited = clock.now_s, clock.stall_s
        layers = tuple((access, planner.plan(access)) for access in step)
        for access, plan in layers:
            clock.add(access, plan, 1)
        longer = float(chance.gamma(2.0, noise / 2)) if noise else 0.0
        took, stall = clock.now_s - began, clock.stall_s - waited
        found.append(TimedStep(layers, took * (1 + longer), stall * (1 + longer)))
    return found


def seconds(costs: CostModel, steps: list[TimedStep]) -> float:
    clock = Clock(costs, SHAPE)
    for step in steps:
        for access, plan in step.layers:
            clock.add(access, plan, 1)
    return clock.now_s


WRONG = [
    {"dense_us_per_token": 2000.0, "expert_us_device": 250.0},
    {"disk_gb_s": 0.7, "read_latency_us": 600.0},
    {"disk_gb_s": 6.0, "read_latency_us": 70.0},
    {"fetch_us": 1500.0},
    {"dense_us_per_token": 6000.0, "expert_us_device": 750.0, "disk_gb_s": 0.8, "fetch_us": 0.0},
]


@pytest.mark.parametrize("on_miss", ["fetch", "cpu", "auto"])
@pytest.mark.parametrize("wrong", WRONG)
def test_later_steps_take_what_they_are_told_to(wrong, on_miss) -> None:
    before, later = timed(TRUE, on_miss=on_miss), timed(TRUE, seed=7, on_miss=on_miss)
    truly = seconds(TRUE, later)
    assert abs(seconds(replace(TRUE, **wrong), later) / truly - 1) > 0.03
    found = corrected(replace(TRUE, **wrong), SHAPE, before)
    assert seconds(found, later) == pytest.approx(truly, rel=0.02)


@pytest.mark.parametrize("wrong", WRONG)
def test_other_caches_take_what_they_are_told_to(wrong) -> None:
    found = corrected(replace(TRUE, **wrong), SHAPE, timed(TRUE))
    for options in ({"slots_per_layer": 9}, {"on_miss": "cpu"}, {"slots_per_layer": 2, "eviction": "lru"}):
        other = timed(TRUE, seed=3, **options)
        assert seconds(found, other) == pytest.approx(seconds(TRUE, other), rel=0.06)


def test_right_costs_stay() -> None:
    found = corrected(TRUE, SHAPE, timed(TRUE))
    for name, value in TRUE.to_dict().items():
        assert found.to_dict()[name] == pytest.approx(value, rel=0.01), name
    assert corrected(TRUE, SHAPE, []) == TRUE


def test_a_few_steps_change_little() -> None:
    slower = replace(TRUE, dense_us_per_token=8000.0, expert_us_device=1000.0)
    ones = [corrected(TRUE, SHAPE, timed(slower, steps=n)).dense_us_per_token for n in (1, 8, 80)]
    assert 4000 < ones[0] < ones[1] < ones[2] < 8100
    assert ones[0] < 6000


def test_one_interruption_says_nothing() -> None:
    steps = timed(TRUE, noise=0.02)
    longest = max(steps, key=lambda step: step.seconds)
    steps[40] = steps[40]._replace(seconds=50 * longest.seconds)
    assert corrected(TRUE, SHAPE, steps).dense_us_per_token == pytest.approx(4000, rel=0.1)


def test_noise_that_only_slows_is_part_of_what_is_to_come() -> None:
    steps = timed(TRUE, steps=200, noise=0.3)
    found = corrected(TRUE, SHAPE, steps)
    assert seconds(found, steps) == pytest.approx(sum(step.seconds for step in steps), rel=0.05)


def test_only_what_was_seen_changes() -> None:
    hits = timed(replace(TRUE, dense_us_per_token=6000.0), steps=120, slots_per_layer=16)[80:]
    assert not any(plan.misses for step in hits for _, plan in step.layers)
    found = corrected(TRUE, SHAPE, hits)
    assert found.dense_us_per_token > 4800
    assert (found.disk_gb_s, found.read_latency_us, found.fetch_us) == (2.0, 200.0, 300.0)


def test_beside_a_device_link_and_host_are_told_apart_from_the_disk() -> None:
    options = {"host_slots": 8, "on_miss": "auto", "miss_costs": LINKED.miss_costs(10**6)}
    before = timed(LINKED, steps=160, **options)
    assert any(plan.on_host for step in before for _, plan in step.layers)
    wrong = replace(LINKED, h2d_gb_s=30.0, expert_us_host=100.0, expert_us_host_overlapped=150.0)
    found = corrected(wrong, SHAPE, before)
    later = timed(LINKED, seed=3, **options)
    assert abs(seconds(wrong, later) / seconds(LINKED, later) - 1) > 0.05
    assert seconds(found, later) == pytest.approx(seconds(LINKED, later), rel=0.03)
    assert found.miss_costs(10**6).host_us > 200
