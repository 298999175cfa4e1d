"""Whole models through the GPU kernels, in Triton's interpreter; run by test_triton.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offmoe
from offmoe.compute.kernels import device
from offmoe.compute.kernels.device import DeviceKernels
from offmoe.compute.kernels.routing_log import Verdict
from offmoe.device.backend import CpuBackend
from tests import quantized, tiny
from tests.device_cases import interpret_quickly
from tests.doubles import count_verdicts

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
SAME = 2e-5
"""Relative L2 of logits computed in float32."""
ROUNDED = 5e-3
"""The same where the bitwise mode rounds decoded weights to the dtype of their scales, and the kernels do not."""


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> None:
    interpret_quickly()


@pytest.fixture(autouse=True)
def _a_cpu_that_passes_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "has_device_kernels", True)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The method that each call of the kernels took."""
    calls: list[str] = []
    for name in ("by_pair", "by_group"):
        method = getattr(DeviceKernels, name)

        def call(*given: Any, name: str = name, method: Any = method) -> torch.Tensor:
            if given[0]._launch is device.launch_kernel:  # else kernels are compiled, not launched
                calls.append(name)
            return method(*given)

        monkeypatch.setattr(DeviceKernels, name, call)
    return calls


def logits(folder: Path, exactness: str, prompt: torch.Tensor, slots: int = 8) -> torch.Tensor:
    """Logits of a prompt, and of one token alone."""
    model = offmoe.from_pretrained(
        folder, device="cpu", on_miss="fetch", slots_per_layer=slots, exactness=exactness, dtype=torch.float32
    )
    with model.offload, torch.no_grad():
        outputs = [model(input_ids=ids).logits for ids in (prompt, prompt[:1, :1])]
    return torch.cat([out.flatten() for out in outputs])


def error(folder: Path, prompt: torch.Tensor, slots: int = 8) -> float:
    """Relative L2 between the two modes."""
    right = logits(folder, "bitwise", prompt)
    return ((logits(folder, "numeric", prompt, slots) - right).norm() / right.norm()).item()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_bf16_experts(tmp_path: Path, family: str, launched: list[str]) -> None:
    """gpt-oss has inputs first, gate and up in turns, biases, and an activation of its own."""
    folder = tiny.save(tiny.build(family, torch.bfloat16, **SIZES), tmp_path / "dense")
    assert error(folder, tiny.prompt()) < SAME
    assert launched == ["by_group", "by_pair"]


def test_several_waves(tmp_path: Path, launched: list[str]) -> None:
    folder = tiny.save(tiny.build("mixtral", torch.float16, **SIZES), tmp_path / "dense")
    assert error(folder, tiny.prompt(1, 3), slots=2) < SAME
    assert len(launched) > 2


@pytest.mark.parametrize(
    ("kind", "family"), [("ct-int4", "mixtral"), ("ct-int8", "mixtral"), ("mxfp4", "gpt_oss"), ("fp8", "mixtral")]
)
def test_published_formats(
    tmp_path: Path, kind: str, family: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from slots as they are stored."""
    monkeypatch.setattr(quantized, "BLOCK", 32)
    monkeypatch.setitem(quantized.FORMATS["fp8"][1], "weight_block_size", [32, 32])
    for name in ("ct-int4", "ct-int8"):
        monkeypatch.setitem(quantized.FORMATS[name][1]["config_groups"]["group_0"]["weights"], "group_size", 32)
    folder, _ = quantized.save(tmp_path, family, kind, **SIZES)
    assert error(folder, tiny.prompt(1, 2)) < ROUNDED
    assert launched


def test_what_the_kernels_do_not_read_is_computed_by_torch(
    tmp_path: Path, launched: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = quantized.save(tmp_path, "mixtral", "awq", **SIZES)
    assert error(folder, tiny.prompt(1, 2)) == 0
    assert not launched
    assert "1 MoE layers are computed by torch's operators: the device kernels do not read awq" in caplog.text


def test_a_layer_without_a_hit_whose_misses_the_host_computes(
    tmp_path: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first wave is empty."""
    monkeypatch.setattr(CpuBackend, "unified_memory", False)
    folder = tiny.save(tiny.build("mixtral", torch.float32, **SIZES), tmp_path / "dense")
    model = offmoe.from_pretrained(
        folder, device="cpu", on_miss="cpu", slots_per_layer=2, exactness="numeric", prefetch=0
    )
    with model.offload:
        prompt = tiny.prompt(1, 3)
        ours = model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        stats = model.offload.stats()
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=8)
    with model.offload:
        assert torch.equal(ours, model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False))
    assert stats.host_computed
    assert launched


@pytest.mark.parametrize("host_slots", [8, 2])
def test_steps_without_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_slots: int) -> None:
    """Kernels place misses, gather them from RAM, and compute; the host answers what is on disk, in another thread."""
    monkeypatch.setattr(CpuBackend, "unified_memory", False)
    monkeypatch.setattr(CpuBackend, "pin", lambda backend, address, nbytes: True)
    taken = count_verdicts(monkeypatch)
    folder = tiny.save(tiny.build("mixtral", torch.float32, **SIZES), tmp_path / "dense")
    prompt, greedy = tiny.prompt(1, 3), {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    model = offmoe.from_pretrained(
        folder, device="cpu", lag=1, slots_per_layer=4, exactness="numeric", host_slots=host_slots
    )
    with model.offload:
        ours = model.generate(prompt, **greedy)
    monkeypatch.undo()
    model = offmoe.from_pretrained(folder, device="cpu")
    with model.offload:
        assert torch.equal(ours, model.generate(prompt, **greedy))
    assert taken.total() == 7
    assert Verdict.ASSIGNED in taken
