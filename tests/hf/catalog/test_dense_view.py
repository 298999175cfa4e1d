"""A quantized checkpoint by dense names: what it shows and reads, and every way in which components may not fit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from offmoe.errors import CheckpointError, MissingTensorError, OffmoeError, UnsupportedModelError
from offmoe.hf.catalog.build import build_catalog
from offmoe.hf.catalog.catalog import ExpertCatalog
from offmoe.hf.catalog.dense_view import DenseView
from offmoe.hf.load.config import build_meta, model_class, read_config
from offmoe.storage.checkpoint import Checkpoint
from tests import quantized, tiny
from tests.hf.catalog.test_build import read_expert

EXPERT = "model.layers.1.mlp.experts.5.up_proj"
DENSE = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each format, not to be written to."""
    kinds = dict.fromkeys(quantized.FORMATS, "qwen3_moe") | {"mxfp4": "gpt_oss"}
    overrides: dict[str, dict[str, Any]] = {"mxfp4": {"intermediate_size": 32}}
    return {
        kind: quantized.save(tmp_path_factory.mktemp(kind), family, kind, **overrides.get(kind, {}))[0]
        for kind, family in kinds.items()
    }


@pytest.fixture
def copy(tmp_path: Path, made: dict[str, Path]):
    """copy(kind): a folder of that format to damage."""

    def make(kind: str) -> Path:
        for file in made[kind].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return make


def open_catalog(folder: Path) -> tuple[Checkpoint, ExpertCatalog]:
    config, checkpoint = read_config(folder), Checkpoint.open(folder)
    return checkpoint, build_catalog(checkpoint, build_meta(config, model_class(config)))


