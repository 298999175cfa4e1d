"""How far an expert on its way is: what of it is in host memory, and what in its slot already.

Nothing moves here. Readers note what they have read and copied; whoever computes waits for the bytes that it needs
next, which are there before the rest is. Bound: a lock per part of a few MB. Must never say that bytes are there which
somebody still writes; after a failure it says nothing any more, and the fetch as a whole tells what went wrong."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence

import torch


class Arrival:
    """One expert by parts, each of which is read, then copied."""

    def __init__(self) -> None:
        self.begun = False
        """Whether a reader has begun to bring it into host memory."""
        self.runs: Sequence[torch.Tensor | None] | None = None
        """Per segment the slot's memory that it goes to as it is (`Assembly.runs`); None before landing has begun."""
        self.lock = threading.Lock()
        self._read: deque[int] = deque()
        self._changed = threading.Condition()
        self._landed: set[int] = set()
        self._over = False
        self._waited_s = 0.0

    def add(self, part: int) -> None:
        """It is in host memory."""
        with self.lock:
            self._read.append(part)

    def take(self) -> int | None:
        """A part that is in host memory, for the caller to copy; None if there is none."""
        with self.lock:
            return self._read.popleft() if self._read else None

    def landed(self, part: int) -> None:
        """It is in its slot."""
        with self._changed:
            self._landed.add(part)
            self._changed.notify_all()

    def end(self) -> None:
        """Everything is in its slot, or will not be."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wait(self, parts: Collection[int]) -> None:
        """Until these parts are in their slot, or nothing more will come."""
        with self._changed:
            if self._over or self._landed.issuperset(parts):
                return
            began = time.perf_counter()
            self._changed.wait_for(lambda: self._over or self._landed.issuperset(parts))
            self._waited_s += time.perf_counter() - began

    def waited_s(self) -> float:
        """Seconds that `wait` has taken since this was asked last."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited


class Arriving:
    """An expert that is computed with as far as it is in its slot."""

    def __init__(self, arrival: Arrival, places: Mapping[str, Sequence[tuple[int, int, int]]]) -> None:
        """places: per parameter (first byte, end, part that brings these)."""
        self._arrival, self._places = arrival, places

    def wait(self, name: str, start: int, end: int) -> None:
        """Until bytes [start, end) of a parameter are there, or nothing more will come, which the fetch tells."""
        self._arrival.wait([part for first, last, part in self._places.get(name, ()) if first < end and start < last])
