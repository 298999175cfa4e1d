"""An expert that is stored otherwise than the others of its layer: the bits of stock, and a slot that holds it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import offmoe
from offmoe.budget.inspect import inspect
from offmoe.compute.kernels.library import status
from offmoe.config import OffloadConfig
from offmoe.device.backend import CpuBackend
from offmoe.errors import CheckpointError
from offmoe.pack.pack import pack, weight_format
from offmoe.simulate.replay import replay
from offmoe.storage.checkpoint import INDEX_FILE
from offmoe.trace.trace import read_trace
from tests import quantized, tiny
from tests.native import installed

LAYER, EXPERT = 1, 5
STEM = f"model.layers.{LAYER}.block_sparse_moe.experts.{EXPERT}"
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64}
PROMPT = tiny.prompt(3, 17)

Edit = Callable[[Path], None]


def cast(names: str, dtype: torch.dtype) -> Edit:
    """Stores some matrices of the expert in another dtype, with values that bf16 could not hold."""

    def edit(folder: Path) -> None:
        changed: dict[str, torch.Tensor | None] = {}
        for name in names.split():
            tensor = tiny.tensor(folder, f"{STEM}.{name}.weight").to(dtype)
            changed[f"{STEM}.{name}.weight"] = tensor + torch.rand(tensor.shape).to(dtype) * 1e-3
        tiny.edit(folder, changed)

    return edit


def all_gates(folder: Path) -> None:
    """Every gate of the layer is fp32, every up bf16, and both become one parameter."""
    for expert in range(tiny.NUM_EXPERTS):
        name = f"model.layers.{LAYER}.block_sparse_moe.experts.{expert}.w1.weight"
        tiny.edit(folder, {name: tiny.tensor(folder, name).float() + 1e-3})


EDITS: dict[str, Edit] = {
    "one expert in fp32": cast("w1 w2 w3", torch.float32),
    "one expert in fp16": cast("w1 w2 w3", torch.float16),
    "its gate in fp32": cast("w1", torch.float32),
    "its down in fp64": cast("w2", torch.float64),
    "all gates in fp32": all_gates,
}


def logits(model: tiny.Model) -> list[torch.Tensor]:
    with torch.no_grad():
        out = [model(PROMPT).logits, model(PROMPT[:1, :1]).logits]
    return [*out, model.generate(PROMPT[:1], max_new_tokens=8, min_new_tokens=8, do_sample=False)]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_another_dtype(tmp_path: Path, edit: Edit, dtype: torch.dtype) -> None:
    """Each tensor is cast to the dtype to compute in, not to its neighbors' dtype before."""
    folder = tiny.save(tiny.build("mixtral", torch.bfloat16), tmp_path / "model")
    edit(folder)
    wanted = logits(tiny.comparable(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)))
    for options in ({"slots_per_layer": 3}, {"slots_per_layer": 5, "scope": "model", "prefetch": 2}):
        model = offmoe.from_pretrained(folder, dtype=dtype, trace=tmp_path / "run.npz", **options)
        with model.offload:
            found = logits(model)
            stats = model.offload.stats()
        assert_same(found, wanted)
        trace = read_trace(tmp_path / "run.npz")
        assert trace.options is not None
        assert replay(trace, trace.options).stats == stats


def test_a_slot_holds_the_largest_expert(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral", torch.bfloat16), tmp_path / "model")
    before = inspect(folder, OffloadConfig(device="cpu", slots_per_layer=3))
    cast("w1 w2 w3", torch.float32)(folder)
    after = inspect(folder, OffloadConfig(device="cpu", slots_per_layer=3))
    sizes = [expert.slot for expert in after.needs.experts]
    assert sizes[LAYER] == 2 * sizes[0] == 2 * before.needs.experts[LAYER].slot
    assert after.plan.slots - before.plan.slots == 3 * sizes[0]
    assert after.shape == before.shape, "the bytes of a fetch are those of the usual expert"
    assert after.needs.experts[LAYER].read > before.needs.experts[LAYER].read


def without_expert(name: str, tensor: torch.Tensor) -> bool:
    return quantized.is_quantized(name, tensor) and STEM not in name and f"layers.{LAYER}.mlp.experts.5." not in name


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("fp8", "qwen3_moe"),
        ("ct-int4", "mixtral"),
        ("ct-int4-asym", "qwen3_moe"),
        ("awq", "mixtral"),
        ("gptq-int8-desc-act", "qwen3_moe"),
        ("nf4", "mixtral"),
        ("nf4-nested", "qwen3_moe"),
    ],
)
def test_left_unquantized_in_a_quantized_layer(tmp_path: Path, kind: str, family: str) -> None:
    folder, dense = quantized.save(tmp_path, family, kind, which=without_expert)
    wanted = logits(tiny.comparable(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)))
    model = offmoe.from_pretrained(folder, dtype=torch.bfloat16, slots_per_layer=3, exactness="bitwise")
    with model.offload:
        assert_same(logits(model), wanted)


