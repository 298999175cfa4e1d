"""How experts are divided into launches of the GPU kernels: what is resident does not wait for what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offmoe
from offmoe.compute.kernels import device as device_kernels
from offmoe.compute.kernels.device import Pairs
from offmoe.transfer.engine import TransferEngine
from tests import tiny
from tests.late_device.extension import LateKind
from tests.late_device.kernels import LateKernels

pytestmark = pytest.mark.skipif(not device_kernels.available(), reason="no Triton")


@pytest.fixture
def launches(kind: LateKind, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What happens in order: the slots of each launch, and minus one for each wait for an expert on its way."""
    done: list[list[int]] = []
    ready = TransferEngine.ready

    class Noted(LateKernels):
        def compute(self, pairs: Pairs, hidden: torch.Tensor) -> torch.Tensor:
            done.append(list(pairs.slots))
            return super().compute(pairs, hidden)

    def noted(engine: TransferEngine, *slots: int) -> None:
        done.extend([[-1] for slot in slots if engine.coming(slot) is not None])
        ready(engine, *slots)

    monkeypatch.setattr("offmoe.compute.gpu_compute.DeviceKernels", Noted)
    monkeypatch.setattr(TransferEngine, "ready", noted)
    kind.has_kernels = True
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.build("qwen3_moe", num_hidden_layers=1, mlp_only_layers=[], num_experts=16, num_experts_per_tok=4)
    return tiny.save(model, tmp_path_factory.mktemp("launches") / "model")


def load(folder: Path, **options: Any) -> tiny.Model:
    return offmoe.from_pretrained(folder, device="late", exactness="numeric", on_miss="fetch", prefetch=0, **options)


def test_hits_of_a_token_are_launched_before_its_misses_have_come(folder: Path, launches: list[list[int]]) -> None:
    """D14: hits were computed only when the last miss had landed."""
    model = load(folder, slots_per_layer=12)
    with model.offload, torch.no_grad():
        model(tiny.prompt(1, 1).to("late"))
        for seed in range(4, 40):
            launches.clear()
            before = model.offload.stats()
            model(tiny.prompt(1, 1, seed=seed).to("late"))
            new = model.offload.stats() - before
            if new.misses and new.hits:
                break
        assert new.misses
        assert new.hits
    waits = launches.count([-1])
    assert len(launches[0]) == new.hits, "the first launch"
    assert launches[1 : 1 + waits] == [[-1]] * waits
    assert waits == new.misses == len(launches[1 + waits])
    assert len(launches) == waits + 2


def test_resident_experts_of_a_prompt_take_one_launch(folder: Path, launches: list[list[int]]) -> None:
    """D9: 16 experts took two launches of eight, each with a table and a copy of all inputs in another order."""
    model = load(folder, slots_per_layer=16)
    with model.offload, torch.no_grad():
        for seed in range(3):
            model(tiny.prompt(2, 60, seed=seed).to("late"))
        launches.clear()
        model(tiny.prompt(2, 60).to("late"))
    assert [len(slots) for slots in launches] == [16]


def test_a_launch_has_a_bound(folder: Path, launches: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """D1b: rows between the kernels are memory that no plan counts."""
    model = load(folder, slots_per_layer=16)
    with model.offload, torch.no_grad():
        for seed in range(3):
            model(tiny.prompt(2, 60, seed=seed).to("late"))
        want = model(tiny.prompt(2, 60).to("late")).logits.cpu()
        monkeypatch.setattr(device_kernels, "LAUNCH_BYTES", 100 * 4 * (24 + 32))
        launches.clear()
        got = model(tiny.prompt(2, 60).to("late")).logits.cpu()
    assert 5 <= len(launches) <= 8, "480 pairs, at most 100 per launch"
    assert (got - want).norm() <= 2e-5 * want.norm()
