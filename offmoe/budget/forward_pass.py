"""What one forward pass takes for a while: how many tokens of a prompt may pass at once, and the rest in chunks.

The temporary bytes of a pass grow with its tokens, and with its tokens times those in the KV cache. They may take the
workspace, what the plan leaves of the budget, and what the context leaves of the KV cache's reserve. `pass_bytes` is an
upper bound from the configuration; tests compare it with the bytes that torch's operators hold at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

FEW_TOKENS = 64
"""Tokens that the workspace holds at least. Chunks above it are a multiple of it, so that few lengths occur."""
PLANNED_CONTEXT = 4096
"""Most tokens of context that the workspace of `prefill_chunk` tokens is planned for. Attention to more takes KV
reserve, or smaller chunks."""
DELTA_BLOCK = 64
"""Tokens that a delta rule computes at once (`chunk_size` in transformers' qwen3_next and kimi_linear, 5.23)."""


class PassBytes(NamedTuple):
    """Temporary bytes of a forward pass.

    Args:
        per_token: of each token.
        per_pair: of each token and each token that it may attend to.
        per_logit_row: of each token whose logits are computed.
        block: tokens that layers without attention compute at once; a sequence is padded to a multiple of it.
    """

    per_token: int
    per_pair: int
    per_logit_row: int
    block: int = 1

    def of(self, batch: int, length: int, context: int, logits: int) -> int:
        """Bytes of a pass of `length` tokens in each of `batch` sequences.

        Args:
            batch: number of sequences.
            length: tokens of each that pass.
            context: tokens of each, those that pass included, that they attend to.
            logits: tokens of each whose logits are computed.
        """
        layers = -(-length // self.block) * self.block * self.per_token + length * context * self.per_pair
        return batch * max(layers, logits * self.per_logit_row)  # logits come when no layer computes

    def reserve(self, tokens: int, context: int) -> int:
        """Bytes of workspace for chunks of `tokens` tokens in a sequence of `context` tokens."""
        return self.of(1, tokens, min(context, max(tokens, PLANNED_CONTEXT)), 1)


class PassRoom(NamedTuple):
    """What forward passes may take by the plan, and what they need.

    Args:
        needs: what a pass needs.
        workspace: bytes for it, whatever is in the KV cache.
        kv_per_token: bytes of KV cache that are reserved per token of context.
        max_context: tokens that the KV cache is reserved for, over all sequences.
        largest_chunk: most tokens of a sequence that may pass at once (option prefill_chunk); None: what fits.
    """

    needs: PassBytes
    workspace: int
    kv_per_token: int
    max_context: int
    largest_chunk: int | None = None

    def free(self, batch: int, cached: int) -> int:
        """Bytes for a pass after which each of `batch` sequences has `cached` tokens in the KV cache."""
        return self.workspace + self.kv_per_token * max(0, self.max_context - batch * cached)

    def missing(self, batch: int, length: int, context: int, logits: int, cached: int | None = None) -> int:
        """Bytes by which a pass exceeds what it may take; 0 if it fits.

        A pass of one token per sequence always fits: the plan's smallest workspace holds more.

        Args:
            batch, length, context, logits: as `PassBytes.of`.
            cached: tokens of each sequence that the KV cache holds afterwards; None: `context`.
        """
        if length <= 1:
            return 0
        free = self.free(batch, context if cached is None else cached)
        return max(0, self.needs.of(batch, length, context, logits) - free)

    def sequences(self, length: int, context: int, logits: int) -> int:
        """Sequences that pass at once if nothing of them is cached. Arguments as `PassBytes.of`."""
        return self.free(0, 0) // self.needs.of(1, length, context, logits)

    def chunk(self, batch: int, length: int, past: int, logits: int = 1) -> int:
        """Tokens of each sequence that pass at once, when `length` tokens follow `past` others; `length` if all do.

        At least 1, whatever fits.
        """
        context = past + length
        most = length if self.largest_chunk is None else min(length, self.largest_chunk)
        if not self.missing(batch, most, context, min(most, logits)):
            return most
        each = self.needs.per_token + context * self.needs.per_pair
        if logits >= length:  # of every token
            each = max(each, self.needs.per_logit_row)
        fitting = max(1, min(most, self.free(batch, context) // (batch * each)))
        multiple = max(self.needs.block, FEW_TOKENS if fitting > FEW_TOKENS else 1)
        return max(1, fitting - fitting % multiple)

    def longest_whole(self, limit: int) -> int:
        """Tokens of the longest prompt, up to `limit`, that passes whole; at least 1."""
        low, high = 1, max(1, min(limit, self.max_context))
        while low < high:
            middle = (low + high + 1) // 2
            if self.missing(1, middle, middle, 1):
                high = middle - 1
            else:
                low = middle
        return low


def pass_bytes(config: PreTrainedConfig, dtype: torch.dtype, top_k: int) -> PassBytes:
    """Temporary bytes of a forward pass, an upper bound.

    Args:
        config: the model's configuration; its attention implementation counts.
        dtype: dtype to compute in.
        top_k: experts of a token.
    """
    text, item = config.get_text_config(), dtype.itemsize
    layers = [text] if config.is_encoder_decoder else text.per_layer_config
    hidden = int(text.hidden_size)
    # The residual, its sum, its norm in float32 and in dtype; then either attention or a feed-forward network.
    around = hidden * (4 * item + 8)
    attention = max(_attention(layer, item) for layer in layers)
    routed = 2 * hidden * item + top_k * hidden * (2 * item + 4)
    feed_forward = routed + 5 * item * max(_widths(text), default=4 * hidden)
    linear, block = _linear_attention(text, item)
    per_pair = max(_pair(layer, config, item) for layer in layers)
    vocabulary = int(getattr(text, "vocab_size", None) or 0)
    per_token = around + max(attention, feed_forward, linear)
    return PassBytes(per_token, per_pair, (vocabulary + 4 * hidden) * item, block)


def _heads(config: PreTrainedConfig) -> tuple[int, int, int]:
    """(heads, elements of a query, elements of a value) of one decoder layer."""
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    head = int(getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads)
    if getattr(config, "kv_lora_rank", None):
        return heads, int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim), int(config.v_head_dim)
    return heads, head, int(getattr(config, "v_head_dim", None) or head)


def _attention(config: PreTrainedConfig, item: int) -> int:
    """Bytes per token: query and key before and after rotation, key and value repeated for all heads, the result."""
    heads, key, value = _heads(config)
    return item * heads * (6 * key + 3 * value)


def _pair(layer: PreTrainedConfig, config: PreTrainedConfig, item: int) -> int:
    """Bytes per pair of tokens. A mask is made by a few operations on bools; eager attention holds all scores, masked,
    in float32, and cast back."""
    heads, key, value = _heads(layer)
    mask = 6 + 2 * item
    indexer = int(getattr(layer, "index_n_heads", None) or 0) * 2 * (item + 4)
    fused = config.get_text_config()._attn_implementation != "eager" and key == value
    return mask + indexer + (0 if fused else heads * (3 * item + 4))


def _widths(config: PreTrainedConfig) -> Iterator[int]:
    """Widths of the feed-forward networks that a configuration names, those of all shared experts together."""
    shared = max(1, int(getattr(config, "n_shared_experts", None) or 1))
    for name, value in config.to_dict().items():
        if type(value) is int and ("intermediate" in name or "ffn" in name or name == "d_ff"):
            yield value * (shared if name == "moe_intermediate_size" else 1)


def _linear_attention(config: PreTrainedConfig, item: int) -> tuple[int, int]:
    """(bytes per token of layers without attention, tokens of a block), computed by transformers' own code in float32.

    Each formula counts the tensors that its function holds at its peak.
    """

    def number(*names: str) -> int:
        return next((value for name in names if type(value := getattr(config, name, None)) is int), 0)

    heads, state = number("linear_num_value_heads"), number("ssm_state_size", "mamba_d_state", "state_size")
    if heads:  # gated delta rule: q, k and v in several forms, decays between the tokens of a block
        key, value = number("linear_key_head_dim"), number("linear_value_head_dim")
        return 4 * heads * (8 * key + 8 * value + 4 * DELTA_BLOCK) + item * heads * 4 * (key + value), DELTA_BLOCK
    if number("linear_num_heads"):  # Kimi's delta attention: a decay per pair of tokens and element of a key
        return 4 * number("linear_num_heads") * number("linear_head_dim") * (5 * DELTA_BLOCK + 16), DELTA_BLOCK
    if not state:
        return 0, 1
    hidden, expand = int(config.hidden_size), number("mamba_expand", "expand") or 2
    heads, head = number("mamba_num_heads", "mamba_n_heads"), number("mamba_head_dim", "mamba_d_head")
    if heads:  # Mamba 2: scores within a block, B and C repeated for all heads
        inner, block = heads * (head or expand * hidden // heads), number("mamba_chunk_size", "chunk_size") or 256
        return 4 * (heads * (4 * block + 6 * state) + 6 * inner), block
    return 4 * expand * hidden * (4 * state + 8), 1  # Mamba 1: a state per token
