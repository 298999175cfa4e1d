"""Quantized dense weights that the C kernels read as they are stored: their values, and the memory they take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import offmoe
from offmoe.budget.inspect import inspect
from offmoe.compute.kernels.library import status
from offmoe.config import OffloadConfig
from offmoe.hf.catalog.dense_view import DenseView
from offmoe.hf.load.kernel_linears import LinearForward, dense_formats
from offmoe.quant.packed_values import values
from offmoe.quant.packed_weight import INT8
from tests import gguf_models, quantized, tiny
from tests.gguf_models import Q, all_of, q4_k_m, q8_0


@pytest.fixture(autouse=True)
def kernels() -> None:
    if status().library is None:
        pytest.skip(status().message)


def numeric(model: Path, **options: Any) -> Any:
    return inspect(model, OffloadConfig(device="cpu", slots_per_layer=3, exactness="numeric", **options))


@contextmanager
def loaded(model: Path, **options: Any) -> Iterator[Any]:
    options = options if "device_memory" in options else {"slots_per_layer": 3, **options}
    ours: Any = offmoe.from_pretrained(model, device="cpu", **options)
    with ours.offload, torch.no_grad():
        yield ours


@pytest.fixture
def groups_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that the kernels have, in the checkpoints of tests/quantized.py."""
    monkeypatch.setattr(quantized, "BLOCK", 32)
    for kind in ("gptq", "awq"):
        monkeypatch.setitem(quantized.FORMATS[kind][1], "group_size", 32)
    monkeypatch.setitem(quantized.FORMATS["fp8"][1], "weight_block_size", [32, 32])
    for kind in ("ct-int4", "ct-int4-asym"):
        weights = quantized.FORMATS[kind][1]["config_groups"]["group_0"]["weights"]
        monkeypatch.setitem(weights, "group_size", 32)


SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}

GGUF = [
    ("mixtral", "Q8_0", q8_0),
    ("mixtral", "Q4_K_M", q4_k_m),
    ("qwen3_moe", "MXFP4", all_of(Q.MXFP4)),
    ("qwen3_moe", "IQ4_XS", all_of(Q.IQ4_XS)),
    ("qwen3_moe", "Q5_0", all_of(Q.Q5_0)),
    ("qwen3_5_moe_text", "Q8_0", q8_0),
    ("deepseek_v3", "Q8_0", q8_0),
]


@pytest.mark.parametrize(("family", "kind", "kinds"), GGUF, ids=[f"{family}-{kind}" for family, kind, _ in GGUF])
def test_values_of_gguf_files_are_exact(tmp_path: Path, family: str, kind: str, kinds: gguf_models.Kinds) -> None:
    """Query and key heads of Mixtral, and value heads of Qwen3.5, stand in another order in the file."""
    written = gguf_models.save(tmp_path, family, kinds, wide=kind in ("Q4_K_M", "IQ4_XS"))
    catalog = numeric(written.file).catalog
    assert catalog.stored
    dense = load_file(written.dense / "model.safetensors")
    for name, weight in catalog.stored.items():
        found = values(weight.read(catalog.view.checkpoint))
        assert torch.equal(found.bfloat16(), dense[name].bfloat16()), name


@pytest.mark.usefixtures("groups_of_32")
def test_values_of_fp8_are_exact(tmp_path: Path) -> None:
    folder, dense = quantized.save(tmp_path, "mixtral", "fp8", **SIZES)
    catalog = numeric(folder).catalog
    stored = load_file(dense / "model.safetensors")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in catalog.stored} >= {"q_proj", "o_proj"}
    for name, weight in catalog.stored.items():
        found = values(weight.read(catalog.view.checkpoint))
        assert torch.equal(found.to(stored[name].dtype), stored[name]), name


