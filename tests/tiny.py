"""Tiny random models of the eight families that offmoe promises. Every parameter influences the output."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from offmoe.hf.load.config import model_class
from offmoe.hf.predict.route_recorder import RouteRecorder
from offmoe.hf.predict.router_probe import RouterProbe

logging.disable_progress_bar()

Model: TypeAlias = Any
"""A model of transformers, stock or offloaded. No common type knows `generate`, `model` and `offload`."""

VOCABULARY = 97
NUM_EXPERTS = 8
TOP_K = 2

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": TOP_K,
}
_MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_DEEPSEEK: dict[str, Any] = dict(
    _MLA,
    intermediate_size=48,
    moe_intermediate_size=24,
    n_routed_experts=NUM_EXPERTS,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": NUM_EXPERTS, "intermediate_size": 48},
    "qwen2_moe": {
        "num_experts": NUM_EXPERTS,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {
        "num_experts": NUM_EXPERTS,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "mlp_only_layers": [0],
    },
    "olmoe": {"num_experts": NUM_EXPERTS, "intermediate_size": 24},
    "deepseek_v2": dict(_DEEPSEEK, topk_method="group_limited_greedy"),
    "deepseek_v3": dict(_DEEPSEEK),
    "gpt_oss": {"num_local_experts": NUM_EXPERTS, "intermediate_size": 24, "head_dim": 8},
    "granitemoe": {"num_local_experts": NUM_EXPERTS, "intermediate_size": 24},
}
FAMILIES = tuple(CONFIGS)


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Model:
    """A stock model in eval mode. All parameters are random, also those that transformers sets to zeros and ones."""
    return random_model(AutoConfig.for_model(family, **{**COMMON, **CONFIGS[family], **overrides}), dtype, seed)


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Model:
    """A stock model of any config, random as in `build`."""
    model = model_class(config)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if weight.is_floating_point() and (isinstance(weight, torch.nn.Parameter) or name.endswith("_bias")):
                spread = 0.05 if weight.ndim < 2 else 0.25
                centre = 1.0 if "norm" in name and weight.ndim == 1 else 0.0
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread + centre)
            if weight.is_floating_point():  # not model.to(dtype), which would cast complex buffers too
                weight.data = weight.data.to(dtype)
    return model.eval()


def comparable(model: Model) -> Model:
    """Make a stock model's float32 bits comparable: copy its weights to aligned memory, and let none have a gradient.

    Without this, stock is not bit-equal to itself. transformers leaves weights in the mapped file, and a product of one
    row rounds differently if a weight's address is not a multiple of 16. torch.matmul also rounds differently if a
    weight could have a gradient, even under no_grad. Returns the same model.
    """
    for weight in [*model.parameters(), *model.buffers()]:
        weight.data = weight.data.clone()  # torch's own memory, aligned to 64 bytes
    return model.requires_grad_(False).eval()


def save(model: Model, folder: Path, original_format: bool = True, max_shard_size: str = "60KB") -> Path:
    """Write a sharded checkpoint, with the names of the family's published checkpoints or the fused names of
    transformers v5.
    """
    model.save_pretrained(folder, save_original_format=original_format, max_shard_size=max_shard_size)
    return folder


def prompt(batch: int = 2, length: int = 11, seed: int = 3) -> torch.Tensor:
    """Random token ids, int64 [batch, length], without special tokens."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def edit(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (with None) drop tensors of a sharded checkpoint, index included."""
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    for name, tensor in change.items():
        file = index["weight_map"].setdefault(name, "more.safetensors")
        shard = folder / file
        tensors = load_file(shard) if shard.exists() else {}
        if tensor is None:
            del tensors[name], index["weight_map"][name]
        else:
            tensors[name] = tensor
        save_file(tensors, shard, metadata={"format": "pt"})
    index_file.write_text(json.dumps(index))


def tensor(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a sharded checkpoint."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return load_file(folder / index["weight_map"][name])[name]


def watch(model: nn.Module, experts: Sequence[nn.Module], run: Callable[[], object]) -> RouterProbe:
    """The routes that a recorder finds during `run()`, one forward pass of `model`."""
    recorder = RouteRecorder(model, experts)
    recorder.start()
    try:
        run()
    finally:
        probe = recorder.finish()
    return probe
