"""exactness="numeric": the C kernels compute what the bitwise mode computes, up to the order of sums."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import offmoe
from offmoe import api
from offmoe.api import inspect
from offmoe.config import OffloadConfig
from offmoe.errors import CheckpointError, OffmoeError
from offmoe.pack import pack, weight_format
from offmoe.runtime.computing import KernelCompute, TorchCompute
from offmoe.runtime.kernels.library import KernelStatus, status
from offmoe.simulator import replay
from offmoe.trace import read_trace
from tests import quantised, tiny

SIZES: dict[str, object] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
PROMPT = {"input_ids": tiny.prompt()}
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
SAME = 2e-5
"""Relative L2 of logits computed in float32; in bf16 a tiny model's own rounding is 1e-2."""
BLOCK = 32
"""Columns per scale in the quantised checkpoints: the smallest group that kernels have."""


@pytest.fixture(autouse=True)
def kernels() -> None:
    if status().library is None:
        pytest.skip(status().message)


@pytest.fixture
def groups_of_32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(quantised, "BLOCK", BLOCK)
    for kind in ("awq", "gptq", "gptq-int8-desc-act"):
        monkeypatch.setitem(quantised.FORMATS[kind][1], "group_size", BLOCK)
    for kind in ("ct-int4", "ct-int4-asym", "ct-int8"):
        weights = quantised.FORMATS[kind][1]["config_groups"]["group_0"]["weights"]
        monkeypatch.setitem(weights, "group_size", BLOCK)
    return


def run(
    folder: Path, slots: int = 3, dtype: torch.dtype = torch.float32, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt and tokens after it; every recording replays to the statistics of the run."""
    trace = folder.parent / "run.npz"
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=slots, dtype=dtype, trace=trace, **options)
    with model.offload, torch.no_grad():
        logits = model(**PROMPT).logits.float()
        tokens = model.generate(**PROMPT, **GREEDY)
        stats = model.offload.stats()
    recorded = read_trace(trace)
    assert replay(recorded, recorded.options).stats == stats
    return logits, tokens


def error(got: torch.Tensor, right: torch.Tensor) -> float:
    return ((got - right).norm() / right.norm()).item()


def without_kernels(folder: Path, **options: object) -> list[str | None]:
    """Of each MoE layer, why kernels do not compute it."""
    config = OffloadConfig(device="cpu", slots_per_layer=3, exactness="numeric", **options)
    return [layer.without_kernel for layer in inspect(folder, config, dtype=torch.float32).catalog.layers]


def dense(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **overrides: object) -> Path:
    own = {"moe_intermediate_size": 64} if "moe_intermediate_size" in tiny.CONFIGS[family] else {}
    return tiny.save(tiny.build(family, dtype, **{**SIZES, **own, **overrides}), folder / "dense")


FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe")


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_experts(tmp_path: Path, family: str) -> None:
    """Two slots of eight experts: prompts run in waves. gpt-oss has biases, and gate and up interleaved."""
    folder = dense(tmp_path, family)
    assert set(without_kernels(folder)) == {None}
    right, tokens = run(folder, slots=8)
    got, same_tokens = run(folder, slots=2, exactness="numeric")
    assert error(got, right) < SAME
    assert torch.equal(same_tokens, tokens)


@pytest.mark.parametrize("fused", [False, True])
def test_fused_experts_of_transformers_own_format(tmp_path: Path, fused: bool) -> None:
    model = tiny.build("mixtral", torch.bfloat16, **SIZES)
    folder = tiny.save(model, tmp_path / "dense", original_format=not fused)
    assert set(without_kernels(folder)) == {None}
    assert error(run(folder, exactness="numeric")[0], run(folder)[0]) < SAME


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("ct-int4", "mixtral"),
        ("ct-int4", "qwen3_moe"),
        ("ct-int4-asym", "mixtral"),
        ("awq", "mixtral"),
        ("gptq", "mixtral"),
        ("mxfp4", "gpt_oss"),
    ],
)
@pytest.mark.usefixtures("groups_of_32")
def test_published_formats(tmp_path: Path, kind: str, family: str) -> None:
    own = {"moe_intermediate_size": 64} if "moe_intermediate_size" in tiny.CONFIGS[family] else {}
    folder, _ = quantised.save(tmp_path, family, kind, **SIZES, **own)
    assert set(without_kernels(folder)) == {None}
    right, tokens = run(folder)
    got, same_tokens = run(folder, exactness="numeric")
    assert error(got, right) < 5e-3  # decoded weights are rounded to the dtype of the scales, kernels' are not
    assert torch.equal(same_tokens, tokens)