@pytest.mark.usefixtures("groups_of_32")
@pytest.mark.parametrize("kind", ["ct-int4", "awq", "gptq"])
def test_formats_that_round_products_are_decoded(tmp_path: Path, kind: str) -> None:
    folder, _ = quantized.save(tmp_path, "mixtral", kind, **SIZES)
    catalog = numeric(folder).catalog
    assert catalog.decoded
    assert not catalog.stored


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_models_compute_with_them(tmp_path: Path, family: str) -> None:
    written = gguf_models.save(tmp_path, family, q8_0, vocab_size=128)
    with loaded(written.file, exactness="bitwise") as model:
        wanted = [model(input_ids=ids).logits.float() for ids in (tiny.prompt(), tiny.prompt()[:1, :1])]
    found = numeric(written.file)
    formats = dense_formats(found.meta, "native", found.catalog.stored)
    assert "lm_head" in formats
    assert not any(name.endswith("gate") or "embed" in name for name in formats)
    with loaded(written.file, exactness="numeric") as model:
        assert {n for n, p in model.named_parameters() if p.is_meta} == {f"{name}.weight" for name in formats}
        assert all(isinstance(model.get_submodule(name).forward, LinearForward) for name in formats)
        for ids, right in zip((tiny.prompt(), tiny.prompt()[:1, :1]), wanted, strict=True):
            got = model(input_ids=ids).logits.float()
            assert (got - right).norm() <= 0.1 * right.norm()


def test_the_plan_counts_them_as_they_are_stored(tmp_path: Path) -> None:
    written = gguf_models.save(tmp_path, "mixtral", q8_0, vocab_size=128)
    decoded, stored = inspect(written.file, OffloadConfig(device="cpu", exactness="bitwise")), numeric(written.file)
    formats = dense_formats(stored.meta, "native", stored.catalog.stored)
    shapes = {name: stored.meta.get_submodule(name).weight.shape for name in formats}
    saved = sum(2 * shape.numel() - formats[name].nbytes(*shape) for name, shape in shapes.items())
    assert saved > 0
    assert decoded.plan.dense - stored.plan.dense == saved
    assert not stored.needs.bytes.loading
    assert sum(
        before.weights - after.weights
        for before, after in zip(decoded.needs.bytes.layers, stored.needs.bytes.layers, strict=True)
    ) == saved - sum(2 * shapes[n].numel() - formats[n].nbytes(*shapes[n]) for n in formats if n == "lm_head")


def test_weights_that_are_not_read_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = gguf_models.save(tmp_path, "mixtral", q8_0, vocab_size=128)
    decode, names = DenseView.decode, list[str]()

    def noted(self: Any, name: str, device: torch.device) -> torch.Tensor:
        names.append(name)
        return decode(self, name, device)

    monkeypatch.setattr(DenseView, "decode", noted)
    with loaded(written.file, exactness="numeric") as model:
        kept = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert set(names) == kept


def test_layers_outside_the_device_are_decoded(tmp_path: Path) -> None:
    """Less memory than the dense part takes: what leaves the device is streamed as before."""
    written = gguf_models.save(tmp_path, "mixtral", q8_0, vocab_size=128)
    with loaded(written.file, exactness="bitwise") as model:
        wanted = model(input_ids=tiny.prompt()).logits.float()
    options: dict[str, Any] = {"exactness": "numeric", "scope": "layer", "max_context": 64}
    budget = inspect(written.file, OffloadConfig(device="cpu", slots_per_layer=3, **options)).plan.smallest
    with loaded(written.file, device_memory=budget, **options) as model:
        plan = model.offload.memory()
        assert plan.offloaded_layers > 0
        assert plan.used <= budget
        got = model(input_ids=tiny.prompt()).logits.float()
    assert (got - wanted).norm() <= 0.1 * wanted.norm()


def test_dense_int8_takes_the_decoded_weights(tmp_path: Path) -> None:
    written = gguf_models.save(tmp_path, "mixtral", q8_0, vocab_size=128)
    dense = load_file(written.dense / "model.safetensors")
    with loaded(written.file, dense="int8") as model:
        packed = model.lm_head.forward._kernel._weight
    assert packed.format == INT8
    assert (values(packed) - dense["lm_head.weight"].float()).norm() <= 0.01 * dense["lm_head.weight"].float().norm()


@pytest.mark.usefixtures("groups_of_32")
def test_a_quantized_checkpoint_is_saved_as_it_is(tmp_path: Path) -> None:
    folder, _ = quantized.save(tmp_path, "mixtral", "fp8", **SIZES)
    with loaded(folder, exactness="numeric") as model:
        assert any(parameter.is_meta for parameter in model.parameters())
        model.save_pretrained(tmp_path / "copy")
    with loaded(folder) as one, loaded(tmp_path / "copy") as other:
        assert torch.equal(one(input_ids=tiny.prompt()).logits, other(input_ids=tiny.prompt()).logits)
