"""What `model.offload.generate_many` does around a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch

from offmoe.errors import ConfigError
from offmoe.rows.row import RowRequest
from offmoe.rows.session import Session

TokenIds = Sequence[int] | torch.Tensor


def row_requests(
    prompts: Sequence[TokenIds], max_new_tokens: int | Sequence[int], options: Mapping[str, Any], seed: int | None
) -> list[RowRequest]:
    """The requests of `generate_many`, with its arguments."""
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != len(prompts):
        raise ConfigError(f"max_new_tokens has {len(limits)} numbers for {len(prompts)} prompts; give one for each.")
    for name in ("streamer", "past_key_values", "inputs_embeds", "assistant_model"):
        if options.get(name) is not None:
            raise ConfigError(f"{name} belongs to one prompt and cannot serve several; leave it out.")
    seeds = [None if seed is None else seed + i for i in range(len(prompts))]
    return [
        RowRequest(_token_ids(prompt, index), limits[index], options, seeds[index])
        for index, prompt in enumerate(prompts)
    ]


def all_results(session: Session, on_done: Callable[[int], None] | None) -> list[Any]:
    """Run a session to its end; what `generate` gave for each prompt. The first error of a prompt is raised."""
    results: dict[int, Any] = {}
    with closing(session.run()) as ended:
        for row in ended:
            if row.strand.error is not None:
                raise row.strand.error
            results[row.index] = row.strand.result
            if on_done is not None:
                on_done(row.index)
    return [results[index] for index in range(len(results))]


def _token_ids(prompt: TokenIds, index: int) -> list[int]:
    """A prompt as a list."""
    if isinstance(prompt, torch.Tensor):
        if prompt.ndim > 2 or (prompt.ndim == 2 and len(prompt) != 1) or prompt.is_floating_point():
            raise ConfigError(f"prompt {index} has shape {tuple(prompt.shape)}; give token ids [n] or [1, n].")
        prompt = prompt.reshape(-1).tolist()
    if isinstance(prompt, str) or not all(isinstance(token, int) for token in prompt):
        raise ConfigError(f"prompt {index} has to be token ids; a tokenizer's input_ids are.")
    return list(prompt)
