"""One answer under way: transformers' generate, and what reads, stops and keeps it."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

from offmoe.dialogue.answer import AnswerReader, TokenScore
from offmoe.serve.job import CANCELLED, LENGTH, STOP, Ended, Job, Usage
from offmoe.serve.kept import CROP, EXACT, NOTHING, NUMERIC, Kept, KeptCaches, crop

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offmoe.dialogue.constraint import GrammarCompiler
    from offmoe.dialogue.templates import ResponseFormat
    from offmoe.handle import Offload
    from offmoe.serve.meters import Meters


class Served(Protocol):
    """The part of the engine that all its answers share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    offload: Offload
    answers: ResponseFormat | None
    end_tokens: frozenset[int]
    chunk: int
    reuse_kind: str
    kept: KeptCaches
    meters: Meters

    @property
    def grammars(self) -> GrammarCompiler: ...


class Cancelled(Exception):
    """Ends an answer that nobody waits for, between two decoder layers."""


class Answering:
    """One answer of an engine. It is transformers' streamer: `generate` gives it every token.

    Args:
        engine: The engine.
        job: What to answer.
        new_tokens: Tokens of the answer at most.
        beginning: The cache that holds a beginning of the prompt; None: all of it is computed.
    """

    def __init__(self, engine: Served, job: Job, new_tokens: int, beginning: Kept | None):
        self.job = job
        request = job.request
        self._engine, self._request = engine, request
        self.new_tokens = new_tokens
        self._ids = list(request.prompt.ids)
        self.prompt_tokens = len(self._ids)
        self.cached = 0 if beginning is None else len(beginning.ids)
        self._cache = None if beginning is None else beginning.cache
        self._snapshot: DynamicCache | None = None
        self._logits: torch.Tensor | None = None
        self._tokens: list[int] = []
        self._last_at = job.asked_at
        self._is_prompt = True
        self._reader = AnswerReader(
            engine.tokenizer,
            request.prompt,
            engine.answers if request.is_chat else None,
            request.tools,
            request.stops,
            engine.end_tokens,
        )

    def run(self) -> None:
        """Compute the answer. Raises Cancelled if it is cancelled meanwhile."""
        model, sampling = self._engine.model, self._request.sampling
        config = sampling.generation_config(model, self.new_tokens)
        inputs: dict[str, Any] = {}
        if self._engine.reuse_kind != NOTHING:
            config.prefill_chunk_size = self._piece()
            if self._cache is None:
                self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))
            inputs["past_key_values"] = self._cache
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        ids = torch.tensor([self._ids], device=model.device)  # [1, prompt tokens]
        # The class's own function: the engine holds the model already.
        model_class: Any = type(model)
        model_class.generate(
            model,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=self,
            stopping_criteria=[_StopsWith(self)],
            logits_processor=self._processors(),
            **inputs,
        )
        self._send(self._reader.finish())

    def _piece(self) -> int:
        """Tokens of the prompt that pass at once. In the mode "numeric" they change last bits only, so all that fit."""
        engine = self._engine
        if engine.kept.mode == NUMERIC and engine.reuse_kind == CROP:
            return engine.offload.prefill_chunk(1, self.prompt_tokens - self.cached, self.cached)
        return engine.chunk

    def put(self, tokens: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with every new token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        now = time.monotonic()
        self._engine.meters.token(now - self._last_at, is_first=not self._tokens)
        self._last_at = now
        token = int(tokens)
        self._tokens.append(token)
        self._send(self._reader.add(token, self._score(token)))

    def end(self) -> None:
        """Called by `generate` after the last token."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self._tokens)

    @property
    def is_over(self) -> bool:
        """Whether no further token is needed."""
        reader = self._reader
        return reader.stop is not None or self.job.is_cancelled or (self._request.one_call and reader.calls > 0)

    def check_cancelled(self) -> None:
        if self.job.is_cancelled:
            raise Cancelled

    def before_pass(self, cache: DynamicCache | None) -> None:
        """Copy the state that is to be kept, if the pass would go beyond it. cache: as given to the pass."""
        kept = self._engine.kept
        if cache is None or not kept.needs_snapshot or self._snapshot is not None:
            return
        if cache.get_seq_length() == kept.boundary(self.prompt_tokens) > 0:
            self._snapshot = copy.deepcopy(cache)

    def after_pass(self, logits: torch.Tensor) -> None:
        """Keep what log-probabilities need. logits: [1, tokens, vocabulary]."""
        if self._request.sampling.logprobs is not None:
            self._logits = logits[0, -1].float()  # [vocabulary]

    def kept(self, caches: KeptCaches) -> Kept | None:
        """What the next turn of the conversation can begin with."""
        if self._cache is None or not caches.boundary(self.prompt_tokens):
            return None
        if self._engine.reuse_kind != CROP:
            boundary = caches.boundary(self.prompt_tokens)
            return None if self._snapshot is None else Kept(tuple(self._ids[:boundary]), self._snapshot)
        # A pass that was broken off has lengthened some layers only.
        length = min(self._cache.get_seq_length(layer) for layer in range(len(self._cache.layers)))
        if caches.mode == EXACT:
            length = min(length, self.prompt_tokens) // caches.chunk * caches.chunk
        crop(self._cache, length)
        return Kept(tuple((self._ids + self._tokens)[:length]), self._cache)

    def ended(self) -> Ended:
        """How the answer ended."""
        reader = self._reader
        if reader.stop is not None or (self._tokens and self._tokens[-1] in self._engine.end_tokens):
            finish = STOP
        elif self.job.is_cancelled:
            finish = CANCELLED
        else:
            finish = LENGTH if len(self._tokens) >= self.new_tokens else STOP
        usage = Usage(self.prompt_tokens, self.cached, len(self._tokens), reader.reasoning_tokens)
        return Ended(finish, reader.stop, usage)

    def _processors(self) -> list[LogitsProcessor]:
        processors = self._request.sampling.processors(self.prompt_tokens)
        if self._request.grammar is not None:
            grammars = self._engine.grammars
            processors.append(grammars.processor(self._request.grammar, lambda: self._reader.is_reasoning))
        return processors

    def _send(self, events: Any) -> None:
        for event in events:
            self.job.sink(event)

    def _score(self, token: int) -> TokenScore | None:
        count = self._request.sampling.logprobs
        if count is None or self._logits is None:
            return None
        logprobs = torch.log_softmax(self._logits, dim=-1)  # [vocabulary]
        values, ids = logprobs.topk(count)
        decode = self._engine.tokenizer.decode
        likeliest = tuple((int(i), str(decode([int(i)])), float(value)) for i, value in zip(ids, values, strict=True))
        return TokenScore(token, str(decode([token])), float(logprobs[token]), likeliest)


class _StopsWith(StoppingCriteria):
    """Ends `generate` with its answer."""

    def __init__(self, answering: Answering):
        self._answering = answering

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        """input_ids: [1, tokens so far] -> [1]."""
        over = torch.full((input_ids.shape[0],), self._answering.is_over, device=input_ids.device)
        return over  # type: ignore[return-value]
