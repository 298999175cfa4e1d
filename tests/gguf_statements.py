"""What llama.cpp's converter does to each family, stated in its own direction.

Each statement takes the tensors of a published checkpoint and returns those that the file gets, under the names that
the gguf package's map knows (or as "blk.N...." where the converter names them itself). It shares nothing with offmoe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch

Tensors = dict[str, torch.Tensor]
Writer = gguf.GGUFWriter


@dataclass(frozen=True)
class Statement:
    """What the converter does to one family.

    Args:
        arch: general.architecture.
        sizes: values of the tiny configuration; blocks of 32 values fit them.
        wide: further values with which blocks of 256 values fit the experts.
        convert: (tensors by published names, config) -> the tensors that are written.
        metadata: writes the keys of the family.
    """

    arch: str
    sizes: Mapping[str, Any]
    wide: Mapping[str, Any]
    convert: Callable[[Tensors, Any], Tensors]
    metadata: Callable[[Writer, Any], None]


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """LlamaModel.permute of the converter."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def permuted(tensors: Tensors, config: Any) -> Tensors:
    """The projections of queries and keys, permuted."""
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    return {
        name: next((permute(tensor, n) for end, n in heads.items() if name.endswith(end)), tensor)
        for name, tensor in tensors.items()
    }


def stacked(tensors: Tensors, experts: str = "mlp.experts") -> Tensors:
    """Stack `...{experts}.3.w1.weight` of all experts -> `...{experts}.w1.weight`."""
    out: Tensors = {}
    lists: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        before, found, after = name.partition(f".{experts}.")
        expert, _, leaf = after.partition(".")
        if found and expert.isdecimal():
            lists.setdefault(f"{before}.{experts}.{leaf}", {})[int(expert)] = tensor
        else:
            out[name] = tensor
    return out | {name: torch.stack([parts[i] for i in range(len(parts))]) for name, parts in lists.items()}