def test_experts_of_two_bit_widths(tmp_path: Path) -> None:
    """compressed-tensors with a group of its own for one expert."""
    four, eight = (quantized.save(tmp_path / k, "mixtral", k, **SIZES) for k in ("ct-int4", "ct-int8"))
    changed: dict[str, torch.Tensor | None] = {}
    for name in ("w1", "w2", "w3"):
        for part in ("packed", "scale", "shape"):
            changed[f"{STEM}.{name}.weight_{part}"] = tiny.tensor(eight[0], f"{STEM}.{name}.weight_{part}")
        single = {f"{STEM}.{name}.weight": tensor_of(eight[1], f"{STEM}.{name}.weight")}
        replace_single(four[1], single)
    tiny.edit(four[0], changed)
    config = json.loads((four[0] / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = {
        **quantized.ct_config(8, True)["config_groups"]["group_0"],
        "targets": [f"re:.*layers.{LAYER}.*experts.{EXPERT}\\..*"],
    }
    (four[0] / "config.json").write_text(json.dumps(config))
    wanted = logits(tiny.comparable(AutoModelForCausalLM.from_pretrained(four[1], dtype=torch.bfloat16)))
    model = offmoe.from_pretrained(four[0], dtype=torch.bfloat16, slots_per_layer=3, exactness="bitwise")
    with model.offload:
        assert_same(logits(model), wanted)


def tensor_of(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[name]


def replace_single(folder: Path, change: dict[str, torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors") | change
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def packed_but_for_one(folder: Path, **sizes: Any) -> Path:
    """A checkpoint that `offmoe pack` wrote, in which one expert is as it was before."""
    source = tiny.save(tiny.build("mixtral", torch.bfloat16, **SIZES, **sizes), folder / "source")
    pack(source, folder / "packed", weight_format("int4", group=32))
    index = json.loads((folder / "packed" / INDEX_FILE).read_text())["weight_map"]
    for name in ("w1", "w2", "w3"):
        parts = [key for key in index if key.startswith(f"{STEM}.{name}.")]
        assert len(parts) == 3
        tiny.edit(folder / "packed", dict.fromkeys(parts))
        tiny.edit(folder / "packed", {f"{STEM}.{name}.weight": tiny.tensor(source, f"{STEM}.{name}.weight")})
    return folder / "packed"


@installed
def test_kernels_compute_the_others(tmp_path: Path) -> None:
    """Every token takes all experts, so that rounding cannot change which ones it takes."""
    folder = packed_but_for_one(tmp_path, num_experts_per_tok=tiny.NUM_EXPERTS)
    catalog = inspect(folder, OffloadConfig(device="cpu", exactness="numeric")).catalog
    assert list(catalog.layers[LAYER].unlike) == [EXPERT]
    assert all(layer.cpu_slot for layer in catalog.layers)
    exact, found = (
        offmoe.from_pretrained(folder, slots_per_layer=tiny.NUM_EXPERTS, exactness=exactness, dtype=torch.float32)
        for exactness in ("bitwise", "numeric")
    )
    with exact.offload, found.offload:
        for ours, wanted in zip(logits(found)[:2], logits(exact)[:2], strict=True):
            assert 0 < relative(ours, wanted) < 0.02


def test_the_host_computes_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a device with memory of its own: the same values, whoever computes an expert, in another order of sums."""
    monkeypatch.setattr(CpuBackend, "unified_memory", False)
    folder = packed_but_for_one(tmp_path)

    def ours(on_miss: str, slots: int) -> tuple[list[torch.Tensor], int]:
        model = offmoe.from_pretrained(
            folder, slots_per_layer=slots, exactness="numeric", on_miss=on_miss, prefetch=0, dtype=torch.bfloat16
        )
        with model.offload:
            prompts = [tiny.prompt(1, 2, seed) for seed in range(4)]
            return [model(ids).logits for ids in prompts], model.offload.stats().host_computed

    wanted, found = ours("fetch", tiny.NUM_EXPERTS), ours("cpu", 2)
    assert found[1] > 0
    for got, right in zip(found[0], wanted[0], strict=True):
        assert relative(got, right) <= (0 if status().library is None else 0.02)


@pytest.mark.parametrize("experts", ["int4", "int8"])
def test_quantizing_takes_every_expert_as_it_is(tmp_path: Path, experts: str) -> None:
    folder = tiny.save(tiny.build("mixtral", torch.bfloat16, **SIZES), tmp_path / "model")
    cast("w1 w2 w3", torch.float32)(folder)
    packed = tmp_path / "packed"
    pack(folder, packed, weight_format(experts))
    models = [
        offmoe.from_pretrained(folder, slots_per_layer=3, experts=experts, exactness="numeric"),
        offmoe.from_pretrained(packed, slots_per_layer=3, exactness="numeric"),
    ]
    found = []
    for model in models:
        with model.offload:
            found.append(logits(model))
    assert_same(found[0], found[1])


def test_another_shape_is_still_an_error(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral", torch.bfloat16), tmp_path / "model")
    tiny.edit(folder, {f"{STEM}.w1.weight": torch.zeros(32, 48)})
    with pytest.raises(CheckpointError, match=rf"{STEM}.w1.weight.*\[32, 48\].*\[48, 32\]"):
        offmoe.from_pretrained(folder, slots_per_layer=3)
