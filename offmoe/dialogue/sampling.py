"""How the tokens of an answer are chosen, and how long it may be."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor

from offmoe.dialogue.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLDEST = 1e-6
"""Lowest temperature that is sampled. Below it sampling equals greedy decoding, and far below it logits overflow."""
RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 1 << 31),
    "min_p": (0.0, 1.0),
    "seed": (-(1 << 63), (1 << 63) - 1),
    "repetition_penalty": (1e-3, 100.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "logprobs": (0, 20),
}
"""From which to which value an option may go."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. None: as the model's generation_config says.

    Attributes:
        temperature: 0 is greedy; above it, sampling.
        top_p: Sample from the likeliest tokens whose probabilities add up to this.
        top_k: Sample from this many of the likeliest tokens.
        min_p: Sample from tokens at least this fraction as likely as the likeliest one.
        seed: The same seed gives the same answer to the same prompt.
        repetition_penalty: transformers' factor on tokens of prompt and answer.
        frequency_penalty: Subtracted from a token's logit for each time that the answer has it (OpenAI's formula).
        presence_penalty: Subtracted once if the answer has the token at all.
        logit_bias: Added to the logits of tokens, by id.
        max_tokens: Tokens of the answer at most; None: as many as the context has room for.
        logprobs: Number of alternatives to give with each token's log-probability; None: give none.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int | None = None
    logprobs: int | None = None

    def check(self) -> None:
        """RequestError that names the field, for a value that cannot be used."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RequestError(f"{name} is {value}; it has to be from {low:g} to {high:g}.", name)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}; it has to be at least 1.", "max_tokens")

    def processors(self, prompt_tokens: int) -> list[LogitsProcessor]:
        """What changes the logits before sampling. prompt_tokens: length of the prompt."""
        if not (self.frequency_penalty or self.presence_penalty or self.logit_bias):
            return []
        return [AnswerPenalties(prompt_tokens, self.frequency_penalty, self.presence_penalty, self.logit_bias)]

    def generation_config(self, model: PreTrainedModel, new_tokens: int) -> GenerationConfig:
        """transformers' settings for one answer.

        The model's own generation_config is kept for everything that a request leaves open: end tokens, suppressed
        tokens, and how to sample. What a stream of one answer cannot have (beams, several sequences, other outputs) is
        set to the plain value.

        Args:
            model: The model that answers.
            new_tokens: Tokens of the answer at most.
        """
        config = copy.deepcopy(model.generation_config)
        assert config is not None
        plain: dict[str, Any] = {
            "max_length": None,
            "min_length": None,
            "max_time": None,
            "stop_strings": None,
            "num_beams": 1,
            "num_return_sequences": 1,
            "penalty_alpha": None,
            "dola_layers": None,
            "prompt_lookup_num_tokens": None,
            "cache_implementation": None,
            "return_dict_in_generate": False,
            "output_scores": False,
            "output_logits": False,
            "output_attentions": False,
            "output_hidden_states": False,
            "use_cache": True,
            "disable_compile": True,  # a graph cannot call the planner
        }
        for name, value in plain.items():
            setattr(config, name, value)
        config.max_new_tokens = new_tokens
        given = {name: getattr(self, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
        for name, value in given.items():
            if value is not None:
                setattr(config, name, value)
        if self.top_k in (0, -1):  # clients write both for "all tokens"
            config.top_k = None
        if self.temperature is not None:
            config.do_sample = self.temperature >= COLDEST
            config.temperature = self.temperature if config.do_sample else 1.0
        if not config.do_sample:  # transformers warns of sampling options that greedy decoding ignores
            config.temperature, config.top_p, config.top_k, config.min_p = 1.0, 1.0, 50, None
        if config.pad_token_id is None:
            config.pad_token_id = next(iter(end_tokens(model)), 0)
        return config


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Ids of the tokens that end an answer."""
    ids: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


class AnswerPenalties(LogitsProcessor):
    """OpenAI's penalties: logit - count * frequency - (count > 0) * presence, and biases of single tokens.

    Counts are of the answer alone. Source: the API reference's page on frequency and presence penalties.

    Args:
        prompt_tokens: Length of the prompt.
        frequency: Subtracted per occurrence.
        presence: Subtracted once.
        bias: Added, by token id; ids outside the vocabulary are ignored.
    """

    def __init__(self, prompt_tokens: int, frequency: float, presence: float, bias: Mapping[int, float]):
        self._start, self._frequency, self._presence, self._bias = prompt_tokens, frequency, presence, bias
        self._counts: Counter[int] = Counter()
        self._seen = prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids: [1, tokens so far]; scores: [1, vocabulary]."""
        new = input_ids[0, self._seen :].tolist()
        self._counts.update(new)
        self._seen += len(new)
        changes = {token: -count * self._frequency - self._presence for token, count in self._counts.items()}
        for token, bias in self._bias.items():
            if 0 <= token < scores.shape[-1]:
                changes[token] = changes.get(token, 0.0) + bias
        if not changes:
            return scores
        scores = scores.clone()  # type: ignore[assignment]  # torch's stub widens the dtype
        ids = torch.tensor(list(changes), device=scores.device)  # [changed tokens]
        scores[0, ids] += torch.tensor(list(changes.values()), device=scores.device, dtype=scores.dtype)
        return scores
