"""Checkpoints of Mixtral's and Qwen3's shape and names with random weights, for benchmarks that no published model
fits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from offmoe.storage.checkpoint import INDEX_FILE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EXPERTS_PER_SHARD = 2
SPREAD = 65536


def write_mixtral(
    folder: Path, hidden: int, intermediate: int, *, layers: int, experts: int, top_k: int, vocabulary: int
) -> None:
    """Write a checkpoint in bf16 with Mixtral's names, shard by shard, and sync it to disk."""
    from transformers import MixtralConfig

    heads = max(2, hidden // 128)
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    _write(folder, config, hidden, intermediate, layers, experts, "block_sparse_moe.experts.{}.{}", ("w1", "w2", "w3"))


def write_qwen3(
    folder: Path, hidden: int, intermediate: int, *, layers: int, experts: int, top_k: int, vocabulary: int
) -> None:
    """As `write_mixtral`, with Qwen3's names. Every layer has experts."""
    from transformers import Qwen3MoeConfig

    heads = max(2, hidden // 128)
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        moe_intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=128,
        num_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    parts = ("gate_proj", "down_proj", "up_proj")
    _write(folder, config, hidden, intermediate, layers, experts, "mlp.experts.{}.{}", parts)


def _write(
    folder: Path,
    config: PretrainedConfig,
    hidden: int,
    intermediate: int,
    layers: int,
    experts: int,
    names: str,
    parts: tuple[str, str, str],
) -> None:
    """names: gives the name of an expert's weight in a layer, from its number and a part. parts: gate, down, up."""
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config).state_dict()
    dense = {}
    for name, weight in skeleton.items():
        if "experts" not in name:
            value = torch.ones(weight.shape) if weight.ndim == 1 else torch.randn(weight.shape) * hidden**-0.5
            dense[name] = value.bfloat16()
    weight_map = dict.fromkeys(dense, "dense.safetensors")
    _save(dense, folder / "dense.safetensors")
    # One random array; every tensor is a window of it that begins elsewhere: drawing them all would take minutes.
    drawn = (torch.randn(hidden * intermediate + SPREAD) * hidden**-0.5).bfloat16()
    tensors: dict[str, torch.Tensor] = {}
    number = 0
    for layer in range(layers):
        for expert in range(experts):
            for i, part in enumerate(parts, 1):
                start = 997 * (3 * (layer * experts + expert) + i) % SPREAD
                shape = (hidden, intermediate) if i == 2 else (intermediate, hidden)
                name = f"model.layers.{layer}.{names.format(expert, part)}.weight"
                tensors[name] = drawn[start : start + hidden * intermediate].clone().view(shape)
            if (expert + 1) % EXPERTS_PER_SHARD == 0 or expert == experts - 1:
                file = f"experts-{number:03d}.safetensors"
                _save(tensors, folder / file)
                weight_map |= dict.fromkeys(tensors, file)
                tensors, number = {}, number + 1
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    with open(file, "rb+") as written:
        os.fsync(written.fileno())  # a page that is not on the disk yet cannot be dropped from the cache
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
