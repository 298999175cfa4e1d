"""Mixtral, Granite-MoE and Llama 4. Query and key heads of the first two are permuted in the file."""

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
    shared_width,
)
from offmoe.hf.gguf.metadata import ComputesOtherwiseError, Metadata, rope_parameters
from offmoe.hf.gguf.values import joined, unpermuted
from offmoe.hf.upstream import Concatenate, Transpose, WeightConverter


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


def _granite_config(metadata: Metadata) -> dict[str, Any]:
    if not metadata.flag("rope.scaling.finetuned", True):  # so llama.cpp reads this key here
        raise ComputesOtherwiseError(f"{metadata.file}: has no positions, which granitemoe of transformers always has")
    shared = shared_width(metadata)
    values = {
        "model_type": "granitemoeshared" if shared else "granitemoe",
        **common_config(metadata),
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_local_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(metadata, head_dim(metadata)),
        "attention_multiplier": metadata.number("attention.scale", 1.0),
        "embedding_multiplier": metadata.number("embedding_scale", 1.0),
        "residual_multiplier": metadata.number("residual_scale", 1.0),
        "logits_scaling": metadata.number("logit_scale", 1.0),
    }
    return values | ({"shared_intermediate_size": shared} if shared else {})


def _granite_rules(config: PreTrainedConfig) -> list[Rule]:
    shared = ("ffn_gate_shexp.weight", "ffn_up_shexp.weight")
    return [
        *permuted_attention(config),
        *plain(NORMS | {"ffn_gate_inp": "block_sparse_moe.router", "ffn_down_shexp": "shared_mlp.output_linear"}),
        Rule(shared, "shared_mlp.input_linear.weight", joined),
        *expert_rules("block_sparse_moe.experts."),
    ]


LLAMA4_FFN = {
    "ffn_gate_inp": "feed_forward.router",
    "ffn_gate_shexp": "feed_forward.shared_expert.gate_proj",
    "ffn_up_shexp": "feed_forward.shared_expert.up_proj",
    "ffn_down_shexp": "feed_forward.shared_expert.down_proj",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
}


def _llama4_config(metadata: Metadata) -> dict[str, Any]:
    experts = metadata.integer("expert_count")
    return {
        "model_type": "llama4_text",
        **common_config(metadata),
        "intermediate_size": expert_width(metadata),
        "intermediate_size_mlp": metadata.integer("feed_forward_length"),
        "head_dim": head_dim(metadata),
        "num_local_experts": experts,
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "interleave_moe_layer_step": metadata.integer("interleave_moe_layer_step", 1),
        "moe_layers": list(metadata.blocks_with("ffn_gate_inp.weight")),
        "use_qk_norm": experts != 128,  # llama.cpp's rule: Maverick, with 128 experts, has none
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(metadata, head_dim(metadata)),
    }


def _llama4_rules(config: PreTrainedConfig) -> list[Rule]:
    experts = [rule for rule in expert_rules("feed_forward.experts.") if "gate_up" not in rule.target]
    return [*plain(ATTENTION), *plain(NORMS | LLAMA4_FFN), *experts]


def _transposed_experts() -> list[WeightConverter]:
    """Experts that multiply from the other side: [experts, hidden, 2 * width] and [experts, width, hidden]."""
    return [
        WeightConverter(
            source_patterns=["experts.gate_proj$", "experts.up_proj$"],
            target_patterns="experts.gate_up_proj",
            operations=[Concatenate(dim=1), Transpose(1, 2)],
        ),
        WeightConverter(
            source_patterns="experts.down_proj$", target_patterns="experts.down_proj", operations=[Transpose(1, 2)]
        ),
    ]


GRANITE = Architecture(("granitemoe", "granitemoeshared"), _granite_config, _granite_rules, gate_above_up, common_model)
LLAMA4 = Architecture(("llama4_text",), _llama4_config, _llama4_rules, _transposed_experts, common_model)
MIXTRAL = Architecture(("mixtral",), _config, _rules, gate_above_up, common_model)
