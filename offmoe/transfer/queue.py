"""The order in which readers take tickets: demands, the newest prefetches, older prefetches, the background fill.

Moves: nothing. Staging buffers are given out here.
Bound: one lock, held for some microseconds per ticket.
Must never: hand out a ticket after `close`, or hold the lock while bytes move.

Before a reader takes a new ticket, it helps with an earlier one whose read is divided into parts.

Speculative tickets (prefetches and read-ahead) get at most half of the readers. A demand therefore always finds a free
reader and shares the disk with the other half only, however many prefetches wait or run.

A ticket gets its staging buffer when a reader takes it. If buffers were given out in another order, a later ticket that
has a buffer and waits for its slot could keep an earlier ticket without a buffer for ever. A read-ahead has no slot:
after its read it keeps its buffer until a fetch adopts it or it is dropped.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Iterable

from offmoe.transfer.fill_queue import FillBatch, FillQueue
from offmoe.transfer.staging import StagingPlan
from offmoe.transfer.ticket import DEMAND, FILL, LATER, NEXT, NO_SLOT, SharedRead, Ticket


class TicketQueue:
    """Tickets that wait, run, or stay in staging.

    The engine holds `lock` while it calls any method but `reclaim` and `finish`. Readers call `take`, `share`,
    `begin_landing`, `lands_early`, `stays_in_staging`, `done`, and the methods for the background fill, which acquire
    the lock themselves.
    """

    def __init__(self, num_readers: int, plan: StagingPlan, needs_staging: Callable[[int | None], bool]) -> None:
        """num_readers: threads that call `take`. needs_staging(Fetch.host): whether a ticket needs a staging buffer."""
        self.lock = threading.Condition()
        self._waiting: list[Ticket] = []
        """A heap of the tickets that no reader has taken."""
        self.running: list[Ticket] = []
        """Tickets that readers have taken and not finished."""
        self.in_staging: list[Ticket] = []
        """Read-aheads that have been read and hold their staging buffers."""
        self._shared: list[SharedRead] = []
        """Reads that readers without a ticket may help with."""
        self._plan, self._needs_staging = plan, needs_staging
        self._idle_buffers = [*range(plan.buffers)]
        self._most_speculative = max(1, plan.at_once // 2)
        self._most_speculative_readers = max(1, num_readers // 2)
        self._order = itertools.count()
        self.fills = FillQueue()
        """What readers do when nothing else is to be done."""
        self.stopping = threading.Event()
        """Set by `close`: reads end at once, with an error."""

    def push(self, ticket: Ticket) -> Ticket:
        """Queue a ticket behind those of its priority, and return it."""
        ticket.order = next(self._order)
        heapq.heappush(self._waiting, ticket)
        self.lock.notify()
        return ticket

    def is_waiting(self, ticket: Ticket) -> bool:
        """Whether no reader has taken the ticket yet."""
        return ticket in self._waiting

    def promote(self, tickets: Iterable[Ticket], priority: int = DEMAND) -> None:
        """Raise tickets, waiting or running, to at least this priority, and the tickets that they wait for in RAM."""
        for ticket in tickets:
            earlier: Ticket | None = ticket
            while earlier is not None and earlier.priority > priority:
                earlier.priority = priority
                earlier = earlier.after_in_ram
        heapq.heapify(self._waiting)
        self.lock.notify_all()

    def age(self) -> None:
        """Put the prefetches that still wait behind those that will be pushed from now on."""
        for ticket in self._waiting:
            if ticket.priority == NEXT:
                ticket.priority = LATER
        heapq.heapify(self._waiting)

    def drop(self, ticket: Ticket) -> None:
        """Keep a ticket out of its device slot. If it has a RAM slot it is still read, for the tickets after it."""
        ticket.drop()
        if ticket in self.in_staging:
            self.in_staging.remove(ticket)
            self._end(ticket)
        elif ticket.fetch.host is None and ticket in self._waiting:
            self.remove(ticket)

    def remove(self, ticket: Ticket) -> None:
        """Take a waiting ticket off the queue."""
        self._waiting.remove(ticket)
        heapq.heapify(self._waiting)
        self._end(ticket)

    def resume(self, ticket: Ticket, priority: int) -> None:
        """Go on with a read-ahead that has been given a slot: its read continues, or its copy is queued."""
        self.promote([ticket], priority)
        if ticket in self.in_staging:
            self.in_staging.remove(ticket)
            self.push(ticket)

    def clear(self) -> list[Ticket]:
        """Drop all tickets; returns those that readers still work on."""
        for ticket in (*self._waiting, *self.in_staging):
            self._end(ticket)
        self._waiting.clear()
        self.in_staging.clear()
        for ticket in self.running:
            ticket.drop()
        return list(self.running)

    def finish(self) -> None:
        """Cancel the background fill, and wait until readers have carried out every ticket. Acquires the lock."""
        with self.lock:
            batches = self.fills.clear()  # none has taken effect
            while self._waiting or self.running:
                self.lock.wait()
        for batch in batches:
            batch.issued.wait()

    def reclaim(self) -> None:
        """Mark every staging buffer idle, once no ticket and no batch runs: an interrupted thread may have lost one."""
        self._idle_buffers = [*range(self._plan.buffers)]

    def close(self) -> None:
        """Stop the reads that are under way, and end every `take`, now and later."""
        self.stopping.set()
        self.lock.notify_all()

    def take(self) -> Ticket | SharedRead | FillBatch | None:
        """The next ticket to carry out, or another reader's read to help with; blocks until there is one.

        While nothing demands an expert, it is a batch of the background fill. Returns None after `close`.
        """
        with self.lock:
            while not self.stopping.is_set():
                work = self._next(with_fills=True) or self._next_fill()
                if work is not None:
                    return work
                self.lock.wait(self.fills.patience_s())
            return None

    def take_before(self, batch: FillBatch) -> Ticket | SharedRead | None:
        """Work that goes before a batch of the background fill, for the reader that carries the batch out.

        Blocks while a demand is under way in the hands of other readers, and while the fill rests.

        Returns:
            None if the batch may go on, or should end.
        """
        fills = self.fills
        with self.lock:
            while not (self.stopping.is_set() or batch.is_useless or batch.displaced or batch.is_demanded):
                work = self._next(with_fills=False)
                if work is not None:
                    return work
                if self._is_demanded():
                    if self._needs_buffer_of(batch):
                        batch.displaced = True
                        break
                    self.lock.wait()
                elif rest_s := fills.rest_s():
                    self.lock.wait(rest_s)
                else:
                    break
            fills.step_begins(batch)
            return None

    def step_ended(self, batch: FillBatch) -> None:
        """Note that a step of a batch has been read: the fill rests, if the model computes."""
        with self.lock:
            self.fills.step_ended(batch)

    def fill_landed(self, ticket: Ticket, nbytes: int) -> None:
        """Note that the copies of an expert that the background fill brings have been queued. nbytes: at rest."""
        with self.lock:
            self.fills.landed(ticket, nbytes)

    def finish_fill(self, batch: FillBatch, on_end: Callable[[], None]) -> None:
        """Note that no reader works on a batch any more. on_end: called, with the lock, if it was the last of all."""
        with self.lock:
            if batch.buffer is not None and not batch.windowed:
                self._idle_buffers.append(batch.buffer)
            self.fills.finish(batch)
            if not self.fills.waiting and not self.fills.running:
                on_end()
            self.lock.notify_all()

    def _next(self, *, with_fills: bool) -> Ticket | SharedRead | None:
        """The first ticket, or another reader's read. with_fills: whether reads of the background fill count."""
        most = self._most_speculative_readers
        all_read = with_fills and self.fills.is_idle and not self._is_demanded()
        wanting = [
            read
            for read in self._shared
            if (read.wants_reader(most) if read.ticket.priority != FILL else all_read and not read.is_begun)
        ]
        first = min(wanting, key=lambda read: read.ticket, default=None)
        if self._may_take() and (first is None or self._waiting[0] < first.ticket):
            ticket = heapq.heappop(self._waiting)
            self.running.append(ticket)
            if ticket.buffer is None and self._needs_staging(ticket.fetch.host):
                ticket.buffer = self._idle_buffers.pop()
            return ticket
        return first  # experts one after the other: the first is computed while the second is read

    def _next_fill(self) -> FillBatch | None:
        """The next batch of the background fill, if nothing demands an expert."""
        if not self.fills.waiting or self._is_demanded():
            return None
        batch = self.fills.first(self._plan.at_once)
        if batch is None:
            return None
        if not batch.windowed and not batch.direct:
            if not self._idle_buffers:
                return None
            batch.buffer = self._idle_buffers.pop()
        return self.fills.take(batch)

    def _is_demanded(self) -> bool:
        """Whether a demand waits or is under way."""
        waits = bool(self._waiting) and self._waiting[0].priority == DEMAND
        return waits or any(ticket.priority == DEMAND for ticket in self.running)

    def _needs_buffer_of(self, batch: FillBatch) -> bool:
        """Whether a demand waits for the staging buffer that a batch holds."""
        if batch.buffer is None or batch.windowed or self._idle_buffers or not self._waiting:
            return False
        first = self._waiting[0]
        return first.priority == DEMAND and first.buffer is None and self._needs_staging(first.fetch.host)

    def share(self, read: SharedRead) -> None:
        """Carry out a read, with the help of readers that have no ticket; raises the first error of any part."""
        with self.lock:
            self._shared.append(read)
            self.lock.notify_all()
        try:
            read.finish()
        finally:
            with self.lock:
                self._shared.remove(read)

    def begin_landing(self, ticket: Ticket) -> None:
        """Note that the ticket's read is over: its next step is the copy into its slot, unless it is dropped."""
        with self.lock:
            ticket.landing = True

    def lands_early(self, ticket: Ticket) -> bool:
        """Whether the expert may be copied into its slot while it is still being read.

        It may if computation waits for it and its slot is free. From then on the ticket is landing.
        """
        with self.lock:
            wanted = ticket.priority == DEMAND and ticket.fetch.slot != NO_SLOT and not ticket.dropped
            if wanted and ticket.slot_is_free:
                ticket.landing = True
            return ticket.landing

    def stays_in_staging(self, ticket: Ticket) -> bool:
        """Whether a ticket that has been read has no slot and waits for one. It keeps its buffer; its reader is free.

        The engine passes it on with `resume` or ends it with `drop`.
        """
        with self.lock:
            if ticket.fetch.slot != NO_SLOT or ticket.dropped:
                return False
            self.running.remove(ticket)
            self.in_staging.append(ticket)
            self.lock.notify_all()
            return True

    def done(self, ticket: Ticket) -> None:
        """Note that a reader has finished a ticket, with success or not."""
        with self.lock:
            self.running.remove(ticket)
            ticket.superseded = ticket.after_in_ram = None
            self._end(ticket)
            self.lock.notify_all()

    def _end(self, ticket: Ticket) -> None:
        """Release the ticket's staging buffer and end the waits for it."""
        if ticket.buffer is not None:
            self._idle_buffers.append(ticket.buffer)
            ticket.buffer = None
        ticket.issued.set()
        ticket.arrival.end()

    def _may_take(self) -> bool:
        """Whether the first ticket of the queue may run now."""
        if not self._waiting or len(self.running) >= self._plan.at_once:
            return False
        first = self._waiting[0]
        if first.buffer is None and not self._idle_buffers and self._needs_staging(first.fetch.host):
            return False
        if first.priority == DEMAND:
            return True
        speculative = sum(ticket.priority != DEMAND for ticket in self.running)
        if speculative >= self._most_speculative:
            return False
        return speculative + len(self.in_staging) < self._plan.read_aheads
