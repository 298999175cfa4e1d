"""How far one expert has come: which parts are in host memory, and which are in its slot.

Moves: nothing. Readers note what they have read and copied; the computing thread waits for the bytes that it needs
next, which may be in the slot before the rest is.
Bound: one lock per part of a few MB.
Must never: report bytes that a reader still writes. After a failure it reports nothing more and ends every wait;
`TransferEngine.ready` then raises the error.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence

from offmoe.storage.layout import Early


class Arrival:
    """One expert on its way, by parts: each part is read into host memory, then copied into the slot."""

    def __init__(self) -> None:
        self.begun = False
        """Whether a reader has begun to read the expert into host memory."""
        self.early: Early | None = None
        """How parts get into the slot one by one. None before the first of them does."""
        self.lock = threading.Lock()
        self._read: deque[int] = deque()
        self._torn: dict[tuple[int, int], int] = {}
        """Bytes that are in host memory of a unit that several parts bring, by segment and first byte."""
        self._changed = threading.Condition()
        self._landed: set[int] = set()
        self._ended = False
        self._waited_s = 0.0

    def part_read(self, part: int) -> None:
        """Note that a part is in host memory."""
        with self.lock:
            self._read.append(part)

    def take_part(self) -> int | None:
        """Take the oldest part that is in host memory and not yet copied; None if there is none."""
        with self.lock:
            return self._read.popleft() if self._read else None

    def whole_units(self, segment: int, start: int, end: int, unit: int) -> tuple[int, int]:
        """The bytes of a segment that can be put into the slot now that its bytes [start, end) are in host memory.

        To be called once for all bytes of a part.

        Args:
            segment: its number.
            start, end: of its bytes that the part brings.
            unit: bytes that have to be put at once.
        Returns:
            (first, end) of whole units that no other call returns; equal if there are none.
        """
        low, high = -(-start // unit) * unit, end // unit * unit  # of the units that the part alone brings
        if low > high:  # it is inside of one unit
            return (high, low) if self._is_whole(segment, high, end - start, unit) else (low, low)
        if low > start and self._is_whole(segment, low - unit, low - start, unit):
            low -= unit
        if end > high and self._is_whole(segment, high, end - high, unit):
            high += unit
        return low, high

    def _is_whole(self, segment: int, first: int, nbytes: int, unit: int) -> bool:
        """Note that more bytes of a unit are there; whether they are the last."""
        with self.lock:
            total = self._torn[segment, first] = self._torn.get((segment, first), 0) + nbytes
        return total == unit

    def part_landed(self, part: int) -> None:
        """Note that what gets into the slot early is there of a part, but for units that other parts bring, too."""
        with self._changed:
            self._landed.add(part)
            self._changed.notify_all()

    def end(self) -> None:
        """Note that no more parts will land: all have, or the fetch failed or was dropped."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, parts: Collection[int]) -> None:
        """Block until these parts are in the slot, or until no more parts will land."""
        with self._changed:
            if self._ended or self._landed.issuperset(parts):
                return
            began = time.perf_counter()
            self._changed.wait_for(lambda: self._ended or self._landed.issuperset(parts))
            self._waited_s += time.perf_counter() - began

    def take_waited_s(self) -> float:
        """Seconds that `wait` has blocked since the last call of this method."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited


class Arriving:
    """An expert that can be computed with while it arrives in its slot."""

    def __init__(self, arrival: Arrival, places: Mapping[str, Sequence[tuple[int, int, int]]]) -> None:
        """places: per parameter, (first byte, end byte, part that brings these bytes)."""
        self._arrival, self._places = arrival, places

    def wait(self, name: str, start: int, end: int) -> None:
        """Block until bytes [start, end) of a parameter have landed.

        It also returns if the fetch failed; `TransferEngine.ready` raises the error then.
        """
        self._arrival.wait([part for first, last, part in self._places.get(name, ()) if first < end and start < last])

    def wait_for(self, names: Iterable[str]) -> None:
        """Block until these parameters have landed as a whole; as `wait` otherwise."""
        self._arrival.wait({part for name in names for _, _, part in self._places.get(name, ())})
