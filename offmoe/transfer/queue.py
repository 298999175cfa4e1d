"""The order in which readers take fetches: demands, then the newest prefetches, then what prefetches are left over.

Nothing moves here. Bound: the lock, some microseconds per fetch. Before a reader takes a later one it helps with
an earlier one that is large enough to be read in parts. A prefetch of a layer that has run meanwhile is no
longer what comes next, so newer ones go before it. At most half of the readers read for nobody in particular: however
many prefetches are queued or running, a demand finds a reader free and shares the disk with that half only, which
bounds both the bytes in flight for prefetching and what a demand loses by it.

Staging buffers are given out here, in the order in which fetches are taken: a later one that has a buffer and waits for
its turn could otherwise keep it from the one before it for ever. What is read ahead has no slot, and keeps its buffer
when it has been read (it is *parked*) until it is fetched or given up. Giving up stops a read between two parts.

Must never hand out a ticket after `close`, nor wait for anything but work."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Iterable

from offmoe.transfer.arrival import Arrival
from offmoe.transfer.staging import StagingPlan
from offmoe.types import Fetch

DEMAND, NEXT, LATER = 0, 1, 2
"""Somebody waits for it; the layer that comes next may want it; a layer that has run did not."""
NO_SLOT = -1
"""Of what is read ahead."""


class Ticket:
    """One fetch on its way."""

    __slots__ = (
        "arrival",
        "behind",
        "buffer",
        "dropped",
        "error",
        "fetch",
        "issued",
        "landing",
        "next",
        "order",
        "previous",
        "priority",
        "turn",
        "uses",
    )

    def __init__(self, fetch: Fetch, priority: int, uses: int = 0, turn: threading.Event | None = None):
        self.fetch = fetch
        self.priority = priority
        self.order = 0
        self.uses = uses
        """How often the slot will have been computed with before this expert may land in it."""
        self.turn = turn
        """Set when that has happened; None if it has already."""
        self.previous: Ticket | None = None
        """Nobody waits for this one, but it was copying into the same slot when this was asked for."""
        self.behind: Ticket | None = None
        """What uses the same RAM slot before this one."""
        self.next: Ticket | None = None
        """What lands in the same slot after this one has been computed with."""
        self.landing = False
        """Whether it is going into its slot: it can no longer be dropped."""
        self.dropped = False
        self.buffer: int | None = None
        """The staging buffer that it passes through, from when it is taken."""
        self.arrival = Arrival()
        """How far it is."""
        self.issued = threading.Event()
        """Set when the copy into the slot has been given to the copy stream, has failed, or will not be."""
        self.error: BaseException | None = None

    def __lt__(self, other: Ticket) -> bool:
        return (self.priority, self.order) < (other.priority, other.order)

    @property
    def lands_now(self) -> bool:
        """Whether its slot is free for it already."""
        turned = self.turn is None or self.turn.is_set()
        return turned and (self.previous is None or self.previous.issued.is_set())

    @property
    def is_stopped(self) -> bool:
        """Whether what is left of its read is for nothing; what RAM is to keep is read all the same."""
        return self.dropped and self.fetch.host is None

    def drop(self) -> None:
        """It goes nowhere any more; a reader that waits for its turn need not."""
        self.dropped = True
        if self.turn is not None:
            self.turn.set()


class SharedRead:
    """One expert that several readers read in parts. `changed` is notified whenever one more has `ended`."""

    def __init__(self, ticket: Ticket, parts: int, read: Callable[[int], None]):
        """read(part) brings one of them."""
        self.ticket = ticket
        self.ended = 0
        self.changed = threading.Condition()
        self._read, self._parts = read, parts
        self._begun = 0
        self._error: BaseException | None = None

    @property
    def is_begun(self) -> bool:
        """Whether every part has its reader, or needs none."""
        return self._begun == self._parts or self.ticket.is_stopped

    def wants(self, ahead: int) -> bool:
        """Whether one more reader would help; no more than `ahead` at once while nobody waits for it, since those must
        end before a read is stopped.
        """
        if self.is_begun:
            return False
        return self.ticket.priority == DEMAND or self._begun - self.ended < ahead

    def help(self) -> bool:
        """Read one part; False if none is left."""
        with self.changed:
            if self.is_begun:
                return False
            part = self._begun
            self._begun += 1
        try:
            self._read(part)
        except BaseException as error:  # raised where the whole is waited for
            with self.changed:
                self._error = self._error or error
                self._parts = self._begun  # nobody begins another
        with self.changed:
            self.ended += 1
            self.changed.notify_all()
        return True

    def finish(self) -> None:
        """Read what is left and wait for what others read; raises what went wrong with any part."""
        while self.help():
            pass
        with self.changed:
            self.changed.wait_for(lambda: self.ended == self._begun)
        if self._error is not None:
            raise self._error


class TicketQueue:
    """What readers do next. Callers hold `lock`, but not for `take`, `share`, `land`, `lands_early`, `parks` and
    `done`, which readers call.
    """

    def __init__(self, readers: int, plan: StagingPlan, needs_buffer: Callable[[Ticket], bool]):
        """readers: how many call `take`; those that may not take another ticket help. needs_buffer: of staging."""
        self.lock = threading.Condition()
        self.under_way: list[Ticket] = []
        self.parked: list[Ticket] = []
        self._shared: list[SharedRead] = []
        self._plan, self._needs_buffer = plan, needs_buffer
        self._idle = [*range(plan.buffers)]
        self._ahead = max(1, plan.at_once // 2)
        self._ahead_readers = max(1, readers // 2)
        self._waiting: list[Ticket] = []
        self._order = itertools.count()
        self._closed = False

    def push(self, ticket: Ticket) -> Ticket:
        ticket.order = next(self._order)
        heapq.heappush(self._waiting, ticket)
        self.lock.notify()
        return ticket

    def waits(self, ticket: Ticket) -> bool:
        """Whether no reader has taken it yet."""
        return ticket in self._waiting

    def promote(self, tickets: Iterable[Ticket], priority: int = DEMAND) -> None:
        """These come at least as soon, whether they are queued or under way, and so does what they stand behind."""
        for ticket in tickets:
            behind: Ticket | None = ticket
            while behind is not None and behind.priority > priority:
                behind.priority = priority
                behind = behind.behind
        heapq.heapify(self._waiting)
        self.lock.notify_all()

    def age(self) -> None:
        """Prefetches that no reader has taken so far come after those that are pushed from now on."""
        for ticket in self._waiting:
            if ticket.priority == NEXT:
                ticket.priority = LATER
        heapq.heapify(self._waiting)

    def drop(self, ticket: Ticket) -> None:
        """Nobody waits for this any more: it gets no device slot. What is to stay in RAM is read all the same, or what
        stands behind it would find nothing there."""
        ticket.drop()
        if ticket in self.parked:
            self.parked.remove(ticket)
            self._end(ticket)
        elif ticket.fetch.host is None and ticket in self._waiting:
            self.remove(ticket)

    def remove(self, ticket: Ticket) -> None:
        """Take a ticket off the queue."""
        self._waiting.remove(ticket)
        heapq.heapify(self._waiting)
        self._end(ticket)

    def resume(self, ticket: Ticket, priority: int) -> None:
        """What was read ahead has a slot now; its read goes on as what it is from now on."""
        self.promote([ticket], priority)
        if ticket in self.parked:
            self.parked.remove(ticket)
            self.push(ticket)

    def clear(self) -> list[Ticket]:
        """Drop everything; what readers are still busy with."""
        for ticket in (*self._waiting, *self.parked):
            self._end(ticket)
        self._waiting.clear()
        self.parked.clear()
        for ticket in self.under_way:
            ticket.drop()
        return list(self.under_way)

    def _end(self, ticket: Ticket) -> None:
        """No reader will have anything to do with it any more."""
        if ticket.buffer is not None:
            self._idle.append(ticket.buffer)
            ticket.buffer = None
        ticket.issued.set()
        ticket.arrival.end()

    def reclaim(self) -> None:
        """Every staging buffer is idle, since nothing is under way: an interrupt may have lost one in between."""
        self._idle = [*range(self._plan.buffers)]

    @property
    def idle_buffers(self) -> int:
        return len(self._idle)

    def close(self) -> None:
        self._closed = True
        self.lock.notify_all()

    def take(self) -> Ticket | SharedRead | None:
        """What to do next: a fetch, or another reader's to help with; waits for one. None after `close`."""
        with self.lock:
            while not self._closed:
                wanting = [read for read in self._shared if read.wants(self._ahead_readers)]
                first = min(wanting, key=lambda read: read.ticket, default=None)
                if self._may_take() and (first is None or self._waiting[0] < first.ticket):
                    ticket = heapq.heappop(self._waiting)
                    self.under_way.append(ticket)
                    if ticket.buffer is None and self._needs_buffer(ticket):
                        ticket.buffer = self._idle.pop()
                    return ticket
                if first is not None:  # one after the other: the first is computed while the second is read
                    return first
                self.lock.wait()
            return None

    def share(self, read: SharedRead) -> None:
        """Let readers that have nothing else to do help with this, and do it; raises what went wrong."""
        with self.lock:
            self._shared.append(read)
            self.lock.notify_all()
        try:
            read.finish()
        finally:
            with self.lock:
                self._shared.remove(read)

    def land(self, ticket: Ticket) -> None:
        """Its read is over: from now on it goes into its slot, or nowhere."""
        with self.lock:
            ticket.landing = True

    def lands_early(self, ticket: Ticket) -> bool:
        """Whether it goes into its slot from now on while it is read: somebody waits for it, and its slot is free."""
        with self.lock:
            if ticket.priority == DEMAND and ticket.fetch.slot != NO_SLOT and ticket.lands_now and not ticket.dropped:
                ticket.landing = True
            return ticket.landing

    def parks(self, ticket: Ticket) -> bool:
        """Its read is over. If it has no slot and may still get one, it keeps its buffer, and its reader is done."""
        with self.lock:
            if ticket.fetch.slot != NO_SLOT or ticket.dropped:
                return False
            self.under_way.remove(ticket)
            self.parked.append(ticket)
            self.lock.notify_all()
            return True

    def done(self, ticket: Ticket) -> None:
        with self.lock:
            self.under_way.remove(ticket)
            ticket.previous = ticket.behind = None
            self._end(ticket)
            self.lock.notify_all()

    def _may_take(self) -> bool:
        if not self._waiting or len(self.under_way) >= self._plan.at_once:
            return False
        first = self._waiting[0]
        if first.buffer is None and not self._idle and self._needs_buffer(first):
            return False
        if first.priority == DEMAND:
            return True
        ahead = sum(t.priority != DEMAND for t in self.under_way)
        return ahead < self._ahead and ahead + len(self.parked) < self._plan.ahead
