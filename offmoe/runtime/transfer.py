"""Experts on their way: shard -> staging buffer -> device slot, in reader threads; and every wait of the package.

What moves: one expert per fetch, read with one system call per extent and copied into its slot on the copy stream.
Bound: the disk, then the link. Demands go before prefetches; a prefetch that is demanded while it queues becomes a
demand; one whose slot is given away while it queues is dropped.

The waits, and what goes wrong without each (tests/runtime/test_transfer.py removes them one by one):
  W1 compute waits `landed[slot]`       else it multiplies by weights that have not arrived
  W2 copies wait `last_read[slot]`      else an expert is overwritten while the device still computes with it
  W3 a staging buffer waits `staged[i]` else its next read changes bytes that are still being copied
  W4 a fetch waits for the slot's earlier fetch, if that is under way, else the older expert may land last
The host waits only where it must: at W1 for the copy to have been issued, and in reader threads.

Must never leave a slot with an expert that nobody asked for: after any failure the caller forgets all residency.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from offmoe.errors import OffmoeError, TransferError
from offmoe.runtime.arena import HostBuffers, SlotArena
from offmoe.runtime.backend import Backend
from offmoe.runtime.formats import Assembly, ExpertLayout
from offmoe.runtime.store import ExpertStore
from offmoe.types import Fetch

logger = logging.getLogger(__name__)

DEMAND, AHEAD = 0, 1


def staging_plan(buffer_bytes: int) -> tuple[int, int]:
    """Reader threads and staging buffers for experts of this size.

    4 readers reach the disk's limit for 5 MB and 50 MB experts alike, and above that 2 do (io.md section 1), which
    keeps the buffers of 352 MB experts at 1 GB. A buffer more than readers, so that one need not wait for its own
    copy."""
    readers = 4 if buffer_bytes <= 64 << 20 else 2
    return readers, readers + 1


class Ticket:
    """One fetch under way."""

    __slots__ = ("error", "fetch", "issued", "order", "previous", "priority", "running")

    def __init__(self, fetch: Fetch, priority: int, order: int, previous: Ticket | None):
        self.fetch = fetch
        self.priority = priority
        self.order = order
        self.previous = previous
        self.running = False
        self.issued = threading.Event()
        """Set when the copy into the slot has been given to the copy stream, or has failed."""
        self.error: BaseException | None = None

    def __lt__(self, other: Ticket) -> bool:
        return (self.priority, self.order) < (other.priority, other.order)


class Reader(threading.Thread):
    """A reader thread. Collecting garbage may end a model inside one; it must not wait for itself then."""


class TransferEngine:
    """Moves experts into slots. `fetch` starts, `ready` waits, `computed` marks; one thread calls these."""

    def __init__(
        self,
        store: ExpertStore,
        arena: SlotArena,
        backend: Backend,
        layouts: Sequence[ExpertLayout],
        assemblies: Sequence[Assembly],
        *,
        on_stall: Callable[[int, float], None] = lambda layer, seconds: None,
    ):
        self._store, self._arena, self._backend = store, arena, backend
        self._layouts, self._assemblies = layouts, assemblies
        self._on_stall = on_stall
        self._landed = [backend.event() for _ in range(len(arena))]
        self._last_read = [backend.event() for _ in range(len(arena))]
        readers, buffers = staging_plan(store.buffer_bytes)
        self._staging = HostBuffers(buffers, store.buffer_bytes, register=backend.pin, unregister=backend.unpin)
        self._staged = [backend.event() for _ in range(buffers)]
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(buffers):
            self._idle.put(i)
        self.computed(range(len(arena)))  # the first copies come after whatever used this memory before
        self._tickets: dict[int, Ticket] = {}
        self._order = itertools.count()
        self._work = threading.Condition()
        self._queue: list[Ticket] = []
        self._under_way: set[Ticket] = set()
        self._stop = threading.Event()
        self._threads = [Reader(target=self._read, name=f"offmoe-reader-{i}", daemon=True) for i in range(readers)]
        for thread in self._threads:
            thread.start()

    def fetch(self, fetches: Sequence[Fetch], *, ahead: bool = False) -> None:
        """Start moving experts; `ahead` for those that nothing waits for yet."""
        if not fetches:
            return
        with self._work:
            if self._stop.is_set():
                raise TransferError("the model was closed; load it again with from_pretrained.")
            for fetch in fetches:
                previous = self._tickets.get(fetch.slot)
                if previous is not None and not previous.running and not previous.issued.is_set():
                    self._queue.remove(previous)
                    heapq.heapify(self._queue)
                    previous = previous.previous
                ticket = Ticket(fetch, AHEAD if ahead else DEMAND, next(self._order), previous)
                self._tickets[fetch.slot] = ticket
                heapq.heappush(self._queue, ticket)
            self._work.notify(len(fetches))

    def demand(self, slots: Sequence[int]) -> None:
        """What was fetched ahead into these slots is wanted now: it goes before everything that still nobody wants."""
        if not self._tickets:
            return
        with self._work:
            queued = [t for s in slots if (t := self._tickets.get(s)) and not t.running and t.priority != DEMAND]
            for ticket in queued:
                ticket.priority = DEMAND
            if queued:
                heapq.heapify(self._queue)

    def ready(self, slot: int) -> None:
        """Make compute wait for what was fetched into `slot`; raises what went wrong with a fetch."""
        ticket = self._tickets.get(slot)
        if ticket is None:
            return
        if not ticket.issued.is_set():
            began = time.perf_counter()
            ticket.issued.wait()
            self._on_stall(ticket.fetch.key.layer, time.perf_counter() - began)
        del self._tickets[slot]
        if ticket.error is not None:
            raise _for_the_demand(ticket) from ticket.error
        self._backend.compute.wait(self._landed[slot])  # W1

    def computed(self, slots: Sequence[int]) -> None:
        """Everything that computes with `slots` has been given to the compute stream."""
        compute = self._backend.compute
        for slot in slots:
            self._last_read[slot].record(compute)

    def forget(self) -> None:
        """Drop what is queued and wait for what is under way, so that no slot changes afterwards; errors are dropped
        too.
        """
        with self._work:
            for ticket in self._queue:
                ticket.error = TransferError("dropped")
                ticket.issued.set()
            self._queue.clear()
            self._tickets.clear()
            under_way = list(self._under_way)  # not only those with a ticket: a read may be for a slot given away since
        for ticket in under_way:
            ticket.issued.wait()

    def close(self) -> None:
        """Stop the readers and release buffers; idempotent, bounded by one read of one expert."""
        if self._stop.is_set():
            return
        self._stop.set()
        with self._work:
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        self.forget()
        for event in self._staged:
            event.synchronize()
        self._staging.close()

    def _read(self) -> None:
        while True:
            with self._work:
                while not self._queue and not self._stop.is_set():
                    self._work.wait()
                if self._stop.is_set():
                    return
                ticket = heapq.heappop(self._queue)
                ticket.running = True
                self._under_way.add(ticket)
            try:
                self._move(ticket)
            except BaseException as error:  # handed over to the demand that needs the expert
                ticket.error = error
            finally:
                ticket.previous = None
                ticket.issued.set()
                with self._work:
                    self._under_way.discard(ticket)

    def _move(self, ticket: Ticket) -> None:
        key, slot = ticket.fetch.key, ticket.fetch.slot
        copies = self._backend.copies
        buffer = self._idle.get()
        try:
            self._staged[buffer].synchronize()  # W3
            self._store.read_into(key, self._staging.memory(buffer), self._stop)
            data = self._store.segments(key, self._staging.tensor(buffer))
            if ticket.previous is not None:
                ticket.previous.issued.wait()  # W4
            copies.wait(self._last_read[slot])  # W2
            views = self._arena.views(slot, self._layouts[key.layer])
            segments = self._store.record(key).segments
            self._assemblies[key.layer].place(segments, data, views, copies.copy)
            self._landed[slot].record(copies)
            self._staged[buffer].record(copies)
        finally:
            self._idle.put(buffer)


def _for_the_demand(ticket: Ticket) -> OffmoeError:
    key, error = ticket.fetch.key, ticket.error
    if isinstance(error, OffmoeError):
        return type(error)(f"expert {key.expert} of MoE layer {key.layer}: {error}")
    return TransferError(f"expert {key.expert} of MoE layer {key.layer} could not be loaded: {error!r}")
