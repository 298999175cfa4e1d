"""Calibration of a tiny model: every figure is there, the time is bounded, and nothing is left open."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from offmoe.api import load
from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.measure import calibrate
from offmoe.storage import read_plan
from tests import tiny


@pytest.fixture
def inspected(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(calibrate, "COPY_BYTES", 1 << 16)
    folder = tiny.save(tiny.build("deepseek_v2"), tmp_path / "model")
    return inspect(folder, OffloadConfig(device="cpu", slots_per_layer=3, prefetch=0))


def test_figures(inspected) -> None:
    said: list[str] = []
    costs = calibrate.calibrate(inspected, 0.0, said.append)
    found = costs.to_dict()
    assert {"h2d_gb_s", "h2d_gb_s_overlapped", "expert_us_landed"} == set(type(costs).__dataclass_fields__) - set(found)
    for name, value in found.items():
        assert value > 0 or name not in ("disk_gb_s", "dense_us_per_token", "ram_gb_s", "disk_gb_s_overlapped"), name
    assert said[0] == "copying"
    assert said[-1] == "decoding with misses"
    assert not [t for t in threading.enumerate() if t.name.startswith("offmoe")]


def test_experts_that_are_computed_with_while_they_arrive(inspected, monkeypatch) -> None:
    monkeypatch.setattr(read_plan, "part_bytes", lambda nbytes: 4096)
    monkeypatch.setattr(calibrate, "last_share", lambda nbytes: 0.25)
    costs = calibrate.calibrate(inspected, 0.0)
    assert costs.expert_us_landed == pytest.approx(costs.expert_us_device / 4, rel=0.01)


def test_decoding_with_misses(inspected) -> None:
    model = load(inspected)
    with model.offload as offload:
        steps = calibrate.Steps(model, inspected)
        found = steps.decode(0.0)
        assert len(found) == calibrate.LEAST_ROUNDS
        assert all(len(step.layers) == inspected.catalog.shape.layers for step in found)
        offload.forget_times()
        before = offload.stats()
        found = steps.decode(0.3)
        counts = offload.stats() - before
        assert counts.hits > 0 < counts.misses
        assert 0 < sum(plan.misses for step in found for _, plan in step.layers) <= counts.misses
        assert sum(step.stall_s for step in found) <= counts.stall_s


def test_steps_compute_with_what_is_in_slots(inspected) -> None:
    model = load(inspected)
    with model.offload:
        steps = calibrate.Steps(model, inspected)
        steps.measure(4, 0.0)
        first = model.offload.stats()
        assert (first.misses, first.prefetched) == (4, 0)  # two experts of two layers, once
        assert first.hits == 4 * (calibrate.LEAST_ROUNDS)
        with steps.resident(1) as step:
            assert step() > 0
        assert (model.offload.stats() - first).misses == 0
        model(input_ids=tiny.prompt(1, 5))
        assert (model.offload.stats() - first).demands > 2 * 4  # its own routing again