def renamed(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    out: Tensors = {}
    for name, tensor in tensors.items():
        new = name
        for old, instead in pairs:
            new = new.replace(old, instead)
        out[new] = tensor
    return out


def common(writer: Writer, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    if getattr(config, "intermediate_size", None) is not None:
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(7)


def counted(writer: Writer, config: Any) -> None:
    """`common`, and the number of experts."""
    common(writer, config)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    writer.add_expert_count(next(getattr(config, name) for name in names if getattr(config, name, None)))


def heads(writer: Writer, dim: int) -> None:
    writer.add_key_length(dim)
    writer.add_value_length(dim)


def _mixtral(tensors: Tensors, config: Any) -> Tensors:
    out = renamed(stacked(permuted(tensors, config), "block_sparse_moe.experts"), ("block_sparse_moe.experts.w", "@w"))
    return {
        name.replace("model.layers.", "layers.").replace("@w", "feed_forward.experts.w") if "@w" in name else name: t
        for name, t in out.items()
    }


def _mixtral_metadata(writer: Writer, config: Any) -> None:
    counted(writer, config)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(dim)


def _stacked(tensors: Tensors, config: Any) -> Tensors:
    return stacked(tensors)


def _qwen2_metadata(writer: Writer, config: Any) -> None:
    counted(writer, config)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _qwen3_metadata(writer: Writer, config: Any) -> None:
    counted(writer, config)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    heads(writer, config.head_dim)


def _gpt_oss(tensors: Tensors, config: Any) -> Tensors:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("gate_up_proj"):
            rows = tensor.transpose(-1, -2)
            out[name.replace("gate_up_proj", "gate_proj.weight")] = rows[:, ::2]
            out[name.replace("gate_up_proj", "up_proj.weight")] = rows[:, 1::2]
        elif name.endswith("gate_up_proj_bias"):
            out[name.replace("gate_up_proj_bias", "gate_proj.bias")] = tensor[..., ::2]
            out[name.replace("gate_up_proj_bias", "up_proj.bias")] = tensor[..., 1::2]
        elif name.endswith("down_proj_bias"):
            out[name.replace("down_proj_bias", "down_proj.bias")] = tensor
        elif name.endswith("down_proj"):
            out[name + ".weight"] = tensor.transpose(-1, -2)
        else:
            out[name + ".weight" if name.endswith("sinks") else name] = tensor
    return out


def _gpt_oss_metadata(writer: Writer, config: Any) -> None:
    counted(writer, config)
    heads(writer, config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    _yarn(writer, config)


def _yarn(writer: Writer, config: Any) -> None:
    rope = config.rope_parameters
    if rope["rope_type"] != "yarn":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if "beta_fast" in rope:
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if "mscale_all_dim" in rope:
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _deepseek(tensors: Tensors, config: Any) -> Tensors:
    out: Tensors = {}
    for name, tensor in stacked(tensors).items():
        if name.endswith("kv_b_proj.weight"):
            both = tensor.view(config.num_attention_heads, config.v_head_dim + config.qk_nope_head_dim, -1)
            keys, values = both.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            out[name.replace("kv_b_proj", "k_b_proj")] = keys.transpose(1, 2)
            out[name.replace("kv_b_proj", "v_b_proj")] = values
        else:
            out[name.replace("e_score_correction_bias", "e_score_correction.bias")] = tensor
    return out


def _whole_latent(tensors: Tensors, config: Any) -> Tensors:
    """As the converter did before it split the projection of keys and values."""
    return renamed(stacked(tensors), ("e_score_correction_bias", "e_score_correction.bias"))


def _deepseek_metadata(writer: Writer, config: Any) -> None:
    counted(writer, config)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    _latent_metadata(writer, config)


def _whole_latent_metadata(writer: Writer, config: Any) -> None:
    """As it was then: lengths of keys and values as attention without latent ones has them."""
    counted(writer, config)
    writer.add_key_length(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length(config.v_head_dim)
    _latent_metadata(writer, config)


def _latent_metadata(writer: Writer, config: Any) -> None:
    layers = getattr(config, "mlp_layer_types", None)
    writer.add_leading_dense_block_count(layers.count("dense") if layers else config.first_k_dense_replace)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.norm_topk_prob:
        writer.add_expert_weights_norm(True)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    sigmoid = config.model_type != "deepseek_v2"
    types = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(types.SIGMOID if sigmoid else types.SOFTMAX)
    _yarn(writer, config)


def _shifted(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Norms as 1 + w, decay rates as -exp(a), convolutions without the dimension of size 1."""
    if name.endswith(".A_log"):
        return -torch.exp(tensor)
    if "conv1d" in name:
        return tensor.squeeze()
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return tensor + 1
    return tensor


def _qwen_next(tensors: Tensors, config: Any) -> Tensors:
    groups, size = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // groups * config.linear_value_head_dim
    out: Tensors = {}
    for name, tensor in stacked(tensors).items():
        if "in_proj_qkvz" in name:
            by_head = tensor.permute(1, 0).reshape(-1, groups, 2 * size + 2 * values)
            q, k, v, z = (
                part.reshape(tensor.shape[1], -1) for part in by_head.split([size, size, values, values], dim=-1)
            )
            block = f"blk.{name.split('.')[2]}"
            out[f"{block}.attn_qkv.weight"] = torch.cat([q, k, v], dim=-1).permute(1, 0)
            out[f"{block}.attn_gate.weight"] = z.permute(1, 0)
        else:
            out[name.replace(".dt_bias", ".dt_proj.bias")] = _shifted(name, tensor)
    return out


def _reorder(tensor: torch.Tensor, dim: int, groups: int, per_group: int, size: int) -> torch.Tensor:
    """_reorder_v_heads of the converter: from the order of key heads to tiled order."""
    shape = list(tensor.shape)
    split = tensor.reshape(*shape[:dim], groups, per_group, size, *shape[dim + 1 :])
    return split.transpose(dim, dim + 1).reshape(shape)


def _qwen35(tensors: Tensors, config: Any) -> Tensors:
    groups, dim = config.linear_num_key_heads, config.linear_value_head_dim
    per_group = config.linear_num_value_heads // groups
    start = 2 * groups * config.linear_key_head_dim
    out: Tensors = {}
    for name, tensor in stacked(tensors).items():
        changed = tensor
        if "in_proj_qkv." in name or "conv1d" in name:
            tail = _reorder(tensor[start:], 0, groups, per_group, dim)
            changed = torch.cat([tensor[:start], tail])
        elif "in_proj_z." in name:
            changed = _reorder(tensor, 0, groups, per_group, dim)
        elif "in_proj_a." in name or "in_proj_b." in name or ".A_log" in name or ".dt_bias" in name:
            changed = _reorder(tensor, 0, groups, per_group, 1)
        elif "linear_attn.out_proj" in name:
            changed = _reorder(tensor, 1, groups, per_group, dim)
        out[name.replace(".dt_bias", ".dt_proj.bias")] = _shifted(name, changed)
    return out


def _hybrid_metadata(writer: Writer, config: Any) -> None:
    counted(writer, config)
    heads(writer, config.head_dim)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(config.head_dim * rope["partial_rotary_factor"]))
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])


def _glm4_metadata(writer: Writer, config: Any) -> None:
    counted(writer, config)
    heads(writer, config.head_dim)
    writer.add_rope_dimension_count(int(config.head_dim * config.rope_parameters["partial_rotary_factor"]))
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)


def _granite(tensors: Tensors, config: Any) -> Tensors:
    out: Tensors = {}
    for name, tensor in permuted(tensors, config).items():
        if name.endswith("input_linear.weight"):
            block = f"blk.{name.split('.')[2]}"
            gate, up = tensor.chunk(2, dim=-2)
            kind = "shexp" if "shared_mlp" in name else "exps"
            out[f"{block}.ffn_gate_{kind}.weight"], out[f"{block}.ffn_up_{kind}.weight"] = gate, up
        else:
            out[name] = tensor
    return out


def _granite_metadata(writer: Writer, config: Any) -> None:
    _mixtral_metadata(writer, config)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)
    if config.model_type == "granitemoeshared":
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)


def _minimax(tensors: Tensors, config: Any) -> Tensors:
    out = stacked(tensors, "block_sparse_moe.experts")
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    pairs = [(f"block_sparse_moe.experts.{old}", f"mlp.experts.{new}") for old, new in names.items()]
    return renamed(out, ("e_score_correction_bias", "e_score_correction.bias"), *pairs)


def _minimax_metadata(writer: Writer, config: Any) -> None:
    counted(writer, config)
    heads(writer, config.head_dim)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(config.head_dim * factor))
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _llama4(tensors: Tensors, config: Any) -> Tensors:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.transpose(-1, -2).chunk(2, dim=-2)
            block = f"blk.{name.split('.')[2]}"
            out[f"{block}.ffn_gate_exps.weight"], out[f"{block}.ffn_up_exps.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            out[name + ".weight"] = tensor.transpose(-1, -2)
        else:
            out[name] = tensor
    return out


def _llama4_metadata(writer: Writer, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size_mlp)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    heads(writer, config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_interleave_moe_layer_step(config.interleave_moe_layer_step)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def _dbrx(tensors: Tensors, config: Any) -> Tensors:
    out: Tensors = {}
    ffn = config.ffn_config
    for name, tensor in tensors.items():
        if ".experts.mlp." in name:
            by_expert = tensor.view(ffn.moe_num_experts, ffn.ffn_hidden_size, config.d_model)
            out[name + ".weight"] = by_expert.permute(0, 2, 1) if name.endswith("w2") else by_expert
        else:
            out[name] = tensor
    return out


def _dbrx_metadata(writer: Writer, config: Any) -> None:
    ffn, attention = config.ffn_config, config.attn_config
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(ffn.ffn_hidden_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(attention.kv_n_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_clamp_kqv(attention.clip_qkv)
    writer.add_expert_count(ffn.moe_num_experts)
    writer.add_expert_used_count(ffn.moe_top_k)
    writer.add_layer_norm_eps(1e-5)


_H = {"hidden_size": 64}
_LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 32}
_DEEPSEEK = {**_H, **_LATENT, "intermediate_size": 96, "moe_intermediate_size": 32}
_WIDE_MOE = {"hidden_size": 256, "moe_intermediate_size": 256}
_WIDE = {"hidden_size": 256, "intermediate_size": 256}
_GRANITE = {
    **_H,
    "intermediate_size": 32,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.25,
}
_HYBRID = {
    **_H,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_YARN_V3 = {
    "rope_theta": 10000.0,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}

STATEMENTS: dict[str, Statement] = {
    "mixtral": Statement("llama", {**_H, "intermediate_size": 32}, _WIDE, _mixtral, _mixtral_metadata),
    "qwen2_moe": Statement(
        "qwen2moe",
        {**_H, "intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
        {**_WIDE_MOE, "shared_expert_intermediate_size": 256},
        _stacked,
        _qwen2_metadata,
    ),
    "qwen3_moe": Statement(
        "qwen3moe",
        {**_H, "moe_intermediate_size": 32, "head_dim": 16, "mlp_only_layers": [], "norm_topk_prob": True},
        _WIDE_MOE,
        _stacked,
        _qwen3_metadata,
    ),
    "gpt_oss": Statement(
        "gpt-oss",
        {**_H, "intermediate_size": 32, "head_dim": 16, "sliding_window": 8},
        _WIDE,
        _gpt_oss,
        _gpt_oss_metadata,
    ),
    "deepseek_v2": Statement("deepseek2", _DEEPSEEK, _WIDE_MOE, _deepseek, _deepseek_metadata),
    "deepseek_v3": Statement(
        "deepseek2", {**_DEEPSEEK, "rope_parameters": _YARN_V3}, _WIDE_MOE, _deepseek, _deepseek_metadata
    ),
    "qwen3_next": Statement("qwen3next", {**_HYBRID, "mlp_only_layers": []}, _WIDE_MOE, _qwen_next, _hybrid_metadata),
    "qwen3_5_moe_text": Statement(
        "qwen35moe",
        {
            **_HYBRID,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
        _WIDE_MOE,
        _qwen35,
        _hybrid_metadata,
    ),
    "glm4_moe": Statement(
        "glm4moe",
        {
            **_H,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "head_dim": 16,
            "use_qk_norm": True,
            "attention_bias": True,
            "routed_scaling_factor": 1.8,
        },
        _WIDE_MOE,
        _whole_latent,
        _glm4_metadata,
    ),
    "granitemoe": Statement("granitemoe", _GRANITE, _WIDE, _granite, _granite_metadata),
    "granitemoeshared": Statement(
        "granitemoe", {**_GRANITE, "shared_intermediate_size": 64}, _WIDE, _granite, _granite_metadata
    ),
    "olmoe": Statement("olmoe", {**_H, "intermediate_size": 32}, _WIDE, _stacked, counted),
    "minimax_m2": Statement(
        "minimax-m2", {**_H, "intermediate_size": 32, "head_dim": 16}, _WIDE, _minimax, _minimax_metadata
    ),
    "llama4_text": Statement(
        "llama4",
        {**_H, "intermediate_size": 32, "intermediate_size_mlp": 96, "head_dim": 16, "attention_chunk_size": 8192},
        _WIDE,
        _llama4,
        _llama4_metadata,
    ),
    "dbrx": Statement(
        "dbrx",
        {
            "d_model": 64,
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 64},
        },
        {
            "d_model": 256,
            "ffn_config": {"ffn_hidden_size": 256, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 256},
        },
        _dbrx,
        _dbrx_metadata,
    ),
}
"""By model type of transformers."""
WHOLE_LATENT = Statement("deepseek2", _DEEPSEEK, _WIDE_MOE, _whole_latent, _whole_latent_metadata)
"""DeepSeek as files from before the split of keys and values hold it."""
GLM4_LITE = Statement("deepseek2", _DEEPSEEK, _WIDE_MOE, _deepseek, _deepseek_metadata)
"""GLM-4.7-Flash, which transformers has a model type for and the converter none."""
