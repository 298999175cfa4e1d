"""gpt-oss: gate and up stand apart in the file, and alternate in transformers' transposed parameter."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from offmoe.hf.gguf.architecture import (
    ATTENTION,
    EXPERTS,
    Architecture,
    Rule,
    common_config,
    common_model,
    expert_width,
    head_dim,
    plain,
)
from offmoe.hf.gguf.metadata import Metadata, rope_parameters
from offmoe.hf.upstream import Alternate, Transpose, WeightConverter

NORMS = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}


def _converters() -> list[WeightConverter]:
    return [
        WeightConverter(
            source_patterns=["mlp.experts.gate_proj$", "mlp.experts.up_proj$"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[Alternate(transposed=True)],
        ),
        WeightConverter(
            source_patterns=["mlp.experts.gate_proj_bias$", "mlp.experts.up_proj_bias$"],
            target_patterns="mlp.experts.gate_up_proj_bias",
            operations=[Alternate(transposed=False)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.down_proj_rows$",
            target_patterns="mlp.experts.down_proj",
            operations=[Transpose(1, 2)],
        ),
    ]


def _config(metadata: Metadata) -> dict[str, Any]:
    metadata.ignore("feed_forward_length")
    rope = rope_parameters(metadata, head_dim(metadata))
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False  # of every published gpt-oss; files cannot say it
    return {
        "model_type": "gpt_oss",
        **common_config(metadata),
        "intermediate_size": expert_width(metadata),
        "head_dim": head_dim(metadata),
        "num_local_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "sliding_window": metadata.integer("attention.sliding_window"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
    }


def _rules(config: PreTrainedConfig) -> list[Rule]:
    return [
        *plain(ATTENTION | {"ffn_gate_inp": "mlp.router"}, ("weight", "bias")),
        *plain(NORMS),
        Rule(("attn_sinks.weight",), "self_attn.sinks"),
        Rule(("ffn_down_exps.weight",), EXPERTS + "down_proj_rows", expert=True),
        Rule(("ffn_gate_exps.weight",), EXPERTS + "gate_proj", expert=True),
        Rule(("ffn_up_exps.weight",), EXPERTS + "up_proj", expert=True),
        Rule(("ffn_gate_exps.bias",), EXPERTS + "gate_proj_bias", expert=True),
        Rule(("ffn_up_exps.bias",), EXPERTS + "up_proj_bias", expert=True),
        Rule(("ffn_down_exps.bias",), EXPERTS + "down_proj_bias", expert=True),
    ]


GPT_OSS = Architecture(("gpt_oss",), _config, _rules, _converters, common_model)
