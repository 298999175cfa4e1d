"""Calibration of a tiny model: every figure is there, the time is bounded, and nothing is left open."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from offmoe.api import load
from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.measure import calibrate
from offmoe.pack.pack import pack, weight_format
from tests import tiny


@pytest.fixture
def inspected(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(calibrate, "COPY_BYTES", 1 << 16)
    folder = tiny.save(tiny.build("deepseek_v2"), tmp_path / "model")
    return inspect(folder, OffloadConfig(device="cpu", slots_per_layer=3, prefetch=0))


def test_figures(inspected) -> None:
    stages: list[str] = []
    costs = calibrate.calibrate(inspected, 0.0, stages.append)
    found = costs.to_dict()
    assert {"h2d_gb_s", "expert_us_landed"} == set(type(costs).__dataclass_fields__) - set(found)
    for name, value in found.items():
        assert isinstance(value, int | float)
        assert value > 0 or name not in ("disk_gb_s", "dense_us_per_token", "ram_gb_s"), name
    assert stages[0] == "copying"
    assert stages[-1] == "computing on the host beside reads"
    assert not [t for t in threading.enumerate() if t.name.startswith("offmoe")]


def test_large_plain_experts_are_computed_while_they_arrive(inspected, monkeypatch) -> None:
    monkeypatch.setattr(calibrate, "last_share", lambda nbytes: 0.25)
    costs = calibrate.calibrate(inspected, 0.0)
    assert costs.expert_us_landed == pytest.approx(costs.expert_us_device / 4, rel=0.01)


def test_quantized_experts_are_computed_when_all_of_them_has_landed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(calibrate, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(calibrate, "last_share", lambda nbytes: 0.25)
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "model")
    packed = tmp_path / "packed"
    pack(folder, packed, weight_format("int8"))
    costs = calibrate.calibrate(inspect(packed, OffloadConfig(device="cpu", slots_per_layer=3, prefetch=0)), 0.0)
    assert costs.expert_us_landed is None


def test_passes_compute_with_what_is_in_slots(inspected) -> None:
    model = load(inspected)
    with model.offload:
        fixed = calibrate.FixedRouting(model, inspected)
        fixed.measure(0.0)
        first = model.offload.stats()
        assert fixed.experts == 4  # two of two layers
        assert (first.misses, first.prefetched) == (4, 0)  # each once
        assert first.hits == 4 * calibrate.LEAST_ROUNDS
        fixed.measure(0.0)
        assert (model.offload.stats() - first).misses == 0
        model(input_ids=tiny.prompt(1, 5))
        assert (model.offload.stats() - first).demands > 4 * (calibrate.LEAST_ROUNDS + 1) + 4  # its own routing again
