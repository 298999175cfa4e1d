"""Predictions: arithmetic by hand, and the same speeds as the simulator, which plays every access."""

from __future__ import annotations

from typing import Any

import pytest

from offmoe.budget.host import HostPlan
from offmoe.budget.memory_plan import MemoryPlan
from offmoe.budget.predict import (
    OPERATIONS_PER_EXPERT,
    READ_LATENCY_US,
    ExpertForm,
    Rates,
    predict,
    scaled,
)
from offmoe.config import OffloadConfig
from offmoe.device.machines import parse_machine
from offmoe.profile import CostModel, Profile
from offmoe.simulate.decode_prices import OPERATIONS_PER_LAYER, OPERATIONS_PER_MOE_LAYER, OPERATIONS_PER_TOKEN
from offmoe.simulate.expect import expect
from offmoe.types import DISK, HOST, CacheShape

GB = 1e9


def plan(slots: tuple[int, ...], ram: tuple[int, ...] | None = None, offloaded: int = 0, where: str = DISK):
    host = None if ram is None else HostPlan(0, 0, 0, ram)
    parts = ("budget", "dense", "slots", "kv", "staging", "workspace", "smallest", "max_context")
    nothing: dict[str, Any] = dict.fromkeys(parts, 0)
    return MemoryPlan(
        **nothing,
        slots_per_layer=slots,
        offloaded=offloaded,
        offloaded_in=where if offloaded else None,
        host=host,
    )


def config(slots: int, scope: str = "layer", on_miss: str = "fetch", costs: CostModel | None = None, nbytes: int = 0):
    miss_costs = None if costs is None else costs.miss_costs(nbytes)
    return OffloadConfig(scope=scope, on_miss=on_miss, slots_per_layer=slots, miss_costs=miss_costs, prefetch=0)


def test_one_layer_by_hand() -> None:
    """Top-1 of 4 experts with 1 slot: a quarter of the tokens hit, the others read 1 GB at 2 GB/s and compute it."""
    shape = CacheShape((4,), (1,), (10**9,))
    costs = CostModel(disk_gb_s=2.0, expert_us_device=100_000, dense_us_per_token=50_000)
    found = predict(shape, config(1), plan((1,)), costs)
    assert found.hit_rate == pytest.approx(0.25)
    assert found.most_tokens_per_s == pytest.approx(1 / 0.15)
    assert found.tokens_per_s == pytest.approx(1 / (0.25 * 0.15 + 0.75 * (0.05 + 0.5 + 0.1)))
    assert found.bound_by == "disk"


def test_missed_experts_arrive_while_residents_compute() -> None:
    """Top-2 of 2 experts with 1 slot: one hit of 0.4 s hides what it can of a read of 0.5 s."""
    shape = CacheShape((2,), (2,), (10**9,))
    costs = CostModel(disk_gb_s=2.0, expert_us_device=400_000, dense_us_per_token=0)
    assert predict(shape, config(1), plan((1,)), costs).tokens_per_s == pytest.approx(1 / (0.5 + 0.4))
    slow = CostModel(disk_gb_s=2.0, expert_us_device=600_000, dense_us_per_token=0)
    assert predict(shape, config(1), plan((1,)), slow).tokens_per_s == pytest.approx(1 / 1.2)


@pytest.mark.parametrize(("where", "seconds"), [(HOST, 0.25), (DISK, 0.5)])
def test_dense_layers_elsewhere_are_read_in_every_pass(where: str, seconds: float) -> None:
    shape = CacheShape((2,), (1,), (10**9,))
    costs = CostModel(disk_gb_s=2.0, expert_us_device=0, dense_us_per_token=100_000, h2d_gb_s=4.0)
    found = predict(shape, config(2), plan((2,), (0,), 10**9, where), costs)
    assert found.tokens_per_s == found.most_tokens_per_s == pytest.approx(1 / (0.1 + seconds))


def test_a_recorded_hit_rate_replaces_uniform_routing() -> None:
    shape = CacheShape((4,), (1,), (10**9,))
    costs = CostModel(disk_gb_s=2.0, expert_us_device=0, dense_us_per_token=0)
    found = predict(shape, config(1), plan((1,)), costs, hit_rate=0.8)
    assert found.hit_rate == pytest.approx(0.8)
    assert found.tokens_per_s == pytest.approx(1 / (0.2 * 0.5))


SHAPES = [(8, 2, 50_000_000), (64, 4, 3_000_000), (128, 8, 2_000_000)]


