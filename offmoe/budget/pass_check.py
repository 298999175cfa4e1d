"""Refuses a forward pass for which the plan has no memory: its keys and values, or what it takes while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, StaticCache

from offmoe.budget.forward_pass import PassRoom
from offmoe.budget.kv import KvBytes
from offmoe.budget.memory_plan import MemoryPlan
from offmoe.budget.needs import kv_bytes_per_token
from offmoe.errors import CapacityError
from offmoe.text import format_size


class PassCheck:
    """Checks the forward passes of one loaded model.

    Args:
        plan: the division of memory.
        room: what passes may take by it.
        config: the model's configuration, which says whether a pass makes a KV cache.
        dtype: the model's.
    """

    def __init__(self, plan: MemoryPlan, room: PassRoom, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        self._plan, self._room = plan, room
        self._kv = KvBytes.of(config, dtype)
        self._kept_per_token = kv_bytes_per_token(config, dtype)
        self._text_config = config.get_text_config()

    def chunk(self, batch: int, length: int, past: int) -> int:
        """Tokens of each sequence that pass at once in prefill. Arguments and errors as `Offload.prefill_chunk`."""
        self._check_context(batch, past, length)
        return self._room.chunk(batch, length, past)

    def check(self, batch: int, length: int, arguments: Mapping[str, Any], is_encoder: bool) -> int:
        """Check one pass of the model, or of its encoder or decoder.

        Args:
            batch: Number of sequences.
            length: New tokens of each.
            arguments: Arguments of the pass, by name.
            is_encoder: Whether the encoder of an encoder-decoder model runs.

        Returns:
            The tokens of each sequence that the KV cache holds already.

        Raises:
            CapacityError: They and the new ones do not fit.
        """
        cache: Any = arguments.get("past_key_values")
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        encoded = arguments.get("encoder_hidden_states")  # [batch, encoded length, hidden]
        before = past + (int(encoded.shape[1]) if isinstance(encoded, torch.Tensor) else 0)
        keeps_kv = not is_encoder and self._keeps_kv(arguments)
        if keeps_kv:
            self._check_context(batch, before, length)
        if isinstance(cache, StaticCache):
            _check_static(cache, past + length)
        keep = arguments.get("logits_to_keep", 0)
        kept = int(keep.numel()) if isinstance(keep, torch.Tensor) else int(keep or 0)
        logits = 0 if is_encoder else min(length, kept or length)
        context = before + length
        missing = self._room.missing(batch, length, context, logits, cached=context if keeps_kv else 0)
        if missing and keeps_kv:
            raise CapacityError(self._too_long(batch, length, past, logits, missing))
        if missing:
            raise CapacityError(self._too_many(batch, length, context, logits, missing))
        return past

    def _keeps_kv(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a forward pass with these arguments leaves keys and values in memory."""
        use_cache = arguments.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self._text_config, "use_cache", None)
        return bool(use_cache) or arguments.get("past_key_values") is not None

    def _check_context(self, batch: int, past: int, length: int) -> None:
        """CapacityError if a forward pass needs more memory for keys and values than is reserved.

        Args:
            batch: Number of sequences.
            past: Tokens of each that are cached, those of an encoder included.
            length: New tokens of each.
        """
        tokens = batch * (past + length)
        if tokens <= self._plan.max_context:
            return
        kept = self._kv.after(batch, past, length)
        # What is reserved for growing holds no tokens: a prompt in one piece, which does not grow, cannot have it.
        if kept > self._kept_per_token * self._plan.max_context or self._kv.peak(batch, past, length) > self._plan.kv:
            raise CapacityError(
                f"{batch} x {past + length} tokens of context do not fit the {self._plan.max_context} that memory is "
                f"reserved for. Load the model with max_context={tokens} or more; a pass that only scores its input "
                "needs none with use_cache=False."
            )

    def _too_long(self, batch: int, length: int, past: int, logits: int, missing: int) -> str:
        """Why a forward pass is refused, and what would work."""
        chunk = self._room.chunk(batch, length, past, logits)
        return (
            f"{batch} x {length} tokens in one forward pass need {format_size(missing)} more than the workspace. Pass "
            f"at most {chunk} of each sequence at once, with past_key_values, as generate() does"
            f"{self._or_more(missing)}"
        )

    def _too_many(self, batch: int, length: int, context: int, logits: int, missing: int) -> str:
        """As `_too_long`, of a pass that keeps no keys and values, and so cannot be divided into pieces."""
        sequences = self._room.sequences(length, context, logits)
        fewer = f"at most {sequences} sequences" if sequences else "shorter sequences"
        return (
            f"{batch} x {length} tokens in one forward pass need {format_size(missing)} more than the workspace. Pass "
            f"{fewer} at once{self._or_more(missing)}"
        )

    def _or_more(self, missing: int) -> str:
        """The end of a message: how much context would hold `missing` more bytes."""
        per_token = self._room.kv_per_token
        if per_token == 0:
            return "."
        return f"; or load the model with max_context={self._plan.max_context + -(-missing // per_token)} or more."


def _check_static(cache: StaticCache, length: int) -> None:
    """CapacityError if a StaticCache is too short for so many tokens: a device would write past its end."""
    layers: list[Any] = list(cache.layers)
    whole = [layer.max_cache_len for layer in layers if hasattr(layer, "max_cache_len") and not layer.is_sliding]
    room = min(whole, default=length)
    if length > room:
        raise CapacityError(
            f"{length} tokens of context do not fit the StaticCache, which was made for {room}. Make one with "
            f"max_cache_len={length} or more."
        )
