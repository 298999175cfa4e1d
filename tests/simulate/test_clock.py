"""The clock of the simulator, on plans small enough to count by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offmoe.config import CacheOptions
from offmoe.io_limits import LEAST_PART_BYTES, STOP_BYTES
from offmoe.policy.planner import build_planner
from offmoe.profile import CostModel
from offmoe.simulate.clock import Clock
from offmoe.types import Access, CacheShape, Demand

SHAPE = CacheShape((8, 8), (2, 2), (1000, 1000))
COSTS = CostModel(disk_gb_s=0.001, expert_us_device=100.0, dense_us_per_token=400.0)  # 1 ms a fetch, 200 us a layer


def access(layer, experts, predicted=(), tokens=1):
    return Access(layer, tuple(Demand(e, tokens, tokens) for e in experts), tokens, tuple(predicted))


def price(accesses, prefetch=0, costs=COSTS, rows=1, **options):
    options = CacheOptions(slots_per_layer=4, prefetch=prefetch, **options)
    planner, clock = build_planner(options, SHAPE), Clock(costs, SHAPE)
    for one in accesses:
        clock.add(one, planner.plan(one), rows)
    return clock


def test_a_hit_costs_computing_only():
    again = price([access(0, [1, 2])] * 2)
    once = price([access(0, [1, 2])])
    assert again.now_s - once.now_s == pytest.approx(0.4e-3)
    assert again.stall_s == once.stall_s


def test_misses_wait_for_the_one_way_in_and_computing_overlaps():
    clock = price([access(0, [1, 2])])
    assert clock.stall_s == pytest.approx(1e-3 + 0.9e-3)  # the first expert computes while the second arrives
    assert clock.now_s == pytest.approx(0.2e-3 + 2e-3 + 0.1e-3)


def test_later_waves_are_read_while_earlier_ones_compute():
    eight = price([access(0, range(8))], costs=CostModel(0.001, expert_us_device=1000.0, dense_us_per_token=0.0))
    assert eight.now_s == pytest.approx(1e-3 + 8e-3)  # computing hides every read but the first


def test_a_prefetch_travels_while_others_compute():
    plain = price([access(0, [1]), access(1, [5])])
    ahead = price([access(0, [1], predicted=[5]), access(1, [5])], prefetch=1)
    assert ahead.stall_s == pytest.approx(plain.stall_s - 0.3e-3)  # an expert and the dense part of layer 1 cover it


def test_a_demand_goes_before_prefetches_that_have_not_started():
    wrong = price([access(0, [1], predicted=[5, 6, 7]), access(1, [4])], prefetch=3)
    plain = price([access(0, [1]), access(1, [4])])
    assert wrong.stall_s == pytest.approx(plain.stall_s + 0.7e-3)  # one had started 0.3 ms ago, two had not


def test_a_read_for_nothing_costs_what_is_under_way():
    nbytes = 10 * STOP_BYTES
    shape = CacheShape((8, 8), (2, 2), (nbytes, nbytes))
    costs = CostModel(disk_gb_s=nbytes / 1e6, expert_us_device=100.0, dense_us_per_token=400.0)  # 1 ms an expert
    stalls = []
    for prefetch in (0, 1):
        planner, clock = build_planner(CacheOptions(slots_per_layer=4, prefetch=prefetch), shape), Clock(costs, shape)
        for step in (access(0, [1], predicted=[5]), access(1, [4])):
            clock.add(step, planner.plan(step), 1)
        stalls.append(clock.stall_s)
    assert stalls[1] == pytest.approx(stalls[0] + 0.1e-3)


def test_a_large_expert_is_computed_with_while_it_arrives():
    nbytes = 16 * LEAST_PART_BYTES
    shape = CacheShape((8,), (2,), (nbytes,))
    whole = CostModel(nbytes / 1e6, expert_us_device=400.0, dense_us_per_token=0.0, ram_gb_s=nbytes / 1e6)
    for costs, tokens, us in (
        (whole, 1, 1000 + 250 + 400),  # a quarter of it is still to be copied when it has been read
        (replace(whole, expert_us_landed=100.0), 1, 1000 + 250 + 100),
        (replace(whole, expert_us_landed=100.0), 3, 1000 + 250 + 3 * 400),
    ):
        planner, clock = build_planner(CacheOptions(slots_per_layer=4), shape), Clock(costs, shape)
        step = access(0, [1], tokens=tokens)
        clock.add(step, planner.plan(step), tokens)
        assert clock.now_s == pytest.approx(us * 1e-6)
        assert clock.stall_s == pytest.approx((us - 400 * tokens) * 1e-6)


def test_a_prefetch_that_has_not_started_is_promoted():
    both = price([access(0, [1], predicted=[5, 6]), access(1, [5, 6])], prefetch=2)
    assert both.stall_s == pytest.approx(1e-3 + 0.7e-3 + 0.9e-3)


def test_the_slower_of_disk_and_link_counts():
    linked = CostModel(1.0, 0.0, 0.0, h2d_gb_s=0.001, read_latency_us=500.0)
    assert price([access(0, [1])], costs=linked).now_s == pytest.approx(1.5e-3)


def test_every_row_is_computed():
    assert price([access(0, [1], tokens=10)], rows=10).now_s == pytest.approx(2e-3 + 1e-3 + 1e-3)


def test_a_slot_in_ram_is_filled_by_a_copy_that_the_next_read_does_not_wait_for():
    copied = CostModel(disk_gb_s=0.001, expert_us_device=0.0, dense_us_per_token=0.0, ram_gb_s=0.002)
    assert price([access(0, [1, 2])], costs=copied).now_s == pytest.approx(2e-3 + 0.5e-3)


def test_asking_for_a_fetch_takes_time_from_computing():
    asked = CostModel(disk_gb_s=0.001, expert_us_device=100.0, dense_us_per_token=400.0, fetch_us=50.0)
    warm, one = access(0, [1, 2, 3, 4]), access(0, [1, 5])
    before, after = (price(steps, costs=asked).now_s for steps in ([warm], [warm, one]))
    assert after - before == pytest.approx(0.2e-3 + 1e-3 + 0.1e-3)  # it would wait for the fetch anyway
    fast = CostModel(disk_gb_s=1000.0, expert_us_device=100.0, dense_us_per_token=400.0, fetch_us=50.0)
    before, after = (price(steps, costs=fast).now_s for steps in ([warm], [warm, one]))
    assert after - before == pytest.approx(0.2e-3 + 0.05e-3 + 0.2e-3, rel=1e-4)


def test_what_passes_through_scratch_costs_what_a_fetch_does():
    first, then = access(0, [1, 2, 3, 4]), access(0, [5, 6])
    fetched, passed = (price([first, then], on_miss=how) for how in ("fetch", "cpu"))
    assert passed.now_s == pytest.approx(fetched.now_s)
    again = price([first, then, then], on_miss="cpu")
    assert again.now_s - passed.now_s == pytest.approx(0.2e-3 + 2e-3 + 0.1e-3)


def test_the_host_computes_while_the_link_is_busy():
    linked = CostModel(1.0, 10.0, 0.0, h2d_gb_s=0.001, expert_us_host=300.0, expert_us_host_overlapped=600.0)
    costs = linked.miss_costs(1000)
    assert (costs.link_us, costs.host_us, costs.host_shared_us) == (1000.0, 300.0, 600.0)
    warm, miss = access(0, [1, 2, 3, 4]), access(0, [1, 5])
    options = {"costs": linked, "on_miss": "cpu", "miss_costs": costs}
    alone = price([warm, miss], **options).now_s - price([warm], **options).now_s
    assert alone == pytest.approx(50e-6 + 300e-6)  # handing over and computing; the hit is done meanwhile
