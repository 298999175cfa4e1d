"""One answer that the engine is asked for, and what it reports while it computes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from offmoe.dialogue.answer import Event
from offmoe.dialogue.messages import Tool
from offmoe.dialogue.render import Prompt
from offmoe.dialogue.sampling import Sampling
from offmoe.errors import OffmoeError

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer. cached: of the prompt, whose computation an earlier answer had done."""

    prompt: int
    cached: int
    completion: int
    reasoning: int


@dataclass(frozen=True)
class Began:
    """The answer is being computed. cached: tokens of the prompt that need not be."""

    cached: int


@dataclass(frozen=True)
class Ended:
    """The answer is complete.

    finish: STOP (the model ended it, or a stop string did), LENGTH or CANCELLED.
    stop: the stop string that ended it.
    """

    finish: str
    stop: str | None
    usage: Usage


@dataclass(frozen=True)
class Broke:
    """The answer cannot be completed."""

    error: OffmoeError


Update = Began | Event | Ended | Broke


@dataclass(frozen=True)
class Request:
    """What to answer, and how.

    prompt: the prompt.
    sampling: how tokens are chosen.
    is_chat: whether reasoning and tool calls are looked for in the answer.
    tools: functions that the prompt offers.
    stops: strings that end the answer.
    grammar: what the answer has to look like, from `GrammarCompiler`; None: it is free.
    one_call: whether the answer ends with its first tool call.
    """

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    is_chat: bool = True
    tools: Sequence[Tool] = ()
    stops: Sequence[str] = ()
    grammar: str | None = None
    one_call: bool = False


class Job:
    """A request in the engine's queue. `sink` gets every update, in a thread of the engine; it must not block."""

    def __init__(self, request: Request, sink: Callable[[Update], None]):
        self.request, self.sink = request, sink
        self.asked_at = time.monotonic()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End the answer: between two decoder layers if it runs, at once if it waits. May be called by any thread."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()
