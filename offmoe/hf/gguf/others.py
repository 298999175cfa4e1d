"""OLMoE and MiniMax-M2, of which only names change, and DBRX, whose last matrix is transposed."""

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
    demand_sigmoid,
    expert_rules,
    expert_width,
    gate_above_up,
    head_dim,
    plain,
)
from offmoe.hf.gguf.metadata import Metadata, rope_parameters
from offmoe.hf.upstream import Transpose, WeightConverter


def _olmoe_config(metadata: Metadata) -> dict[str, Any]:
    metadata.ignore("feed_forward_length")
    return {
        "model_type": "olmoe",
        **common_config(metadata),
        "intermediate_size": expert_width(metadata),
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "norm_topk_prob": metadata.flag("expert_weights_norm", False),
        "clip_qkv": metadata.number("attention.clamp_kqv", None),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(metadata, head_dim(metadata)),
    }


def _minimax_config(metadata: Metadata) -> dict[str, Any]:
    dim = head_dim(metadata)
    demand_sigmoid(metadata)
    metadata.ignore("feed_forward_length")
    return {
        "model_type": "minimax_m2",
        **common_config(metadata),
        "intermediate_size": expert_width(metadata),
        "head_dim": dim,
        "num_local_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(metadata, dim, dim),
    }


def _normed_rules(config: PreTrainedConfig) -> list[Rule]:
    return [*plain(ATTENTION | HEAD_NORMS | NORMS | ROUTER), *expert_rules()]


def _minimax_rules(config: PreTrainedConfig) -> list[Rule]:
    return [*_normed_rules(config), Rule(("exp_probs_b.bias",), "mlp.e_score_correction_bias")]


def _dbrx_config(metadata: Metadata) -> dict[str, Any]:
    values = common_config(metadata)
    rope = rope_parameters(metadata, head_dim(metadata))
    attention = {"kv_n_heads": values.pop("num_key_value_heads"), "rope_theta": rope["rope_theta"]}
    if (clip := metadata.number("attention.clamp_kqv", None)) is not None:
        attention["clip_qkv"] = clip
    metadata.ignore("feed_forward_length")
    experts = {
        "hidden_size": values["hidden_size"],
        "ffn_hidden_size": expert_width(metadata),
        "moe_num_experts": metadata.integer("expert_count"),
        "moe_top_k": metadata.integer("expert_used_count"),
    }
    return {
        "model_type": "dbrx",
        "d_model": values.pop("hidden_size"),
        "n_heads": values.pop("num_attention_heads"),
        "n_layers": values.pop("num_hidden_layers"),
        "max_seq_len": values.pop("max_position_embeddings"),
        **values,
        "attn_config": attention,
        "ffn_config": experts,
        "rope_parameters": rope,
    }


DBRX_LAYER = {
    "attn_norm": "norm_attn_norm.norm_1",
    "attn_qkv": "norm_attn_norm.attn.Wqkv",
    "attn_output": "norm_attn_norm.attn.out_proj",
    "attn_output_norm": "norm_attn_norm.norm_2",
    "ffn_gate_inp": "ffn.router.layer",
}


def _dbrx_rules(config: PreTrainedConfig) -> list[Rule]:
    experts = {"gate": "w1", "up": "v1", "down": "w2_rows"}
    return [
        *plain(DBRX_LAYER),
        *[Rule((f"ffn_{k}_exps.weight",), f"ffn.experts.mlp.{name}", expert=True) for k, name in experts.items()],
    ]


def _dbrx_converters() -> list[WeightConverter]:
    rows = "ffn.experts.mlp.w2_rows$"
    return [
        WeightConverter(source_patterns=rows, target_patterns="ffn.experts.mlp.w2", operations=[Transpose(1, 2)]),
    ]


def _dbrx_model() -> list[Rule]:
    return plain({"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head"})


OLMOE = Architecture(("olmoe",), _olmoe_config, _normed_rules, gate_above_up, common_model)
MINIMAX = Architecture(("minimax_m2",), _minimax_config, _minimax_rules, gate_above_up, common_model)
DBRX = Architecture(("dbrx",), _dbrx_config, _dbrx_rules, _dbrx_converters, _dbrx_model, "transformer.blocks.")
