"""Qwen2-MoE and Qwen3-MoE: only names change."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from offmoe.hf.gguf.architecture import (
    ATTENTION,
    HEAD_NORMS,
    NORMS,
    ROUTER,
    Architecture,
    Rule,
    common_config,
    common_model,
    expert_rules,
    expert_width,
    gate_above_up,
    head_dim,
    plain,
    shared_width,
)
from offmoe.hf.gguf.metadata import Metadata, rope_parameters
from offmoe.hf.gguf.values import as_row

SHARED_EXPERT = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
SHARED_GATE = Rule(("ffn_gate_inp_shexp.weight",), "mlp.shared_expert_gate.weight", as_row)


def _config(metadata: Metadata, *, norm_topk_prob: bool) -> dict[str, Any]:
    """The values that both have. norm_topk_prob: what llama.cpp does if the file does not say."""
    width = expert_width(metadata)
    return {
        **common_config(metadata),
        "intermediate_size": metadata.integer("feed_forward_length", width),
        "moe_intermediate_size": width,
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "norm_topk_prob": metadata.flag("expert_weights_norm", norm_topk_prob),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(metadata, head_dim(metadata)),
    }


def _qwen2_config(metadata: Metadata) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        **_config(metadata, norm_topk_prob=False),
        "shared_expert_intermediate_size": shared_width(metadata),
        "qkv_bias": "blk.0.attn_q.bias" in metadata.shapes,
    }


def _qwen3_config(metadata: Metadata) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        **_config(metadata, norm_topk_prob=True),
        "head_dim": head_dim(metadata),
        "attention_bias": "blk.0.attn_q.bias" in metadata.shapes,
    }


def _qwen2_rules(config: PreTrainedConfig) -> list[Rule]:
    return [
        *plain(ATTENTION, ("weight", "bias")),
        *plain(NORMS | ROUTER | SHARED_EXPERT),
        SHARED_GATE,
        *expert_rules(),
    ]


def _qwen3_rules(config: PreTrainedConfig) -> list[Rule]:
    return [*plain(ATTENTION, ("weight", "bias")), *plain(HEAD_NORMS | NORMS | ROUTER), *expert_rules()]


QWEN2 = Architecture(("qwen2_moe",), _qwen2_config, _qwen2_rules, gate_above_up, common_model)
QWEN3 = Architecture(("qwen3_moe",), _qwen3_config, _qwen3_rules, gate_above_up, common_model)
