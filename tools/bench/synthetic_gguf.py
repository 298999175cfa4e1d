"""A GGUF file of Mixtral's or Qwen3-MoE's shape with random weights, for programs that read nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tools.bench.synthetic import INT4_DEVIATION, num_experts

Q = gguf.GGMLQuantizationType
DENSE = {"native": Q.BF16, "int8": Q.Q8_0, "int4": Q.Q4_0}
"""The type that stands for each `dense=` of offmoe."""
SPREAD = 65536
SHIFT = 977
DEVIATIONS = {Q.Q8_0: 74.0, Q.Q4_0: INT4_DEVIATION}
"""By type, the standard deviation of evenly drawn codes."""


class _Blocks:
    """Random weights of one type: windows of one random array that each begin elsewhere, as views."""

    def __init__(self, kind: Any, most: int, fan_in: int) -> None:
        """most: values of the largest tensor. fan_in: inputs of a row, which set the weights' size."""
        self.kind, self._number = kind, 0
        self._values, self._nbytes = gguf.GGML_QUANT_SIZES[kind]
        random, count = np.random.default_rng(0), most // self._values + SPREAD
        if kind == Q.BF16:
            floats = (random.standard_normal(count, dtype=np.float32) * fan_in**-0.5).view(np.uint32)
            self._blocks = (floats >> 16).astype(np.uint16).view(np.uint8).reshape(-1, 2)
            return
        self._blocks = np.empty((count, self._nbytes), np.uint8)
        scale = np.float16(fan_in**-0.5 / DEVIATIONS[kind])
        self._blocks[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        codes = random.integers(0, 256, (count, self._nbytes - 2), dtype=np.uint8)
        if kind == Q.Q4_0:  # without the code 0, whose value -8 would push every residual one way
            low, high = codes & 15, codes >> 4
            codes = np.where(low, low, 8) | np.where(high, high, 8) << 4
        self._blocks[:, 2:] = codes

    def next(self, *shape: int) -> np.ndarray:
        """Random weights of this shape: uint8 [..., bytes of a row]."""
        self._number += 1
        start, count = SHIFT * self._number % SPREAD, math.prod(shape) // self._values
        return self._blocks[start : start + count].reshape(*shape[:-1], -1)


def write_gguf(file: Path, config: Any, dense: str) -> None:
    """Write a model with experts in Q4_0.

    Args:
        file: to write.
        config: of Mixtral's or Qwen3-MoE's architecture.
        dense: what the dense weights are in, a key of DENSE.
    """
    experts, is_qwen = num_experts(config), config.model_type == "qwen3_moe"
    hidden, inner = config.hidden_size, config.moe_intermediate_size if is_qwen else config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    writer = gguf.GGUFWriter(file, "qwen3moe" if is_qwen else "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_dimension_count(head_dim)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if is_qwen:
        writer.add_expert_feed_forward_length(inner)
    routed = _Blocks(Q.Q4_0, experts * inner * hidden, hidden)
    weights = _Blocks(DENSE[dense], max(config.vocab_size, heads * head_dim) * hidden, hidden)

    def add(name: str, blocks: _Blocks, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", blocks.next(*shape), raw_dtype=blocks.kind)

    def norm(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    random = np.random.default_rng(1)
    add("token_embd", weights, config.vocab_size, hidden)
    add("output", weights, config.vocab_size, hidden)
    norm("output_norm", hidden)
    for layer in range(config.num_hidden_layers):
        block = f"blk.{layer}."
        add(block + "attn_q", weights, heads * head_dim, hidden)
        add(block + "attn_k", weights, kv_heads * head_dim, hidden)
        add(block + "attn_v", weights, kv_heads * head_dim, hidden)
        add(block + "attn_output", weights, hidden, heads * head_dim)
        for name in ("attn_norm", "ffn_norm"):
            norm(block + name, hidden)
        if is_qwen:
            for name in ("attn_q_norm", "attn_k_norm"):
                norm(block + name, head_dim)
        router = random.standard_normal((experts, hidden), dtype=np.float32) * hidden**-0.5
        writer.add_tensor(f"{block}ffn_gate_inp.weight", router)
        add(block + "ffn_gate_exps", routed, experts, inner, hidden)
        add(block + "ffn_up_exps", routed, experts, inner, hidden)
        add(block + "ffn_down_exps", routed, experts, hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
