"""Between the event loop and the engine: the answers to one HTTP request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.requests import Request as HttpRequest

from offmoe.dialogue.answer import Call, Reasoning, Text, TokenScore
from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.messages import ToolCall
from offmoe.errors import OffmoeError
from offmoe.serve.engine import Engine
from offmoe.serve.job import CANCELLED, LENGTH, Began, Broke, Ended, Job, Request, Update, Usage

PING_S = 10.0
"""Seconds of silence after which a stream says that it lives. Some clients give up after 20 s."""
GATHER_S = 0.015
"""Seconds for which a stream gathers tokens, unless an answer ends. Every event costs the computing thread the
interpreter for a moment."""
DISCONNECT_S = 0.05
"""Seconds between two looks at whether the client of a whole answer is still there."""


class Asking:
    """The answers to one HTTP request. Made and read in the event loop.

    Args:
        engine: The engine.
        requests: What to answer; each becomes one answer.

    Raises:
        RequestError: One of them cannot be answered; none is.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]):
        self._loop = asyncio.get_running_loop()
        self._arrived, self._ended = asyncio.Event(), asyncio.Event()
        self._updates: deque[tuple[int, Update]] = deque()
        self._signaled = False
        self._is_cancelled = False
        self._open = len(requests)
        self._jobs = [Job(request, self._sink(index)) for index, request in enumerate(requests)]
        try:
            for job in self._jobs:
                engine.submit(job)
        except RequestError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Nobody waits for the answers any more."""
        self._is_cancelled = True
        for job in self._jobs:
            job.cancel()

    async def batches(self, gather_s: float = GATHER_S) -> AsyncIterator[list[tuple[int, Update]]]:
        """Updates of all answers, as (index, update), until all have ended; [] after a while of silence.

        Ending the iteration early cancels the answers.

        Args:
            gather_s: Seconds for which updates are gathered, unless an answer ends.
        """
        try:
            while self._open:
                try:
                    await asyncio.wait_for(self._arrived.wait(), PING_S)
                except asyncio.TimeoutError:
                    yield []
                    continue
                self._arrived.clear()
                self._ended.clear()
                self._signaled = False
                batch = []
                while self._updates:
                    batch.append(self._checked(*self._updates.popleft()))
                self._open -= sum(isinstance(update, Ended | Broke) for _, update in batch)
                yield _merged(batch)
                if self._open:
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self._ended.wait(), gather_s)
        finally:
            self.cancel()

    async def whole(self, http: HttpRequest) -> list[Answer]:
        """All answers, complete. asyncio.CancelledError if the client leaves before.

        Raises:
            OffmoeError: An answer cannot be completed.
        """
        answers = [Answer() for _ in self._jobs]
        watch = asyncio.create_task(self._cancel_without(http))
        try:
            async for batch in self.batches(gather_s=PING_S):
                for index, update in batch:
                    answers[index].add(update)
        finally:
            watch.cancel()
        return answers

    async def _cancel_without(self, http: HttpRequest) -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(DISCONNECT_S)
        self.cancel()

    def _checked(self, index: int, update: Update) -> tuple[int, Update]:
        """An answer that the engine has cancelled by itself is broken for its client."""
        if isinstance(update, Ended) and update.finish == CANCELLED and not self._is_cancelled:
            return index, Broke(RequestError("the server is shutting down.", None, "shutting_down", 503))
        return index, update

    def _sink(self, index: int) -> Callable[[Update], None]:
        """The sink of one answer. The engine calls it in a thread of its own."""

        def sink(update: Update) -> None:
            self._updates.append((index, update))
            try:
                if not self._signaled:
                    self._signaled = True
                    self._loop.call_soon_threadsafe(self._arrived.set)
                if isinstance(update, Ended | Broke):
                    self._loop.call_soon_threadsafe(self._ended.set)
            except RuntimeError:  # the loop has ended
                self.cancel()

        return sink


@dataclass
class Answer:
    """A complete answer. `finish` and `usage` are of its end."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish: str = LENGTH
    stop: str | None = None
    usage: Usage = field(default_factory=lambda: Usage(0, 0, 0, 0))

    def add(self, update: Update) -> None:
        """Take an update. OffmoeError if the answer cannot be completed."""
        match update:
            case Text(text, scores):
                self.text += text
                self.scores += scores
            case Reasoning(text):
                self.reasoning += text
            case Call(call):
                self.calls.append(call)
            case Ended(finish, stop, usage):
                self.finish, self.stop, self.usage = finish, stop, usage
            case Broke(error):
                raise error
            case Began():
                pass


def _merged(batch: list[tuple[int, Update]]) -> list[tuple[int, Update]]:
    """The same updates, with neighboring pieces of one answer in one."""
    merged: list[tuple[int, Update]] = []
    for index, update in batch:
        previous = merged[-1] if merged else None
        if previous is not None and previous[0] == index:
            before = previous[1]
            if isinstance(before, Text) and isinstance(update, Text):
                merged[-1] = (index, Text(before.text + update.text, before.scores + update.scores))
                continue
            if isinstance(before, Reasoning) and isinstance(update, Reasoning):
                merged[-1] = (index, Reasoning(before.text + update.text))
                continue
        merged.append((index, update))
    return merged


def total(usages: Sequence[Usage]) -> Usage:
    """Usage of several answers; a prompt that they share counts once."""
    return Usage(
        usages[0].prompt,
        usages[0].cached,
        sum(usage.completion for usage in usages),
        sum(usage.reasoning for usage in usages),
    )


def as_request_error(error: OffmoeError) -> RequestError:
    """An error of the runtime, as an HTTP API reports it."""
    return error if isinstance(error, RequestError) else RequestError(str(error), code="server_error", status=500)
