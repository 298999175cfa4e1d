"""Mixtral, which llama.cpp runs as "llama" with experts: query and key heads are permuted."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from offmoe.hf.gguf.architecture import (
    ATTENTION,
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
)
from offmoe.hf.gguf.metadata import Metadata, rope_parameters
from offmoe.hf.gguf.values import unpermuted


def permuted_attention(config: PreTrainedConfig) -> list[Rule]:
    """The projections of attention whose query and key heads the converter permuted."""
    return [
        Rule(("attn_q.weight",), "self_attn.q_proj.weight", unpermuted(config.num_attention_heads)),
        Rule(("attn_k.weight",), "self_attn.k_proj.weight", unpermuted(config.num_key_value_heads)),
        *plain({leaf: ATTENTION[leaf] for leaf in ("attn_v", "attn_output")}),
    ]


def _config(metadata: Metadata) -> dict[str, Any]:
    metadata.ignore("feed_forward_length")
    return {
        "model_type": "mixtral",
        **common_config(metadata),
        "intermediate_size": expert_width(metadata),
        "head_dim": head_dim(metadata),
        "num_local_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(metadata, head_dim(metadata)),
    }


def _rules(config: PreTrainedConfig) -> list[Rule]:
    return [*permuted_attention(config), *plain(NORMS | ROUTER), *expert_rules()]


MIXTRAL = Architecture(("mixtral",), _config, _rules, gate_above_up, common_model)
