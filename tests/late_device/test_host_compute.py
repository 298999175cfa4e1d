"""Experts that the host computes beside a device: by the C kernels, at costs that are measured."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import offmoe
from offmoe.compute.compute import ComputeByLayer
from offmoe.compute.cpu_compute import CpuCompute
from offmoe.compute.kernels.library import status
from offmoe.profile import CostModel, MissCosts, Profile
from offmoe.runtime import host_probe
from offmoe.simulate.replay import replay
from offmoe.trace.trace import read_trace
from tests import tiny
from tests.late_device.extension import LateKind

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SAME = 5e-3
"""Relative L2: torch's decoding rounds weights to the dtype of their scales, and the kernels do not."""


@pytest.fixture(autouse=True)
def kernels() -> None:
    if status().library is None:
        pytest.skip(status().message)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("mixtral", **SIZES), tmp_path_factory.mktemp("beside") / "model")


def run(folder: Path, **options: Any) -> tuple[list[torch.Tensor], Any, tiny.Model]:
    """Logits of a prompt and of single tokens; statistics; the model, closed."""
    model = offmoe.from_pretrained(folder, device="late", prefetch=0, dtype=torch.float32, **options)
    with model.offload, torch.no_grad():
        prompts = [tiny.prompt(1, 7), *(tiny.prompt(1, 1, seed=seed) for seed in range(4))]
        logits = [model(prompt.to("late")).logits.cpu() for prompt in prompts]
        return logits, model.offload.stats(), model


def computed_by(model: tiny.Model) -> set[type]:
    compute = model.offload._executor._host._compute
    return {type(part) for part in (compute._by_layer if isinstance(compute, ComputeByLayer) else [compute])}


@pytest.mark.parametrize("experts", ["int4", "int8"])
def test_quantized_experts_are_computed_by_the_c_kernels(
    folder: Path, kind: LateKind, tmp_path: Path, experts: str
) -> None:
    """D2: torch takes 22 to 1,015 ms for an expert that the kernels compute in 0.1 to 6 ms."""
    right, resident, _ = run(folder, experts=experts, slots_per_layer=8)
    path = tmp_path / "run.npz"
    got, stats, model = run(folder, experts=experts, slots_per_layer=2, on_miss="cpu", trace=path)
    assert computed_by(model) == {CpuCompute}
    assert stats.host_computed > 0 == resident.host_computed
    assert all((a - b).norm() <= SAME * b.norm() for a, b in zip(got, right, strict=True))
    trace = read_trace(path)
    assert trace.options is not None
    assert replay(trace, trace.options).stats == stats


def test_what_the_kernels_do_not_compute_is_said(
    folder: Path, kind: LateKind, caplog: pytest.LogCaptureFixture
) -> None:
    right, _, _ = run(folder, slots_per_layer=8)
    got, stats, model = run(folder, slots_per_layer=2, on_miss="cpu", exactness="numeric")
    assert stats.host_computed
    assert CpuCompute not in computed_by(model)
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
    assert "on the host, 2 MoE layers are computed by torch's operators: kernels have no float32" in caplog.text


class Timed:
    """A compute that takes a given time."""

    def __init__(self, us: float) -> None:
        self.us = us


@pytest.mark.parametrize(("measured", "used"), [(150.0, 100.0), (60.0, 100.0), (900.0, 900.0), (10.0, 10.0)])
def test_a_measured_time_replaces_one_that_is_off_by_more_than_two(
    measured: float, used: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        host_probe, "_expert_us", lambda compute, layer, slots, x: measured * (1.0 if len(x) == 1 else 1.6)
    )
    layer: Any = None
    assumed = MissCosts(50, 300, 100, 150, 5, 2)
    compute: Any = Timed(measured)
    costs = host_probe.probed_costs(assumed, compute, layer, range(2), torch.zeros(1, 4))
    assert costs.host_us == used
    assert costs.host_shared_us == used * 1.5
    assert costs.host_token_us == (5 if used == 100 else pytest.approx(used * 0.2))
    assert (costs == assumed) == (used == 100) == (not caplog.text)
    assert (costs.link_us, costs.read_us, costs.device_us) == (50, 300, 2)


def test_the_probe_says_what_it_found_and_the_plan_uses_it(
    folder: Path, kind: LateKind, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    _, _, model = run(folder, experts="int4", slots_per_layer=2)
    costs = model.offload.config.miss_costs
    assumed = MissCosts.assumed(4096)
    assert costs.host_us > 2 * assumed.host_us  # tiny experts take some microseconds of calls, not of bytes
    assert "the host computes one expert in" in caplog.text
    caplog.clear()
    profile = Profile(costs=CostModel(disk_gb_s=1, expert_us_device=1, dense_us_per_token=1, expert_us_host=7.0))
    _, _, model = run(folder, experts="int4", slots_per_layer=2, profile=profile)
    assert model.offload.config.miss_costs.host_us == 7.0
    assert "the host computes one expert" not in caplog.text
