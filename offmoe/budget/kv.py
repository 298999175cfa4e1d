"""What a KV cache takes while a model runs, layer by layer: what a forward pass leaves, and takes while it grows.

Memory is reserved for `max_context` tokens in every layer (needs.py), because a batch of short sequences fills them
all. A long sequence needs less where a layer keeps a window or a state, so a pass is refused by the bytes it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from offmoe.budget.needs import cached_elements, kv_bytes_per_token, kv_growth_per_token
from offmoe.hf.upstream import cache_layer_types

STATE_WIDTHS = (
    "mamba_d_state",
    "ssm_state_size",
    "linear_key_head_dim",
    "linear_head_dim",
    "head_dim",
    "linear_conv_kernel_dim",
    "mamba_d_conv",
    "conv_kernel",
    "conv_L_cache",
)
"""Names that configurations have for the sizes of a linear layer's state per channel."""
STATE_CHANNELS = 4
"""Channels of a linear layer's state, in units of the hidden size. Published models have 1 to 2."""
STATE_ITEM_BYTES = 4
"""Bytes of an element of a state: some models keep theirs in float32 whatever they compute in."""


WINDOW_HEADS = 2
"""Key and value heads of a layer with a window, in units of the configuration's: MiMo-V2-Flash and Inkling double them
there. A window is short, so that counting twice as many elsewhere is no loss."""


@dataclass(frozen=True)
class KvBytes:
    """The KV cache of a model.

    Args:
        per_token: bytes per token of the layers that keep every token.
        windows: (tokens, bytes per token) of each layer that keeps a window of them.
        per_sequence: bytes of the states that do not grow, at most.
        growing: bytes per token that are there twice while the cache grows.
    """

    per_token: int
    windows: tuple[tuple[int, int], ...] = ()
    per_sequence: int = 0
    growing: int = 0

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype) -> KvBytes:
        """The cache that `generate` and a plain forward make. dtype: the model's."""
        if config.is_encoder_decoder:
            return cls(kv_bytes_per_token(config, dtype), growing=kv_growth_per_token(config, dtype))
        text = config.get_text_config(decoder=True)
        per_token, windows, per_sequence, growing = 0, [], 0, 0
        for (kind, window), layer in zip(cache_layer_types(text), text.per_layer_config, strict=True):
            keys, values = cached_elements(layer)
            nbytes = (keys + values) * dtype.itemsize
            is_linear, has_keys = kind in ("linear_attention", "conv"), kind != "dummy"
            if is_linear or kind.startswith("hybrid"):
                per_sequence += _state_bytes(layer)
            if window is not None:
                windows.append((window, WINDOW_HEADS * nbytes))
            elif has_keys and not is_linear:
                per_token += nbytes
                growing = max(growing, max(keys, values) * dtype.itemsize)
        return cls(per_token, tuple(windows), per_sequence, growing)

    def after(self, sequences: int, past: int, length: int) -> int:
        """Bytes after a forward pass.

        Args:
            sequences: the batch.
            past: tokens of each sequence that the cache holds before.
            length: tokens of each sequence in this pass. A layer with a window keeps all of these until the next pass.
        """
        each = self.per_token * (past + length) + self.per_sequence
        return sequences * (each + sum(size * (min(past, window) + length) for window, size in self.windows))

    def peak(self, sequences: int, past: int, length: int) -> int:
        """The most bytes during a forward pass, as `after`: one layer's old keys are there beside the joined ones."""
        twice = max(self.growing * past, *(size * min(past, window) for window, size in self.windows), 0)
        return self.after(sequences, past, length) + sequences * twice


def _state_bytes(layer: PreTrainedConfig) -> int:
    """The most bytes of one linear layer's states for one sequence."""
    width = sum(value for name in STATE_WIDTHS if isinstance(value := getattr(layer, name, None), int))
    return STATE_CHANNELS * int(layer.hidden_size) * width * STATE_ITEM_BYTES
