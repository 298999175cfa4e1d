"""DeepSeek-V2 and -V3 and what is built like them (llama.cpp's "deepseek2"), and GLM-4 MoE.

Newer files hold the second projection of keys and values as two tensors per head, keys transposed, because llama.cpp
folds them into other products. Older files hold it as transformers does.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from offmoe.hf.gguf.architecture import (
    ATTENTION,
    DENSE_FFN,
    HEAD_NORMS,
    NORMS,
    ROUTER,
    SIGMOID,
    SOFTMAX,
    Architecture,
    Rule,
    common_config,
    common_model,
    demand_sigmoid,
    expert_rules,
    expert_width,
    gate_above_up,
    head_dim,
    is_sigmoid,
    leading_dense,
    plain,
)
from offmoe.hf.gguf.metadata import BESIDE, ComputesOtherwiseError, Metadata, rope_parameters

SHARED_EXPERTS = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
CORRECTION = Rule(("exp_probs_b.bias",), "mlp.gate.e_score_correction_bias")
LATENT = {
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
}
"""Attention with latent keys and values (MLA)."""


def keys_above_values(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The projection of keys and values: [heads, rank, key], [heads, value, rank] -> [heads * (key + value), rank]."""
    both = torch.cat([keys.float().mT, values.float()], 1)  # [heads, key + value, rank]
    return both.flatten(0, 1)


def _experts(metadata: Metadata) -> dict[str, Any]:
    """The values of routed and shared experts that all have."""
    return {
        "moe_intermediate_size": expert_width(metadata),
        "intermediate_size": metadata.integer("feed_forward_length"),
        "n_routed_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "n_shared_experts": metadata.integer("expert_shared_count", 0),
        "first_k_dense_replace": leading_dense(metadata),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 1.0),
        "norm_topk_prob": metadata.flag("expert_weights_norm", False),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
    }


def _groups(metadata: Metadata) -> tuple[int, int]:
    """(n_group, topk_group): of how many groups of experts a token may use how many."""
    groups = metadata.integer("expert_group_count", 0)
    if not groups:
        metadata.remarks.append(
            "does not say whether experts are chosen by groups; all are taken to be one group, as llama.cpp does. If "
            f"the model's config.json has n_group, {BESIDE}"
        )
    return max(groups, 1), max(metadata.integer("expert_group_used_count", 1), 1)


def _latent_config(metadata: Metadata) -> dict[str, Any]:
    rotated = metadata.integer("rope.dimension_count")
    key = metadata.integer("attention.key_length_mla", metadata.integer("attention.key_length", 0))
    value = metadata.integer("attention.value_length_mla", metadata.integer("attention.value_length", 0))
    metadata.ignore("attention.key_length", "attention.value_length")
    n_group, topk_group = _groups(metadata)
    values = {
        **common_config(metadata),
        **_experts(metadata),
        "num_key_value_heads": metadata.integer("attention.head_count"),
        "q_lora_rank": metadata.integer("attention.q_lora_rank", None),
        "kv_lora_rank": metadata.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": value,
        "n_group": n_group,
        "topk_group": topk_group,
        "rope_parameters": rope_parameters(metadata, rotated),
    }
    corrected = bool(metadata.blocks_with("exp_probs_b.bias"))
    if is_sigmoid(metadata, SIGMOID if corrected else SOFTMAX):
        return {"model_type": "deepseek_v3", **values}
    if values["norm_topk_prob"]:
        raise ComputesOtherwiseError(
            f"{metadata.file}: divides the scores of a token's experts by their sum after a softmax over all experts; "
            "no model of transformers with this attention does, and none is replaced by one that computes otherwise"
        )
    method = "greedy" if n_group == 1 else "group_limited_greedy"
    return {"model_type": "deepseek_v2", **values, "topk_method": method}


def _latent_rules(config: PreTrainedConfig) -> list[Rule]:
    return [
        *plain(LATENT | NORMS | DENSE_FFN | ROUTER | SHARED_EXPERTS),
        Rule(("attn_k_b.weight", "attn_v_b.weight"), "self_attn.kv_b_proj.weight", keys_above_values),
        CORRECTION,
        *expert_rules(),
    ]


def _glm_config(metadata: Metadata) -> dict[str, Any]:
    dim = head_dim(metadata)
    demand_sigmoid(metadata)
    metadata.ignore("rope.dimension_sections")  # of GLM-4.5V's images; text has one position for all of them
    return {
        "model_type": "glm4_moe",
        **common_config(metadata),
        **_experts(metadata),
        "head_dim": dim,
        "n_group": metadata.integer("expert_group_count", 1),
        "topk_group": metadata.integer("expert_group_used_count", 1),
        "norm_topk_prob": metadata.flag("expert_weights_norm", True),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in metadata.shapes,
        "attention_bias": "blk.0.attn_q.bias" in metadata.shapes,
        "rope_parameters": rope_parameters(metadata, dim // 2, dim),
    }


def _glm_rules(config: PreTrainedConfig) -> list[Rule]:
    norms = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
    return [
        *plain(ATTENTION, ("weight", "bias")),
        *plain(HEAD_NORMS | norms | DENSE_FFN | ROUTER | SHARED_EXPERTS),
        CORRECTION,
        *expert_rules(),
    ]


DEEPSEEK = Architecture(
    ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), _latent_config, _latent_rules, gate_above_up, common_model
)
GLM4 = Architecture(("glm4_moe",), _glm_config, _glm_rules, gate_above_up, common_model)