@pytest.mark.parametrize(("experts", "top_k", "nbytes"), SHAPES)
@pytest.mark.parametrize("share", [0.2, 0.6])
@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("ram", [None, 0.0, 1.0])
def test_as_fast_as_the_simulator_says(
    experts: int, top_k: int, nbytes: int, share: float, scope: str, ram: float | None
) -> None:
    """128 tokens drawn at random, planned and priced one by one, against the closed form."""
    slots, layers = max(top_k, round(experts * share)), 4
    shape = CacheShape((experts,) * layers, (top_k,) * layers, (nbytes,) * layers)
    costs = CostModel(
        disk_gb_s=2.0,
        expert_us_device=nbytes / 1e4 if ram is None else nbytes / 3e5,
        dense_us_per_token=2000.0,
        h2d_gb_s=None if ram is None else 20.0,
        read_latency_us=100.0,
        ram_gb_s=5.0 if ram is None else None,
    )
    in_ram = None if ram is None else (round(experts * ram),) * layers
    options = OffloadConfig(
        scope=scope, slots_per_layer=slots, prefetch=0, on_miss="fetch", host_slots=in_ram[0] if in_ram else 0
    )
    simulated = expect(shape, options.cache(), Profile(costs=costs))
    found = predict(shape, options, plan((slots,) * layers, in_ram), costs)
    assert found.most_tokens_per_s == pytest.approx(simulated.bound, rel=0.01)
    assert found.hit_rate == pytest.approx(simulated.uniform_hit_rate, abs=0.09)
    assert found.tokens_per_s == pytest.approx(simulated.uniform, rel=0.15)


@pytest.mark.parametrize(("experts", "top_k", "nbytes"), SHAPES)
@pytest.mark.parametrize("on_miss", ["cpu", "auto"])
def test_as_fast_as_the_simulator_says_where_the_host_computes(
    experts: int, top_k: int, nbytes: int, on_miss: str
) -> None:
    slots, layers = max(top_k, round(experts * 0.4)), 4
    shape = CacheShape((experts,) * layers, (top_k,) * layers, (nbytes,) * layers)
    costs = CostModel(2.0, nbytes / 3e5, 2000.0, h2d_gb_s=20.0, expert_us_host=nbytes / 2e4)
    options = OffloadConfig(
        slots_per_layer=slots,
        prefetch=0,
        on_miss=on_miss,
        host_slots=experts,
        miss_costs=costs.miss_costs(nbytes),
        scope="layer",
    )
    simulated = expect(shape, options.cache(), Profile(costs=costs))
    found = predict(shape, options, plan((slots,) * layers, (experts,) * layers), costs)
    assert found.tokens_per_s == pytest.approx(simulated.uniform, rel=0.12)
    assert found.tokens_per_s <= found.most_tokens_per_s


FORM = ExpertForm(
    nbytes=10**8,
    weights=5e7,
    by_kernels=False,
    is_decoded=False,
    itemsize=2,
    dense_bytes=10**9,
    layers=10,
    moe_layers=10,
)
RATES = Rates("a test", dense_gb_s=10.0, torch_gb_s=5.0, kernel_gb_s=20.0, disk_gb_s=1.0, operation_us=1.0)


def test_costs_of_a_form() -> None:
    costs = RATES.costs(FORM)
    operations = OPERATIONS_PER_TOKEN + 10 * (OPERATIONS_PER_LAYER + OPERATIONS_PER_MOE_LAYER)
    assert costs.dense_us_per_token == pytest.approx(1e5 + operations)
    assert costs.expert_us_device == pytest.approx(2e4 + OPERATIONS_PER_EXPERT)
    assert (costs.disk_gb_s, costs.read_latency_us, costs.h2d_gb_s) == (1.0, READ_LATENCY_US, None)
    assert costs.expert_us_landed is not None
    assert costs.expert_us_landed < costs.expert_us_device
    by_kernels = RATES.costs(FORM._replace(by_kernels=True, is_decoded=True))
    assert by_kernels.expert_us_device == pytest.approx(5e3 + OPERATIONS_PER_EXPERT)
    dense = RATES.costs(FORM._replace(dense_by_kernels=True))
    assert dense.dense_us_per_token == pytest.approx(5e4 + operations)
    decoded = RATES.costs(FORM._replace(is_decoded=True))
    assert decoded.expert_us_device == pytest.approx(5e7 * 2e-3 + 2e4 + OPERATIONS_PER_EXPERT)
    assert decoded.expert_us_landed is None


def test_measured_costs_of_other_sizes() -> None:
    costs = CostModel(2.0, 400.0, 1000.0, expert_us_host=800.0, expert_us_landed=40.0)
    quarter = scaled(costs, 400, 100)
    assert (quarter.expert_us_device, quarter.expert_us_host, quarter.expert_us_landed) == (100.0, 200.0, 10.0)
    assert (quarter.disk_gb_s, quarter.dense_us_per_token, quarter.expert_us_host_4) == (2.0, 1000.0, None)


def test_rates_of_a_machine_by_name() -> None:
    gpu, cpu = (Rates.of_machine(parse_machine(name)) for name in ("rtx-3060+ddr4-3200-64g", "ddr4-3200-64g+hdd"))
    assert gpu.dense_gb_s == pytest.approx(270)
    assert gpu.link_gb_s == pytest.approx(24, rel=0.01)
    assert gpu.host_gb_s == pytest.approx(30.7, rel=0.01)
    assert gpu.assumed == ("a disk of kind nvme-gen3",)
    assert (cpu.link_gb_s, cpu.host_gb_s, cpu.disk_gb_s) == (None, None, 0.2)
    assert cpu.torch_gb_s == pytest.approx(30.7, rel=0.01)


def test_everything_in_json_says_that_it_is_predicted() -> None:
    found = predict(CacheShape((4,), (1,), (10,)), config(1), plan((1,)), CostModel(1.0, 1.0, 1.0)).to_dict()
    assert all(key.startswith("predicted_") for key in found)
