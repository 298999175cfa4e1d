"""A prompt in chunks: transformers' own `prefill_chunk_size`, set for the prompts that do not fit in one piece.

`generate` hands every prompt to `_prefill`, which knows the sequences, the KV cache and the settings of the call. It is
given a copy of the settings with a chunk size, so the result is that of `generate(prefill_chunk_size=...)`, bit for
bit. transformers cannot divide a prompt without a KV cache, embeddings in place of ids, raw images or sounds, and the
input of an encoder. Those pass whole, if they fit.
"""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from offmoe.hf.upstream import RAW_INPUTS

logger = logging.getLogger(__name__)

ChunkOf = Callable[[int, int, int], int]
"""chunk_of(batch, length, past) -> tokens of each of `batch` sequences that pass at once, of `length` that follow
`past` others."""


def chunk_prefill(model: PreTrainedModel, chunk_of: ChunkOf) -> None:
    """Let `generate` prefill in chunks where `chunk_of` says so. A model that does not generate stays as it is."""
    original = getattr(type(model), "_prefill", None)
    if original is None:
        return
    reference = weakref.ref(model)

    @functools.wraps(original)
    def prefill(
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kw: Any,
    ) -> Any:
        model = reference()
        assert model is not None
        if _can_be_divided(model, generation_config, model_kwargs):
            length, past = _new_tokens(input_ids, generation_config, model_kwargs)
            chunk = chunk_of(len(input_ids), length, past)
            if chunk < length:
                logger.info("a prompt of %d x %d tokens is prefilled in chunks of %d", len(input_ids), length, chunk)
                generation_config = copy.copy(generation_config)  # the caller's may serve other calls
                generation_config.prefill_chunk_size = chunk
        return original(model, input_ids, generation_config, model_kwargs, *args, **kw)

    object.__setattr__(model, "_prefill", prefill)


def _can_be_divided(model: PreTrainedModel, settings: GenerationConfig, model_kwargs: dict[str, Any]) -> bool:
    """Whether transformers can divide the prompt, and the caller has not said how."""
    return (
        settings.prefill_chunk_size is None
        and not model.config.is_encoder_decoder
        and model_kwargs.get("past_key_values") is not None
        and model_kwargs.get("inputs_embeds") is None
        and not any(model_kwargs.get(name) is not None for name in RAW_INPUTS)
    )


def _new_tokens(input_ids: torch.Tensor, settings: GenerationConfig, model_kwargs: dict[str, Any]) -> tuple[int, int]:
    """(tokens of each sequence that the KV cache does not hold, tokens that it holds). input_ids: [batch, length]."""
    past, length = int(model_kwargs["past_key_values"].get_seq_length()), input_ids.shape[1]
    mask = model_kwargs.get("attention_mask")
    # A call that goes on from a cache may give all ids or only the new ones; the mask always has all positions.
    whole = getattr(settings, "_mask_length", -1) if mask is None else mask.shape[1]
    return (length - past if whole == length else length), past
