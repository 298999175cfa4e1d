"""Checkpoints laid out in every way that people have them run like stock, and a replay counts what the run counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import offmoe
from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.hf.catalog.catalog import CatalogLayer
from offmoe.simulate.replay import replay
from offmoe.storage.checkpoint import Checkpoint
from offmoe.trace.trace import read_trace
from tests import families, tiny
from tests.test_families import stock_model


def assert_runs_like_stock(folder: Path, trace: Path) -> None:
    model = stock_model(folder, torch.bfloat16)
    ids = tiny.prompt()
    with torch.no_grad():
        wanted = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    ours = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, trace=trace)
    with ours.offload:
        with torch.no_grad():
            assert torch.equal(ours(ids).logits, wanted)
        assert torch.equal(ours.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False), tokens)
        stats = ours.offload.stats()
    recorded = read_trace(trace)
    assert recorded.options is not None
    assert replay(recorded, recorded.options).stats == stats
    assert stats.evictions > 0


@pytest.mark.parametrize("original_format", [True, False], ids=["original", "fused"])
@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "ernie4_5_vl_moe"])
def test_one_file(tmp_path: Path, family: str, original_format: bool) -> None:
    model = families.build(family, torch.bfloat16)
    folder = tiny.save(model, tmp_path / "model", original_format, max_shard_size="1GB")
    assert [shard.name for shard in Checkpoint.open(folder).shards] == ["model.safetensors"]
    assert_runs_like_stock(folder, tmp_path / "run.npz")


def test_parts_of_one_expert_in_different_shards(tmp_path: Path) -> None:
    model = families.build("mixtral", torch.bfloat16)
    folder = tiny.save(model, tmp_path / "model", max_shard_size="5KB")
    names = [f"model.layers.1.block_sparse_moe.experts.3.w{i}.weight" for i in (1, 2, 3)]
    shards = {Checkpoint.open(folder).tensors[name].shard for name in names}
    assert len(shards) == 3
    assert_runs_like_stock(folder, tmp_path / "run.npz")


def test_tied_embeddings(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen3_moe", **{**families.CONFIGS["qwen3_moe"], "tie_word_embeddings": True})
    model = tiny.random_model(config, torch.bfloat16)
    folder = tiny.save(model, tmp_path / "model")
    assert "lm_head.weight" not in Checkpoint.open(folder).tensors
    assert_runs_like_stock(folder, tmp_path / "run.npz")


def test_dense_layers_between_moe_layers(tmp_path: Path) -> None:
    values = {**families.CONFIGS["qwen3_moe"], "num_hidden_layers": 5, "mlp_only_layers": [1, 3]}
    model = tiny.random_model(AutoConfig.for_model("qwen3_moe", **values), torch.bfloat16)
    assert_runs_like_stock(tiny.save(model, tmp_path / "model"), tmp_path / "run.npz")


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("family", ["dots3_note", "ernie4_5_vl_moe"])
def test_layers_of_different_counts_and_shapes(tmp_path: Path, family: str, scope: str) -> None:
    """dots3_note has fewer experts for images, ernie4_5_vl_moe smaller ones. One pool must hold both kinds."""
    folder = tiny.save(families.build(family, torch.bfloat16), tmp_path / "model")
    inputs = families.image_inputs(family, torch.bfloat16)
    found = []
    for slots in (3, 8):
        ours = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=slots, scope=scope)
        layouts = {(layer.num_experts, layer.layout.nbytes) for layer in catalog_of(folder)}
        assert len(layouts) == 2
        with ours.offload, torch.no_grad():
            found += [ours(**inputs).logits, ours(**inputs).logits]
            assert all(layer.demands for layer in ours.offload.stats().by_layer)
    assert all(torch.equal(logits, found[0]) for logits in found)


def catalog_of(folder: Path) -> tuple[CatalogLayer, ...]:
    return inspect(folder, OffloadConfig(device="cpu")).catalog.layers
