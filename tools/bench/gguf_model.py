"""Writes a random model with Qwen3-30B-A3B's shapes as a GGUF file in the mixture of types of llama-quantize's Q4_K_M.

It runs in offmoe and in llama.cpp; it has no vocabulary, so prompts are token ids. 4 layers take 1.4 GB. Needs the gguf
package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import checkout  # noqa: F401
import gguf
import numpy as np

Q = gguf.GGMLQuantizationType
HIDDEN, FF, EXPERTS, TOP_K, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2048, 768, 128, 8, 32, 4, 128, 32000
HALVES = {Q.Q4_K: (0, 2), Q.Q6_K: (208,)}
"""By type, the bytes at which a block has a float16."""
SCALE = {Q.Q4_K: 1e-4, Q.Q6_K: 2e-5}
"""Size of these, so that weights have the size of a model's."""


def random_blocks(kind: Q, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random blocks with finite scales, uint8 [..., bytes of a row]."""
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (int(np.prod(shape)) // values, nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = (rng.standard_normal(len(raw)) * SCALE[kind]).astype(np.float16)
        raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return raw.reshape(*shape[:-1], -1)


def write_model(path: Path, layers: int, experts: int = EXPERTS) -> None:
    """Write the model.

    Args:
        path: the file.
        layers: decoder layers, all with experts.
        experts: per layer.
    """
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "qwen3moe", use_temp_file=True)
    _write_metadata(writer, layers, experts)

    def add(name: str, shape: tuple[int, ...], kind: Q = Q.Q4_K) -> None:
        writer.add_tensor(f"{name}.weight", random_blocks(kind, shape, rng), raw_dtype=kind)

    def ones(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    add("token_embd", (VOCABULARY, HIDDEN))
    ones("output_norm", HIDDEN)
    add("output", (VOCABULARY, HIDDEN), Q.Q6_K)
    for i in range(layers):
        more = Q.Q6_K if i % 2 else Q.Q4_K  # as the mixture gives half of the layers
        add(f"blk.{i}.attn_q", (HEADS * HEAD_DIM, HIDDEN))
        add(f"blk.{i}.attn_k", (KV_HEADS * HEAD_DIM, HIDDEN))
        add(f"blk.{i}.attn_v", (KV_HEADS * HEAD_DIM, HIDDEN), more)
        add(f"blk.{i}.attn_output", (HIDDEN, HEADS * HEAD_DIM))
        for name, size in (("attn_norm", HIDDEN), ("ffn_norm", HIDDEN), ("attn_q_norm", HEAD_DIM)):
            ones(f"blk.{i}.{name}", size)
        ones(f"blk.{i}.attn_k_norm", HEAD_DIM)
        router = rng.standard_normal((experts, HIDDEN), np.float32) / np.float32(HIDDEN**0.5)
        writer.add_tensor(f"blk.{i}.ffn_gate_inp.weight", router)
        add(f"blk.{i}.ffn_gate_exps", (experts, FF, HIDDEN))
        add(f"blk.{i}.ffn_up_exps", (experts, FF, HIDDEN))
        add(f"blk.{i}.ffn_down_exps", (experts, HIDDEN, FF), more)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_metadata(writer: gguf.GGUFWriter, layers: int, experts: int) -> None:
    writer.add_name("random")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FF)
    writer.add_expert_feed_forward_length(FF)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(TOP_K)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    writer.add_eos_token_id(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random GGUF model of Qwen3-30B-A3B's shapes in Q4_K_M.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    arguments = parser.parse_args()
    write_model(arguments.file, arguments.layers, arguments.experts)


if __name__ == "__main__":
    main()
