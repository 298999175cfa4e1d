"""Every expert of a checkpoint, read byte by byte from where the catalog says, is the stock model's expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from offmoe.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from offmoe.hf.adapters.find import expert_parameters, find_experts, find_top_k
from offmoe.hf.catalog.build import build_catalog
from offmoe.hf.catalog.catalog import CatalogLayer, ExpertCatalog
from offmoe.hf.load.config import build_meta, model_class
from offmoe.storage.checkpoint import Checkpoint
from offmoe.types import ExpertKey
from tests import tiny


def open_catalog(folder: Path) -> tuple[Checkpoint, ExpertCatalog]:
    config = AutoConfig.from_pretrained(folder)
    checkpoint = Checkpoint.open(folder)
    return checkpoint, build_catalog(checkpoint, build_meta(config, model_class(config)))


def read_expert(checkpoint: Checkpoint, layer: CatalogLayer, expert: int) -> tuple[dict[str, torch.Tensor], int]:
    """One expert in a slot, through record, assembly and plain reads -> (parameters, bytes read)."""
    record = layer.records[expert]
    data = []
    for segment in record.segments:
        with open(checkpoint.shards[segment.shard], "rb") as file:
            file.seek(segment.offset)
            data.append(torch.frombuffer(bytearray(file.read(segment.nbytes)), dtype=torch.uint8))
    views = layer.layout.views(torch.full((layer.layout.nbytes,), 255, dtype=torch.uint8))
    layer.assembly.place(record.segments, data, views, lambda into, source: into.copy_(source))
    return views, sum(len(d) for d in data)


def assert_same_experts(folder: Path, stock: tiny.Model) -> ExpertCatalog:
    checkpoint, catalog = open_catalog(folder)
    modules = find_experts(stock)
    assert [layer.name for layer in catalog.layers] == list(modules)
    for layer, module in zip(catalog.layers, modules.values(), strict=True):
        for expert in range(layer.num_experts):
            views, read = read_expert(checkpoint, layer, expert)
            assert {f"{layer.name}.{name}" for name in views} == {
                name for name, (owner, _) in expert_parameters(stock).items() if owner == layer.name
            }
            assert read == sum(view.nbytes for view in views.values()) == layer.records[expert].nbytes
            for name, view in views.items():
                assert torch.equal(view, module.get_parameter(name)[expert]), (layer.name, expert, name)
    return catalog


@pytest.mark.parametrize("original_format", [True, False], ids=["original", "fused"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_expert_is_read_bit_for_bit(tmp_path: Path, family: str, original_format: bool) -> None:
    model = tiny.build(family, torch.bfloat16)
    tiny.save(model, tmp_path, original_format)
    catalog = assert_same_experts(tmp_path, model)
    moe_layers = len(find_experts(model))
    assert catalog.shape.experts == (tiny.NUM_EXPERTS,) * moe_layers
    assert catalog.shape.top_k == (tiny.TOP_K,) * moe_layers
    assert len(catalog.records) == moe_layers * tiny.NUM_EXPERTS
    assert catalog.records[ExpertKey(1, 5)] is catalog.layers[1].records[5]
    assert catalog.keys == {s.name for record in catalog.records.values() for s in record.segments}
    assert not any(layer.assembly.convert for layer in catalog.layers)  # all eight families are block copies
    assert len({id(layer.layout) for layer in catalog.layers}) == 1


def test_gate_and_up_are_blocks_of_one_parameter(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    layer = open_catalog(tmp_path)[1].layers[0]
    blocks = {
        segment.name.split(".")[-2]: (part.param, part.dim, part.start)
        for segment, part in zip(layer.records[0].segments, layer.assembly.destinations, strict=True)
    }
    assert blocks == {"w1": ("gate_up_proj", 0, 0), "w3": ("gate_up_proj", 0, 48), "w2": ("down_proj", 0, 0)}


def test_transposed_checkpoints_are_strided_copies(tmp_path: Path) -> None:
    """qwen3_vl_moe publishes [E, in, out] where the model computes with [E, out, in]."""
    text = {**tiny.COMMON, "num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8, "intermediate_size": 48}
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
    }
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision)
    model = model_class(config)(config)
    assert type(model).__name__ == "Qwen3VLMoeForConditionalGeneration"
    tiny.save(model, tmp_path)
    names = [n for n in Checkpoint.open(tmp_path).tensors if n.endswith("mlp.experts.down_proj")]
    tiny.edit(tmp_path, {n: tiny.tensor(tmp_path, n).mT.contiguous() for n in names})
    tiny.edit(
        tmp_path,
        {
            n.replace("down", "gate_up"): tiny.tensor(tmp_path, n.replace("down", "gate_up")).mT.contiguous()
            for n in names
        },
    )
    catalog = assert_same_experts(tmp_path, model)
    assert all(part.transposed for layer in catalog.layers for part in layer.assembly.destinations)


def test_top_k_is_found_on_modules_before_configs() -> None:
    class Config:
        moe_topk = 5

    block: Any = torch.nn.Module()
    block.experts, block.gate = torch.nn.Module(), torch.nn.Module()
    assert find_top_k(block.experts, block, Config()) == 5
    block.gate.top_k = 3
    assert find_top_k(block.experts, block, Config()) == 3
    block.num_experts_per_tok = 4
    assert find_top_k(block.experts, block, Config()) == 4
    with pytest.raises(UnsupportedModelError, match="top_k_experts"):
        find_top_k(block.experts, torch.nn.Module(), object())


W1 = "model.layers.1.block_sparse_moe.experts.5.w1.weight"


def test_missing_expert_tensor_is_named(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    tiny.edit(tmp_path, {W1: None})
    with pytest.raises(MissingTensorError, match=W1):
        open_catalog(tmp_path)


def test_numbers_with_a_gap_are_not_taken_in_order(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    tiny.edit(tmp_path, {W1: None, W1.replace("5.w1", "8.w1"): torch.zeros(48, 32)})
    with pytest.raises(MissingTensorError, match=rf"{W1}.*7 of 8"):
        open_catalog(tmp_path)


def test_missing_projection_is_named(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    tiny.edit(tmp_path, {f"model.layers.1.block_sparse_moe.experts.{e}.w3.weight": None for e in range(8)})
    with pytest.raises(MissingTensorError, match=r"layers\.1\.block_sparse_moe\.experts\.0\.w3\.weight"):
        open_catalog(tmp_path)


def test_missing_parameter_is_named_with_its_name_elsewhere(tmp_path: Path) -> None:
    tiny.save(tiny.build("granitemoe"), tmp_path)
    tiny.edit(tmp_path, {"model.layers.1.block_sparse_moe.output_linear.weight": None})
    match = r"layers\.1\.block_sparse_moe\.experts\.down_proj.*layers\.0\.block_sparse_moe\.output_linear\.weight"
    with pytest.raises(MissingTensorError, match=match):
        open_catalog(tmp_path)


@pytest.mark.parametrize("name", [W1, "model.layers.1.block_sparse_moe.experts.0.w1.weight"])
def test_wrong_shape_names_tensor_found_and_expected(tmp_path: Path, name: str) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    tiny.edit(tmp_path, {name: torch.zeros(47, 32)})
    with pytest.raises(CheckpointError, match=rf"{name}.*\[47, 32\].*\[48, 32\]"):
        open_catalog(tmp_path)


@pytest.mark.parametrize(
    ("family", "override", "match"),
    [
        ("mixtral", {"intermediate_size": 40}, r"w1\.weight.*\[48, 32\].*\[40, 32\]"),
        ("mixtral", {"num_local_experts": 7}, r"gate\.weight.*\[8, 32\].*\[7, 32\]"),
        ("gpt_oss", {"intermediate_size": 20}, r"mlp\.experts\.\w+.*expects \[8, .*(20|40)"),
        ("mixtral", {"vocab_size": 96}, r"lm_head\.weight.*\[97, 32\].*\[96, 32\]"),
    ],
)
def test_config_of_another_model_is_told_from_the_headers(
    tmp_path: Path, family: str, override: dict[str, int], match: str
) -> None:
    tiny.save(tiny.build(family), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | override))
    with pytest.raises(CheckpointError, match=match):
        open_catalog(tmp_path)


def test_fused_tensor_with_too_few_experts_is_named(tmp_path: Path) -> None:
    tiny.save(tiny.build("gpt_oss"), tmp_path)
    tiny.edit(tmp_path, {"model.layers.1.mlp.experts.down_proj": torch.zeros(7, 24, 32)})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj.*\[7, 24, 32\].*\[8, \.\.\.\]"):
        open_catalog(tmp_path)


def test_more_experts_than_the_config_has_are_refused(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    tiny.edit(tmp_path, {W1.replace("5.w1", "8.w1"): torch.zeros(48, 32)})
    with pytest.raises(CheckpointError, match=r"9 tensors like .*experts\.8\.w1.*expects 8"):
        open_catalog(tmp_path)


def test_an_expert_of_another_dtype_stands_apart(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    _, before = open_catalog(tmp_path)
    tiny.edit(tmp_path, {W1: torch.zeros(48, 32, dtype=torch.float16)})
    _, catalog = open_catalog(tmp_path)
    layer = int(W1.split(".")[2])
    assert [list(entry.unlike) for entry in catalog.layers] == [[5] if i == layer else [] for i in range(3)]
    usual, own = catalog.layers[layer].forms
    assert (usual.layout, usual.assembly) == (before.layers[layer].layout, before.layers[layer].assembly)
    assert [param.dtype for param in own.layout.params].count(torch.float16) == 1
    assert catalog.shape == before.shape


def test_two_formats_at_once_are_refused(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    tiny.edit(tmp_path, {"model.layers.1.mlp.experts.down_proj": torch.zeros(8, 32, 48)})
    with pytest.raises(CheckpointError, match=r"both become 'model\.layers\.1\.mlp\.experts\.down_proj'"):
        open_catalog(tmp_path)


def test_quantized_bytes_without_a_config_are_refused(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    tiny.edit(tmp_path, {W1: torch.zeros(48, 32, dtype=torch.float8_e4m3fn)})
    with pytest.raises(UnsupportedModelError, match=W1):
        open_catalog(tmp_path)


def test_codes_in_place_of_dense_weights_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tiny.save(tiny.build("mixtral"), tmp_path)
    tiny.edit(tmp_path, {name: torch.ones(32, 32, dtype=torch.int32)})
    with pytest.raises(UnsupportedModelError, match=rf"{name}.*int32"):
        open_catalog(tmp_path)


def test_more_experts_per_token_than_there_are(tmp_path: Path) -> None:
    tiny.save(tiny.build("mixtral"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 9}))
    with pytest.raises(CheckpointError, match="asks for 9 experts per token of the 8"):
        open_catalog(tmp_path)


def test_dense_model_has_no_experts(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **{**tiny.COMMON, "intermediate_size": 48})
    tiny.save(model_class(config)(config), tmp_path)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no experts"):
        open_catalog(tmp_path)
