"""Qwen3-Next and Qwen3.5-MoE: layers of linear attention (gated delta rule) between those of full attention.

Norms are stored as 1 + w and decay rates as -exp(a). Qwen3-Next's projection of queries, keys, values and gates is
grouped by key head in transformers, and apart in the file. Qwen3.5's value heads are stored in tiled order.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig

from offmoe.hf.gguf.architecture import (
    ATTENTION,
    ROUTER,
    Architecture,
    Rule,
    common_config,
    expert_rules,
    expert_width,
    gate_above_up,
    head_dim,
    num_layers,
    plain,
    shared_width,
)
from offmoe.hf.gguf.metadata import Metadata, rope_parameters
from offmoe.hf.gguf.qwen import SHARED_EXPERT, SHARED_GATE
from offmoe.hf.gguf.values import MovedRows, as_channels, grouped_heads, log_of_negative, minus_one

SHIFTED_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
"""Norms that are stored as 1 + w; that of linear attention is not."""


def _config(metadata: Metadata) -> dict[str, Any]:
    dim, value_heads = head_dim(metadata), metadata.integer("ssm.time_step_rank")
    full = metadata.blocks_with("attn_q.weight")
    kinds = ["full_attention" if i in full else "linear_attention" for i in range(num_layers(metadata))]
    metadata.ignore("full_attention_interval", "feed_forward_length")
    return {
        **common_config(metadata),
        "head_dim": dim,
        "layer_types": kinds,
        "linear_conv_kernel_dim": metadata.integer("ssm.conv_kernel"),
        "linear_key_head_dim": metadata.integer("ssm.state_size"),
        "linear_num_key_heads": metadata.integer("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": metadata.integer("ssm.inner_size") // max(1, value_heads),
        "moe_intermediate_size": expert_width(metadata),
        "shared_expert_intermediate_size": shared_width(metadata),
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(metadata, dim // 4, dim),
    }


def _next_config(metadata: Metadata) -> dict[str, Any]:
    return {
        "model_type": "qwen3_next",
        **_config(metadata),
        "intermediate_size": metadata.integer("feed_forward_length", expert_width(metadata)),
        "norm_topk_prob": metadata.flag("expert_weights_norm", True),
    }


def _qwen35_config(metadata: Metadata) -> dict[str, Any]:
    values = {"model_type": "qwen3_5_moe_text", **_config(metadata)}
    sections = [size for size in metadata.numbers("rope.dimension_sections", (11, 11, 10)) if size]
    values["rope_parameters"] |= {"mrope_section": sections, "mrope_interleaved": True}
    return values


def model_rules() -> list[Rule]:
    """The tensors outside the decoder layers; the last norm is stored as 1 + w."""
    norm = Rule(("output_norm.weight",), "model.norm.weight", minus_one)
    return [*plain({"token_embd": "model.embed_tokens", "output": "lm_head"}), norm]


def _common_rules() -> list[Rule]:
    return [
        *plain(ATTENTION | ROUTER | SHARED_EXPERT | {"ssm_norm": "linear_attn.norm"}),
        *[Rule((f"{leaf}.weight",), f"{module}.weight", minus_one) for leaf, module in SHIFTED_NORMS.items()],
        SHARED_GATE,
        *expert_rules(),
    ]


def _next_rules(config: PreTrainedConfig) -> list[Rule]:
    def grouped(qkv: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Queries, keys, values and gates of each key head together: [rows, hidden] and [rows, hidden]."""
        heads, size = config.linear_num_key_heads, config.linear_key_head_dim
        rows = heads * size
        parts = qkv.float().split([rows, rows, qkv.shape[0] - 2 * rows])
        by_head = [part.unflatten(0, (heads, -1)) for part in (*parts, gates.float())]
        return torch.cat(by_head, 1).flatten(0, 1)

    return [
        *_common_rules(),
        *plain({"ssm_in": "linear_attn.in_proj_qkvz", "ssm_ba": "linear_attn.in_proj_ba"}),
        Rule(("attn_qkv.weight", "attn_gate.weight"), "linear_attn.in_proj_qkvz.weight", grouped),
        *plain({"ssm_out": "linear_attn.out_proj"}),
        Rule(("ssm_conv1d.weight",), "linear_attn.conv1d.weight", as_channels),
        Rule(("ssm_dt.bias",), "linear_attn.dt_bias"),
        Rule(("ssm_a",), "linear_attn.A_log", log_of_negative),
    ]


def _qwen35_rules(config: PreTrainedConfig) -> list[Rule]:
    groups, size = config.linear_num_key_heads, config.linear_value_head_dim
    per_group = config.linear_num_value_heads // max(1, groups)
    start = 2 * groups * config.linear_key_head_dim  # queries and keys stand before values
    heads = partial(grouped_heads, groups=groups, per_group=per_group, size=size)
    numbers = partial(grouped_heads, groups=groups, per_group=per_group, size=1)
    return [
        *_common_rules(),
        Rule(("attn_qkv.weight",), "linear_attn.in_proj_qkv.weight", MovedRows(partial(heads, start=start))),
        Rule(("attn_gate.weight",), "linear_attn.in_proj_z.weight", MovedRows(heads)),
        Rule(("ssm_alpha.weight",), "linear_attn.in_proj_a.weight", MovedRows(numbers)),
        Rule(("ssm_beta.weight",), "linear_attn.in_proj_b.weight", MovedRows(numbers)),
        Rule(("ssm_out.weight",), "linear_attn.out_proj.weight", partial(heads, dim=1)),
        Rule(
            ("ssm_conv1d.weight",),
            "linear_attn.conv1d.weight",
            lambda weight: as_channels(heads(weight, start=start)),
        ),
        Rule(("ssm_dt.bias",), "linear_attn.dt_bias", numbers),
        Rule(("ssm_a",), "linear_attn.A_log", lambda rates: log_of_negative(numbers(rates))),
    ]


QWEN3_NEXT = Architecture(("qwen3_next",), _next_config, _next_rules, gate_above_up, model_rules)
QWEN35 = Architecture(("qwen3_5_moe_text",), _qwen35_config, _qwen35_rules, gate_above_up, model_rules)
