"""Strict stand-ins: a device on which no copy has landed before its event is waited for."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch

from offmoe.compute.kernels.routing_log import Entry, Verdict
from offmoe.device.backend import CpuBackend, Event, Stream
from offmoe.runtime.device_decode import DeviceDecode
from offmoe.storage.layout import Assembly, ExpertLayout
from offmoe.transfer.slot_writer import SlotWriter
from offmoe.transfer.waits import Waits


class DeferredEvent:
    """Marks a stream's work so far. That work is done when the event is waited for, and not before."""

    def __init__(self, backend: DeferredBackend):
        self._backend = backend
        self._work: list[Callable[[], None]] = []
        self.marked: DeferredStream | None = None
        self.number = 0
        """How many times it has been recorded."""
        self.seen_by: dict[DeferredStream, int] = {}
        """By stream, the last of these records that it has waited for."""

    def record(self, stream: Stream) -> None:
        assert isinstance(stream, DeferredStream)
        with self._backend.lock:
            self._work, self.marked = list(stream.pending), stream
            self.number += 1
            self.seen_by[stream] = self.number

    def synchronize(self) -> None:
        with self._backend.lock:
            for do in self._work:
                do()
            self._work = []

    def is_done(self) -> bool:
        return not self._work


class DeferredStream:
    """A copy fills its destination with NaN (0xFF bytes) when queued, and lands when an event after it is waited for.

    The source is read when the copy lands, as DMA does. A copy into a slot is a race if this stream has not waited for
    the event that marks the slot's last read. Such a copy never lands.
    """

    def __init__(self, backend: DeferredBackend, name: str):
        self._backend, self.name = backend, name
        self.pending: list[Callable[[], None]] = []

    def wait(self, event: Event) -> None:
        assert isinstance(event, DeferredEvent)
        number = event.number  # before the wait: a record that comes during it may not be seen
        event.synchronize()
        event.seen_by[self] = number

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        raw = destination.view(torch.uint8) if destination.is_contiguous() else None
        with self._backend.lock:
            racing = self._backend.unseen_reads(self, destination)
            if raw is not None:
                raw.fill_(0xFF)
            else:
                destination.fill_(float("nan"))
            done = [False]

            def land() -> None:
                if not done[0] and not racing:
                    destination.copy_(source)
                done[0] = True

            land.done = done  # type: ignore[attr-defined]
            self.pending.append(land)


class DeferredBackend(CpuBackend):
    """A CPU that behaves like a GPU as late as the rules allow, with `ram` bytes of host memory for experts."""

    unified_memory = False
    ram = 1 << 24

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.RLock()
        self.copies = DeferredStream(self, "copies")
        self._compute = DeferredStream(self, "compute")
        self.events: list[DeferredEvent] = []
        self.regions: list[tuple[int, int, int]] = []
        self.last_read: dict[int, int] = {}
        """Per guarded slot, which record of its event marks the last computation with it."""

    @property
    def compute(self) -> DeferredStream:
        return self._compute

    def host_free_bytes(self) -> int:
        return self.ram

    def event(self, *, blocking: bool = False) -> DeferredEvent:
        self.events.append(DeferredEvent(self))
        return self.events[-1]

    def guard(self, writer: SlotWriter) -> None:
        """A copy into a slot of this writer, and of no other, is a race unless it waits for the slot's last read."""
        self.regions = []
        self.last_read = {slot: _deferred(event).number for slot, event in enumerate(writer.last_read)}

        def computed(slots: Sequence[int]) -> None:
            type(writer).computed(writer, slots)
            for slot in slots:  # an event serves several slots, and may be recorded for others before the next copy
                self.last_read[slot] = _deferred(writer.last_read[slot]).number

        writer.computed = computed  # type: ignore[method-assign]
        for slot in range(len(writer.last_read)):
            start = writer.arena.bytes(slot).data_ptr()
            self.regions.append((start, start + writer.arena.bytes(slot).numel(), slot))
        self.guarded = writer

    def unseen_reads(self, stream: DeferredStream, destination: torch.Tensor) -> bool:
        address = destination.data_ptr()
        for start, stop, slot in self.regions:
            if start <= address < stop:
                event = _deferred(self.guarded.last_read[slot])
                if event.marked is not None and event.seen_by.get(stream, 0) < self.last_read[slot]:
                    return True
        return False


def _deferred(event: Event) -> DeferredEvent:
    assert isinstance(event, DeferredEvent)
    return event


class PinningBackend(DeferredBackend):
    """A deferred device that can pin `pins` buffers of RAM."""

    pins = 1000

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()

    def pin(self, address: int, nbytes: int) -> bool:
        if len(self.pinned) >= self.pins:
            return False
        self.pinned.add(address)
        return True

    def unpin(self, address: int) -> None:
        self.pinned.remove(address)


class Layer(NamedTuple):
    """A MoE layer as a slot writer sees it."""

    layout: ExpertLayout
    assembly: Assembly

    def of(self, expert: int) -> Layer:
        return self


def without(wait: str) -> Waits:
    """The waits, of which one returns at once."""
    waits = Waits()
    assert callable(getattr(waits, wait))
    setattr(waits, wait, lambda *_: None)
    return waits


def wait_until(is_true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for what another thread does. AssertionError if it never does."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def count_verdicts(monkeypatch: pytest.MonkeyPatch) -> Counter[Verdict]:
    """What a device that places misses itself will have made of the accesses of its steps."""
    seen: Counter[Verdict] = Counter()
    take = DeviceDecode._take

    def counted(decode: DeviceDecode, entry: Entry) -> None:
        seen[entry.verdict] += 1
        take(decode, entry)

    monkeypatch.setattr(DeviceDecode, "_take", counted)
    return seen
