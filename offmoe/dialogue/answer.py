"""Reads the tokens of an answer into text, reasoning and tool calls, as they come.

Streams and whole answers take the same path, so they hold the same text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offmoe.dialogue.decode import TextDecoder
from offmoe.dialogue.messages import Tool, ToolCall
from offmoe.dialogue.render import Prompt
from offmoe.dialogue.templates import ResponseFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
CALLS_FIELD = "tool_calls"
_FAULTS = (ValueError, TypeError, AttributeError, KeyError, IndexError)
"""What transformers' parser raises: ValueError for a call that it cannot read, the others for a tool's schema."""


@dataclass(frozen=True)
class TokenScore:
    """The log-probability of one token and of its likeliest alternatives.

    token: its id. text: its text. alternatives: (id, text, log-probability), the likeliest first.
    """

    token: int
    text: str
    logprob: float
    alternatives: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Text:
    """A piece of the answer. scores: of the tokens that completed it, if they were asked for."""

    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class Call:
    """A complete call of a tool."""

    call: ToolCall


Event = Text | Reasoning | Call


class StopStrings:
    """Finds the first of several strings in a text that comes in pieces.

    Text that may be the beginning of one is held back until that is known.

    Args:
        stops: The strings; empty ones are ignored.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None
        """The string that ended the text."""

    def add(self, text: str) -> str:
        """The text that can be shown, up to a stop string if one is complete."""
        if not self._stops:
            return text
        text = self._held + text
        # The one that is complete first, however the text is cut into pieces.
        ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            end, _, self.found = min(ends)
            self._held = ""
            return text[: end - len(self.found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text that was held back."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class AnswerReader:
    """Turns the tokens of one answer into events.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The prompt that the answer continues. A template may have written the beginning of the answer, such as
            an opening <think>.
        answers: How the model writes reasoning and tool calls; None: the answer is plain text.
        tools: Functions that were offered. Their schemas give the types of arguments.
        stops: Strings that end the answer; they are no part of it. They are looked for in text, not in reasoning.
        end_tokens: Ids of tokens that end an answer; they give no text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        answers: ResponseFormat | None = None,
        tools: Sequence[Tool] = (),
        stops: Sequence[str] = (),
        end_tokens: Collection[int] = (),
    ):
        self._decoder = TextDecoder(tokenizer, prompt.ids, skip_special=answers is None)
        self._ends, self._stops = frozenset(end_tokens), StopStrings(stops)
        self._parser: Any = None
        self._region: str | None = None
        self._raw = ""
        """What a region holds that is parsed when it closes."""
        self._began = False
        self._scores: list[TokenScore] = []
        self.tokens = 0
        """Tokens read, with the one that ended the answer."""
        self.reasoning_tokens = 0
        self.calls = 0
        if answers is not None:
            self._parser = tokenizer.get_response_parser(
                response_template=answers.template, prefix=prompt.text, tools=[tool.for_template() for tool in tools]
            )
            self._read(self._parser.initial_events)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the answer; None while there is none."""
        return self._stops.found

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._region in REASONING_FIELDS

    def add(self, token: int, score: TokenScore | None = None) -> list[Event]:
        """The events that a token completes. score: its log-probabilities, if they are to be shown."""
        self.tokens += 1
        if token in self._ends or self.stop is not None:
            return []
        if self.is_reasoning:
            self.reasoning_tokens += 1
        elif score is not None:
            self._scores.append(score)
        piece = self._decoder.add(token)
        return self._text(piece) if piece else []

    def finish(self) -> list[Event]:
        """The events that end the answer. A tool call that was cut off is dropped; its text is kept as text."""
        if self.stop is not None:
            return []
        events = self._text(self._decoder.finish())
        if self._parser is not None:
            parser, self._parser = self._parser, None
            try:
                events += self._read(parser.finalize()[1])
            except _FAULTS:  # a region that cannot be parsed
                if self._region == CALLS_FIELD:
                    events += self._show(self._raw)
        rest = self._stops.finish()
        if rest or self._scores:
            events.append(Text(rest, self._taken_scores()))
        return events

    def _text(self, piece: str) -> list[Event]:
        if self._parser is None:
            return self._show(piece)
        try:
            return self._read(self._parser.feed(piece))
        except _FAULTS:  # a tool call that is no JSON: the rest is text, since the parser cannot go on
            self._parser, self._region = None, None
            return self._show(self._raw)

    def _read(self, changes: Sequence[Mapping[str, Any]]) -> list[Event]:
        """Translate the parser's events."""
        events: list[Event] = []
        for change in changes:
            kind, field = change["type"], change["field"]
            if kind == "region_open":
                self._region, self._raw = field, ""
            elif kind == "region_chunk" and change.get("dirty"):
                self._raw += change["text"]
            elif kind == "region_chunk" and field in REASONING_FIELDS:
                events.append(Reasoning(change["text"]))
            elif kind == "region_chunk":
                events += self._show(change["text"])
            elif kind == "region_close":
                self._region = None
                if field == CALLS_FIELD:
                    events += self._calls(change["value"])
        return events

    def _show(self, piece: str) -> list[Event]:
        if not self._began and self._parser is not None:
            piece = piece.lstrip("\n")  # blank lines between reasoning and answer
        self._began = self._began or bool(piece)
        shown = self._stops.add(piece)
        return [Text(shown, self._taken_scores())] if shown else []

    def _taken_scores(self) -> tuple[TokenScore, ...]:
        scores, self._scores = tuple(self._scores), []
        return scores

    def _calls(self, value: Any) -> list[Event]:
        events: list[Event] = []
        for item in value if isinstance(value, list) else [value]:
            function = item.get("function") if isinstance(item, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                events += self._show(self._raw)
                continue
            arguments = function.get("arguments") or {}
            if isinstance(arguments, str):
                arguments = _object(arguments)
            self.calls += 1
            events.append(Call(ToolCall(f"call_{uuid.uuid4().hex[:24]}", function["name"], arguments)))
        return events


def _object(text: str) -> dict[str, Any]:
    """The JSON object of a text; a text that is none becomes its only member, "text"."""
    try:
        value = json.loads(text)
    except ValueError:
        return {"text": text}
    return value if isinstance(value, dict) else {"text": text}
