"""The order and the pace of the background fill: experts that nothing has asked for, read into free places.

Moves: nothing. Readers carry the batches out (fill_reader.py).
Bound: one lock, that of the ticket queue, which every caller holds.
Must never: keep a demand waiting, or count an expert that has not landed, unless an access demands it and waits for it.

A fill has a place that was free when it was planned: a slot, a RAM slot, or both. A fetch that gets the same place, or
brings the same expert, displaces the fill (`displace`). What has landed counts from the next access on (`settle`).

While the model computes, the fill reads in small steps and rests after each. While it does not, all readers read.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import NamedTuple

from offmoe.storage.read_plan import ReadPlan
from offmoe.storage.store import ExpertStore
from offmoe.text import format_size
from offmoe.transfer.staging import HostMemory, window_bytes
from offmoe.transfer.ticket import DEMAND, FILL, NO_SLOT, Ticket
from offmoe.types import ExpertKey, Fetch, Fill

IDLE_AFTER_S = 0.1
"""Seconds after the last access from which the model counts as idle."""
REST = 8.0
"""Rest after a step of reading while the model computes, in durations of the step: a ninth of the disk's time."""
GROUP_BYTES = 64 << 20
"""Experts that follow each other in the order of the fill, up to these bytes, are read in the order of the disk."""


class FillProgress(NamedTuple):
    """How far the background fill has come.

    experts, nbytes: what has been brought: experts, and their bytes at rest. total_experts, total_bytes: what it set
        out to bring. A demand may bring an expert first; it then counts in neither.
    running: whether it goes on.
    error: why it ended early; None if it did not.
    """

    experts: int = 0
    nbytes: int = 0
    total_experts: int = 0
    total_bytes: int = 0
    running: bool = False
    error: str | None = None

    def describe(self) -> str:
        """The progress in a few words; "" if there is no fill."""
        if not self.total_experts:
            return ""
        part = "" if self.experts == self.total_experts else f" of {self.total_experts}"
        return f"{self.experts}{part} experts ({format_size(self.nbytes)}) in the background"


@dataclass(eq=False)
class FillBatch:
    """Experts that are read together, because they are small and near each other on the disk; or a single one."""

    tickets: Sequence[Ticket]
    plan: ReadPlan
    """How all of them are read into one buffer."""
    direct: bool
    """Whether the only expert is read into its RAM slot itself, without a buffer."""
    windowed: bool
    """Whether the buffer is one of the fill's own windows, not a staging buffer."""
    buffer: int | None = None
    """The buffer while a reader carries the batch out."""
    displaced: bool = False
    """Whether a demand needs the buffer: the read ends, and begins again later."""
    error: BaseException | None = None
    step_began_s: float = 0.0
    issued: threading.Event = field(default_factory=threading.Event)
    """Set when no reader works on the batch any more."""

    @property
    def is_useless(self) -> bool:
        """Whether every expert of the batch has been displaced."""
        return all(ticket.is_useless for ticket in self.tickets)

    @property
    def is_demanded(self) -> bool:
        """Whether computation waits for one of the experts."""
        return any(ticket.priority == DEMAND and not ticket.dropped for ticket in self.tickets)


def fill_batches(store: ExpertStore, fills: Sequence[Fill], host: HostMemory) -> list[FillBatch]:
    """Divide fills into batches, in an order that follows both their own and the disk's."""
    window = window_bytes(store.buffer_bytes)
    batches: list[FillBatch] = []
    for group in _by_bytes(store, fills, GROUP_BYTES):
        on_disk = sorted(group, key=lambda fill: store.position(fill.key))
        for near in _by_bytes(store, on_disk, window):
            batches += _batches(store, near, host, window)
    return batches


def _by_bytes(store: ExpertStore, fills: Sequence[Fill], most: int) -> list[list[Fill]]:
    """The fills in their order, in groups of at most `most` bytes, or of one."""
    groups: list[list[Fill]] = []
    nbytes = 0
    for fill in fills:
        size = store.plan_of([fill.key]).nbytes
        if not groups or nbytes + size > most:
            groups.append([])
            nbytes = 0
        groups[-1].append(fill)
        nbytes += size
    return groups


def _batches(store: ExpertStore, fills: Sequence[Fill], host: HostMemory, window: int) -> list[FillBatch]:
    """One batch, or several if what lies between the experts on the disk does not fit the window with them."""
    plan = store.plan_of([fill.key for fill in fills])
    alone = len(fills) == 1
    if not alone and plan.nbytes > window:
        half = len(fills) // 2
        return [*_batches(store, fills[:half], host, window), *_batches(store, fills[half:], host, window)]
    tickets = []
    for fill in fills:
        slot = NO_SLOT if fill.slot is None else fill.slot
        tickets.append(Ticket(Fetch(fill.key, slot, None, fill.host), FILL, filling=True))
    fetch = tickets[0].fetch
    direct = alone and fetch.host is not None and (fetch.slot == NO_SLOT or not host.needs_staging(fetch.host))
    return [FillBatch(tickets, plan, direct, windowed=not alone)]