def configure(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", quantized.FORMATS)
def test_slots_hold_the_raw_bytes_and_decode_to_the_dense_parameters(made: dict[str, Path], kind: str) -> None:
    checkpoint, catalog = open_catalog(made[kind])
    dense = Checkpoint.open(made[kind].parent / "dense")
    plain = build_catalog(dense, build_meta(read_config(dense.folder), model_class(read_config(dense.folder))))
    assert catalog.formats
    assert catalog.keys < checkpoint.tensors.keys()
    for layer, reference in zip(catalog.layers, plain.layers, strict=True):
        assert layer.decode is not None
        for expert in (0, layer.num_experts - 1):
            views, read = read_expert(checkpoint, layer, expert)
            assert read == layer.records[expert].nbytes
            state = sum(s.nbytes - 4 for s in layer.records[expert].segments if ".quant_state." in s.name)
            assert sum(view.nbytes for view in views.values()) == read - state
            found = layer.decode(views, torch.bfloat16)
            wanted, _ = read_expert(dense, reference, expert)
            assert found.keys() == wanted.keys()
            for name, tensor in found.items():
                assert torch.equal(tensor, wanted[name].bfloat16()), (layer.name, expert, name)
    assert len({id(layer.layout) for layer in catalog.layers}) == 1
    assert catalog.shape.expert_bytes == tuple(layer.records[0].nbytes for layer in catalog.layers)


@pytest.mark.parametrize("kind", quantized.FORMATS)
def test_dense_weights_are_decoded_when_taken(made: dict[str, Path], kind: str) -> None:
    _, catalog = open_catalog(made[kind])
    dense = Checkpoint.open(made[kind].parent / "dense")
    names = [name for name in dense.tensors if not catalog.keys & set(catalog.view.raw_names(name))]
    assert any("self_attn" in name for name in names)
    lazy = catalog.view.lazy(names, torch.device("cpu"))
    plain = DenseView(dense, dense.tensors).lazy(names, torch.device("cpu"))
    for name in names:
        assert torch.equal(lazy[name][...].float(), plain[name][...].float()), name
        assert catalog.view.tensors[name].shape == dense.tensors[name].shape


def parts_of(kind: str, folder: Path, stem: str) -> list[str]:
    return sorted(name for name in Checkpoint.open(folder).tensors if name.startswith(f"{stem}."))


@pytest.mark.parametrize("stem", [EXPERT, DENSE], ids=["expert", "dense"])
@pytest.mark.parametrize("kind", [k for k in quantized.FORMATS if k != "mxfp4"])
def test_every_missing_part_is_named(copy, kind: str, stem: str) -> None:
    """Stock transformers gives a weight that it does not find random values."""
    folder = copy(kind)
    needless = ("weight_shape", "g_idx") if kind == "gptq" and stem == DENSE else ("weight_shape",)
    names = [n for n in parts_of(kind, folder, stem) if not n.endswith(needless)]
    assert len(names) > 1
    for name in names:
        kept = tiny.tensor(folder, name)
        tiny.edit(folder, {name: None})
        with pytest.raises(OffmoeError) as raised:
            open_catalog(folder)
        assert isinstance(raised.value, (MissingTensorError, UnsupportedModelError, CheckpointError))
        assert stem in str(raised.value), str(raised.value)
        tiny.edit(folder, {name: kept})
    open_catalog(folder)


@pytest.mark.parametrize("ending", ["_blocks", "_scales"])
def test_missing_part_of_all_experts_is_named(copy, ending: str) -> None:
    folder = copy("mxfp4")
    tiny.edit(folder, {f"model.layers.1.mlp.experts.down_proj{ending}": None})
    with pytest.raises(MissingTensorError, match=r"layers\.1\.mlp\.experts\.down_proj' \(mxfp4\) lacks its"):
        open_catalog(folder)


def test_fp8_weight_without_its_scale_is_not_taken_for_a_weight(copy) -> None:
    folder = copy("fp8")
    tiny.edit(folder, {f"{DENSE}.weight_scale_inv": None})
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.weight' is torch\.float8_e4m3fn, no dtype to compute"):
        open_catalog(folder)


@pytest.mark.parametrize("name", [f"{EXPERT}.weight_global_scale", f"{DENSE}.weight_mystery"])
def test_an_unknown_part_is_refused(copy, name: str) -> None:
    folder = copy("fp8")
    tiny.edit(folder, {name: torch.ones(1)})
    with pytest.raises(UnsupportedModelError, match=f"{name}' stands beside a quantized weight"):
        open_catalog(folder)


def test_a_part_of_another_format_is_refused(copy) -> None:
    folder = copy("ct-int4")
    tiny.edit(folder, {f"{EXPERT}.weight_g_idx": torch.zeros(32, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match="those of other experts of its layer are"):
        open_catalog(folder)
    tiny.edit(folder, {f"{EXPERT}.weight_g_idx": None, f"{EXPERT}.weight_zero_point": torch.zeros(3, 4).int()})
    with pytest.raises(CheckpointError, match=r"weight_zero_point' is no part of compressed-tensors int4"):
        open_catalog(folder)


def test_one_expert_that_is_not_quantized_stands_apart(copy) -> None:
    folder = copy("gptq")
    tiny.edit(folder, dict.fromkeys(parts_of("gptq", folder, EXPERT)) | {f"{EXPERT}.weight": torch.ones(24, 32)})
    _, catalog = open_catalog(folder)
    expert = int(EXPERT.split(".")[-2])
    assert sorted(expert for layer in catalog.layers for expert in layer.unlike) == [expert]
    assert catalog.formats == ("gptq int4",)


def test_dense_and_quantized_at_once_is_refused(copy) -> None:
    folder = copy("awq")
    tiny.edit(folder, {f"{EXPERT}.weight": torch.ones(24, 32)})
    with pytest.raises(CheckpointError, match=rf"{EXPERT}\.weight' both dense and quantized"):
        open_catalog(folder)


@pytest.mark.parametrize(
    ("kind", "values", "match"),
    [
        ("fp8", {"weight_block_size": [16, 16]}, r"its scale has shape .* in blocks of \[16, 16\]"),
        ("fp8", {"weight_block_size": None}, "in rows"),
        ("gptq", {"bits": 8, "desc_act": False}, None),
        ("awq", {"group_size": 16}, "not of one matrix in groups of 16"),
        ("ct-int4", quantized.ct_config(4, True, group_size=16), "no groups of 16 columns"),
        ("ct-int4", quantized.ct_config(8, True), "no groups of 8 columns"),
        ("ct-int4", quantized.ct_config(4, False), "lacks its zero"),
    ],
)
def test_a_config_of_another_quantization_is_told_from_the_headers(
    copy, kind: str, values: dict[str, Any], match: str | None
) -> None:
    """GPTQ's bits follow from its index, so that a wrong number in the config does no harm."""
    folder = copy(kind)
    configure(folder, **values)
    if match is None:
        open_catalog(folder)
        return
    with pytest.raises(CheckpointError, match=match):
        open_catalog(folder)


def test_another_method_in_the_config_is_told_from_the_headers(copy) -> None:
    folder = copy("awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="checkpoint is quantized or of another"):
        open_catalog(folder)


def test_a_config_that_says_quantized_of_plain_weights_does_no_harm(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    catalog = open_catalog(tmp_path)[1]
    assert catalog.formats == ()
    assert not catalog.view.encoded


def test_scales_of_activations_are_left_out_and_said_so(copy, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy("fp8")
    tiny.edit(folder, {f"{EXPERT}.input_scale": torch.ones(1), f"{DENSE}.input_scale": torch.ones(1)})
    with caplog.at_level(logging.WARNING):
        catalog = open_catalog(folder)[1]
    assert "2 scales of activations are not used" in caplog.text
    assert not any("input_scale" in name for name in [*catalog.keys, *catalog.view.tensors])


def test_a_damaged_state_of_one_expert_is_found_when_it_is_fetched(copy) -> None:
    """Thousands of small reads before loading would find it earlier."""
    folder = copy("nf4")
    name = f"{EXPERT}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tiny.tensor(folder, name).tolist()))
    state["blocksize"] = 128
    tiny.edit(folder, {name: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)})
    checkpoint, catalog = open_catalog(folder)
    read_expert(checkpoint, catalog.layers[0], 4)
    with pytest.raises(CheckpointError, match="others of its kind are"):
        read_expert(checkpoint, catalog.layers[0], 5)


def test_layers_may_differ_in_what_is_quantized(tmp_path: Path) -> None:
    def first_layers(name: str, tensor: torch.Tensor) -> bool:
        return quantized.is_quantized(name, tensor) and ".layers.2." not in name and "down_proj" not in name

    folder, _ = quantized.save(tmp_path, "qwen3_moe", "fp8", which=first_layers)
    layers = open_catalog(folder)[1].layers
    assert layers[0].decode is not None
    assert [leaf.codec is None for leaf in layers[0].decode.leaves].count(True) == 1
    assert layers[1].decode is None
