"""Answers of a given form: any JSON object, JSON by a schema, or calls of tools.

A grammar allows at every step the tokens that can still become such an answer. llguidance compiles it; what llguidance
cannot enforce is refused in its words, before anything is computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LogitsProcessor

from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.messages import Tool
from offmoe.dialogue.sampling import end_tokens
from offmoe.dialogue.templates import CallSyntax, Channels
from offmoe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANY_OBJECT = {"type": "object"}
_STRICT_SPACE: Any = {"whitespace_flexible": False}
"""Free whitespace would let a weak model write blanks for ever."""
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # uint8 [256, 8]
_CEILINGS = np.where(_BITS, np.inf, -np.inf).astype(np.float32)
"""By the byte of a bit mask, the most that the logits of its eight tokens may be. float32 [256, 8]."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: The model's tokenizer.
        vocabulary: Number of logits of the model.
        end_tokens: Ids of tokens that end an answer.

    Raises:
        ConfigError: llguidance is not installed, or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, end_tokens: Sequence[int]):
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise ConfigError(
                "answers of a given form need llguidance; install it with: pip install 'offmoe[serve]'"
            ) from error
        self._matcher = llguidance.LLMatcher
        fast: Any = tokenizer
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(fast, n_vocab=vocabulary, eos_token=list(end_tokens) or None)
        except Exception as error:  # tokenizers that are not of the library "tokenizers"
            raise ConfigError(f"this model's tokenizer cannot be used with grammars ({error}).") from error
        self.vocabulary = vocabulary
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        self._special = {str(token.content): index for index, token in added.items() if token.special}
        self._ends = frozenset(end_tokens)

    def json(self, schema: dict[str, Any], param: str, channels: Channels | None = None) -> str:
        """The grammar of JSON by a schema.

        Args:
            schema: A JSON schema.
            param: The request's field that holds it, for messages.
            channels: The channels that the model answers in.

        Raises:
            RequestError: The schema has something that cannot be enforced.
        """
        try:
            grammar = str(self._matcher.grammar_from_json_schema(schema, overrides=_STRICT_SPACE))
        except Exception as error:  # llguidance raises what serde and Python give it
            raise RequestError(f"{param}: the schema cannot be read: {error}", param) from error
        if channels is None:
            return self._checked(grammar, param)
        answer = json.dumps({**schema, "x-guidance": _STRICT_SPACE})
        return self._lark([f"answer: {self._literal(channels.content)} json", f"json: %json {answer}"], channels, param)

    def calls(
        self, tools: Sequence[Tool], syntax: CallSyntax, param: str, several: bool, channels: Channels | None = None
    ) -> str:
        """The grammar of one call, or with `several` of one or more calls, of these tools.

        Raises:
            RequestError: The parameters of a tool cannot be enforced.
        """
        options = []
        for number, tool in enumerate(tools):
            schema = {**tool.parameters, "x-guidance": _STRICT_SPACE}
            schema.setdefault("type", "object")
            opening = f"{self._literal(syntax.opening)} {json.dumps(tool.name)} {self._literal(syntax.between)}"
            closing = f" {self._literal(syntax.closing)}"
            options.append((f"call_{number}", f"{opening} args_{number}{closing}", json.dumps(schema)))
        one = " | ".join(name for name, _, _ in options)
        more = f' ("\\n" ({one}))*' if several and syntax.closing else ""
        lines = [f"answer: ({one}){more}"]
        for number, (name, rule, schema_text) in enumerate(options):
            lines += [f"{name}: {rule}", f"args_{number}: %json {schema_text}"]
        return self._lark(lines, channels, param)

    def processor(self, grammar: str, waits: Callable[[], bool]) -> GrammarProcessor:
        """The processor that enforces a grammar in one answer. waits: whether the grammar has not begun yet."""
        return GrammarProcessor(self.matcher(grammar), self.vocabulary, waits)

    def matcher(self, grammar: str) -> Any:
        """llguidance's state of a grammar, before the first token."""
        return self._matcher(self._tokenizer, grammar)

    def _lark(self, lines: Sequence[str], channels: Channels | None, param: str) -> str:
        """The grammar of rules, of which "answer" is what follows the reasoning."""
        before: list[str] = []
        if channels is not None:
            around = [self._literal(text) for text in (channels.reasoning, channels.closing)]
            before = [f"reasoning: {around[0]} THOUGHTS {around[1]}", "THOUGHTS: /(.|\\n)*/"]
        start = f"start: {'reasoning? ' if before else ''}answer"
        grammar = "\n".join(["%llguidance {}", start, *before, *lines])
        return self._checked(str(self._matcher.grammar_from_lark(grammar)), param)

    def _literal(self, text: str) -> str:
        """A text in Lark's words. Special tokens stand by id; one that ends an answer is left out, since it may follow
        every complete answer."""
        marks = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
        words = []
        for piece in re.split(f"({marks})", text) if marks else [text]:
            token = self._special.get(piece)
            if token is None and piece:
                words.append(json.dumps(piece))
            elif token is not None and token not in self._ends:
                words.append(f"<[{token}]>")
        return " ".join(words)

    def _checked(self, grammar: str, param: str) -> str:
        matcher = self.matcher(grammar)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0]
            raise RequestError(f"{param}: this cannot be enforced: {reason}", param)
        return grammar


class GrammarSource:
    """Base of what answers with one model: it compiles the model's grammars when the first one is asked for.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self.end_tokens = end_tokens(model)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles what answers have to look like. ConfigError without llguidance."""
        return GrammarCompiler(self.tokenizer, self.vocabulary, sorted(self.end_tokens))

    @cached_property
    def vocabulary(self) -> int:
        """Token ids that the model knows."""
        embeddings: Any = self.model.get_input_embeddings()
        return int(embeddings.weight.shape[0])


class GrammarProcessor(LogitsProcessor):
    """Allows the tokens that a grammar allows next.

    Args:
        matcher: State of the grammar.
        vocabulary: Number of logits.
        waits: Whether the answer has not begun, because the model still reasons.
    """

    def __init__(self, matcher: Any, vocabulary: int, waits: Callable[[], bool]):
        import llguidance.numpy

        self._matcher, self._waits = matcher, waits
        self._fill = llguidance.numpy.fill_next_token_bitmask
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocabulary)  # int32 [1, vocabulary / 32]
        self._bytes = self._mask.view(np.uint8)[0]  # uint8 [vocabulary / 8]
        # One memory for all tokens: 600 KB that are new each time cost 150 page faults.
        self._ceilings = np.empty((len(self._bytes), 8), np.float32)
        self._most = torch.from_numpy(self._ceilings.reshape(1, -1))  # [1, vocabulary rounded up]
        self._begun = False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids: [1, tokens so far]; scores: [1, vocabulary], which change: `generate` gives a copy of logits."""
        if not self._begun and self._waits():
            return scores
        if self._begun:
            self._matcher.consume_token(int(input_ids[0, -1]))
        self._begun = True
        self._fill(self._matcher, self._mask, 0)
        # One lookup per eight tokens and one vectorized minimum: 52 us at 150,000 tokens, where masked_fill of torch
        # takes 640, since it branches on every token.
        _CEILINGS.take(self._bytes, axis=0, out=self._ceilings, mode="clip")  # "raise" would write to a copy first
        most = self._most[:, : scores.shape[-1]].to(scores.device)
        return torch.minimum(scores, most, out=scores)  # type: ignore[return-value]