class FillQueue:
    """The batches of one model's background fill. Its callers hold the lock of the ticket queue."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: gives the time in seconds."""
        self.waiting: deque[FillBatch] = deque()
        self.running: list[FillBatch] = []
        """Batches that readers carry out."""
        self.idle_windows: list[int] = []
        """The windows that no batch reads into."""
        self.is_open = False
        """Whether a fill may still take effect."""
        self._clock = clock
        self._accessed_s = self._rest_until_s = -1.0e9
        self._landed: list[Ticket] = []
        """Tickets that have landed since the last access."""
        self._in_slot: dict[int, Ticket] = {}
        """By slot, the fill whose place it is: until a fetch takes it, or no reader writes there any more."""
        self._in_ram: dict[int, Ticket] = {}
        """The same by RAM slot."""
        self._of_key: defaultdict[ExpertKey, list[Ticket]] = defaultdict(list)
        self._sizes: dict[Ticket, int] = {}
        self._progress = FillProgress()
        self._begins_anew = False
        """Whether the progress is that of a fill which was dropped."""

    def add(self, batches: Sequence[FillBatch], size_of: Callable[[ExpertKey], int]) -> None:
        """Queue batches behind those that wait. size_of: gives the bytes of an expert."""
        if self._begins_anew:
            self._progress, self._begins_anew = FillProgress(error=self._progress.error), False
        self.waiting.extend(batches)
        for ticket in (ticket for batch in batches for ticket in batch.tickets):
            fetch = ticket.fetch
            if fetch.slot != NO_SLOT:
                assert fetch.slot not in self._in_slot
                self._in_slot[fetch.slot] = ticket
            if fetch.host is not None:
                assert fetch.host not in self._in_ram
                self._in_ram[fetch.host] = ticket
            self._of_key[fetch.key].append(ticket)
            self._sizes[ticket] = size_of(fetch.key)
            self._count("total", 1, self._sizes[ticket])
            self.is_open = True

    @property
    def progress(self) -> FillProgress:
        return self._progress._replace(running=bool(self.waiting or self.running))

    @property
    def is_idle(self) -> bool:
        """Whether the model computes nothing at the moment."""
        return self._clock() - self._accessed_s > IDLE_AFTER_S

    def rest_s(self) -> float:
        """Seconds that the fill rests from now on; 0 if it may go on."""
        return 0.0 if self.is_idle else max(0.0, self._rest_until_s - self._clock())

    def patience_s(self) -> float | None:
        """Seconds after which a reader without work should ask again; None if only a notice can bring work."""
        return max(self.rest_s(), IDLE_AFTER_S / 4) if self.waiting else None

    def step_begins(self, batch: FillBatch) -> None:
        """A reader goes on with a batch."""
        batch.step_began_s = self._clock()

    def step_ended(self, batch: FillBatch) -> None:
        """A reader has read a step of a batch, or copied what it read: it rests, if the model computes."""
        now = self._clock()
        self._rest_until_s = max(self._rest_until_s, now + REST * (now - batch.step_began_s))

    def first(self, most: int) -> FillBatch | None:
        """The next batch to carry out. most: batches at once if the model is idle; else there is one."""
        if self.rest_s() or len(self.running) >= (most if self.is_idle else 1):
            return None
        while self.waiting and self.waiting[0].is_useless:
            self.waiting.popleft()
        if not self.waiting or (self.waiting[0].windowed and not self.idle_windows):
            return None
        return self.waiting[0]

    def take(self, batch: FillBatch) -> FillBatch:
        """Take the first batch off the queue."""
        assert self.waiting.popleft() is batch
        self.running.append(batch)
        if batch.windowed:
            batch.buffer = self.idle_windows.pop()
        self.step_begins(batch)
        return batch

    def landed(self, ticket: Ticket, nbytes: int) -> None:
        """A ticket's copies have been queued. One that was displaced meanwhile counts for nothing. nbytes: at rest."""
        if not ticket.dropped:
            self._count("", 1, nbytes)
            if ticket.filling:
                self._landed.append(ticket)
        else:
            self._vacate(ticket)
        ticket.issued.set()
        ticket.arrival.end()

    def finish(self, batch: FillBatch) -> None:
        """No reader works on a batch any more, with success or not."""
        self.step_ended(batch)
        self.running.remove(batch)
        if batch.windowed:
            assert batch.buffer is not None
            self.idle_windows.append(batch.buffer)
        batch.buffer = None
        rest = [ticket for ticket in batch.tickets if not ticket.issued.is_set()]
        if batch.displaced and batch.error is None and not all(ticket.dropped for ticket in rest):
            batch.displaced = False
            self.waiting.appendleft(batch)
            return
        for ticket in rest:
            ticket.error = batch.error or CancelledError()
            self._forget(ticket)
            self._vacate(ticket)
            ticket.issued.set()
            ticket.arrival.end()
        batch.issued.set()

    def fail(self, reason: str) -> None:
        """End the fill: what has not begun is not read."""
        self._progress = self._progress._replace(error=reason)
        for ticket in [ticket for batch in self.waiting for ticket in batch.tickets]:
            self._drop(ticket)
        self.waiting.clear()

    def settle(self, demanded: Collection[ExpertKey]) -> list[Ticket]:
        """The tickets that take effect before an access: those that have landed, and those under way that it demands.

        Computation waits for the latter, so they become demands.
        """
        self._accessed_s = self._clock()
        settled, self._landed = self._landed, []
        if self.running:
            under_way = {t for batch in self.running if not batch.displaced for t in batch.tickets}
            for key in demanded:
                for ticket in self._of_key.get(key, ()):
                    if ticket in under_way and not ticket.dropped and ticket not in settled:
                        ticket.priority = DEMAND
                        settled.append(ticket)
        for ticket in settled:
            self._forget(ticket)
            self._vacate(ticket)
            ticket.filling = False
        self.is_open = bool(self._of_key or self.waiting or self.running)
        return settled

    def displace(self, fetch: Fetch) -> tuple[Ticket | None, Ticket | None]:
        """Drop the fills whose place or expert a fetch takes.

        Returns:
            (the fill that held its slot, the fill that held its RAM slot), None where there is none. A fill that was
            displaced before, by a fetch of its expert to another place, holds its places while it may write there.
        """
        in_slot = self._in_slot.pop(fetch.slot, None)
        in_ram = None if fetch.host is None else self._in_ram.pop(fetch.host, None)
        for ticket in {t for t in (in_slot, in_ram, *self._of_key.get(fetch.key, ())) if t is not None}:
            self._drop(ticket)
        return in_slot, in_ram

    def clear(self) -> list[FillBatch]:
        """Drop everything; returns the batches that readers still work on. What is added next counts from zero."""
        for ticket in [*self._sizes]:
            self._drop(ticket)
        self.waiting.clear()
        self._landed.clear()
        self.is_open = False
        self._begins_anew = True
        return list(self.running)

    def _drop(self, ticket: Ticket) -> None:
        """Keep a fill from taking effect. Whoever waits for its place waits no longer than a reader writes to it."""
        size = self._sizes.get(ticket)
        if size is None:
            return
        ticket.drop()
        self._count("total", -1, -size)
        if ticket in self._landed:
            self._landed.remove(ticket)
            self._count("", -1, -size)
        batch = next((batch for batch in self.running if ticket in batch.tickets), None)
        writes = batch is not None and (batch.direct or ticket.landing)
        if not writes and not ticket.issued.is_set():
            ticket.issued.set()
            ticket.arrival.end()
        self._forget(ticket)
        if ticket.issued.is_set():
            self._vacate(ticket)

    def _vacate(self, ticket: Ticket) -> None:
        """Free a ticket's places: no reader writes there any more, or the engine keeps the ticket from now on."""
        fetch = ticket.fetch
        if self._in_slot.get(fetch.slot) is ticket:
            del self._in_slot[fetch.slot]
        if fetch.host is not None and self._in_ram.get(fetch.host) is ticket:
            del self._in_ram[fetch.host]

    def _forget(self, ticket: Ticket) -> None:
        """Take a ticket off the books, dropped or in effect."""
        fetch = ticket.fetch
        if self._sizes.pop(ticket, None) is None:
            return
        self._of_key[fetch.key].remove(ticket)
        if not self._of_key[fetch.key]:
            del self._of_key[fetch.key]

    def _count(self, which: str, experts: int, nbytes: int) -> None:
        """Add to what has been brought, or to the "total" that is to be brought."""
        now = self._progress
        if which == "total":
            self._progress = now._replace(
                total_experts=now.total_experts + experts, total_bytes=now.total_bytes + nbytes
            )
        else:
            self._progress = now._replace(experts=now.experts + experts, nbytes=now.nbytes + nbytes)
