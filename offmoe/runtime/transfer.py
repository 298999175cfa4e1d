"""Experts on their way: shard -> staging or RAM slot -> device slot, in reader threads; and every wait of the package.

What moves: one expert per fetch, read in parts of a few MB by all readers that have nothing else to do, and copied into
its slot on the copy stream; what is demanded is copied while the rest of it is read. What the plan keeps in RAM is read
into its slot there and copied from it, then and later; the rest passes through staging.
Bound: the disk, then the link. The order is that of tickets.py. A layer that needs several waves of experts has all of
them read one behind the other while it computes: a read does not wait for its slot, only its copy does, so that as
many experts as there are staging buffers are ahead of computing even where one slot is left to pass through.

A prefetch that is demanded becomes a demand; one whose slot is given away is dropped, and if the same expert is wanted
again before its read has ended, that read goes there. Copies that nobody waits for go in pieces, two at a time, so that
a demand's copy never stands behind more than two of them.

The waits, and what goes wrong without each (tests/runtime/test_transfer.py removes them one by one):
  W1 compute waits `landed[slot]`       else it multiplies by weights that have not arrived
  W2 copies wait `last_read[slot]`      else an expert is overwritten while the device still computes with it
  W3 a staging buffer waits `staged[i]` else its next read changes bytes that are still being copied
  W4 a fetch waits for the slot's earlier fetch, if that is copying, else the older expert may land last
  W5 a copy waits for its turn          else it is not even marked yet what W2 has to wait for
  W6 a fetch waits for what its RAM slot was asked for before, else it copies what has not been read
  W7 a RAM slot waits `copied[host]`    as W3
The host waits only where it must: at W1 for the copy to have been issued, and in reader threads.

Must never leave a slot with an expert that nobody asked for: after any failure the caller forgets all residency.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from offmoe.errors import OffmoeError, TransferError
from offmoe.runtime.arena import HostBuffers, SlotArena
from offmoe.runtime.backend import Backend, Event
from offmoe.runtime.formats import Assembly, ExpertLayout
from offmoe.runtime.staging import READERS, host_buffers, staging_plan
from offmoe.runtime.store import ExpertStore
from offmoe.runtime.tickets import DEMAND, NEXT, SharedRead, Ticket, TicketQueue
from offmoe.types import Fetch, Wave

PIECE_BYTES = 16 << 20
"""Of a copy that nobody waits for: 0.7 ms of a 24 GB/s link. The copy engine takes copies in order (io.md section 6:
51 KB waited 12 ms behind 200 MB)."""
PIECES_IN_FLIGHT = 2


class Reader(threading.Thread):
    """A reader thread. Collecting garbage may end a model inside one; it must not wait for itself then."""


class TransferEngine:
    """Moves experts into slots. `stream` and `fetch` start, `ready` waits, `computed` marks; one thread calls these."""

    def __init__(
        self,
        store: ExpertStore,
        arena: SlotArena,
        backend: Backend,
        layouts: Sequence[ExpertLayout],
        assemblies: Sequence[Assembly],
        *,
        host_slots: int = 0,
        on_stall: Callable[[int, float], None] = lambda layer, seconds: None,
    ):
        """host_slots: those in RAM that plans name."""
        self._store, self._arena, self._backend = store, arena, backend
        self._layouts, self._assemblies = layouts, assemblies
        self._on_stall = on_stall
        self._landed = [backend.event() for _ in range(len(arena))]
        self._last_read = [backend.event() for _ in range(len(arena))]
        self._uses = [0] * len(arena)
        """How often each slot has been computed with."""
        at_once, buffers = staging_plan(store.buffer_bytes)
        self._staging = HostBuffers(buffers, store.buffer_bytes, register=backend.pin, unregister=backend.unpin)
        self._staged = [backend.event() for _ in range(buffers)]
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(buffers):
            self._idle.put(i)
        try:  # after staging: where little can be pinned, that little is what everything passes through
            self._host = host_buffers(host_slots, store.buffer_bytes, backend) if host_slots else None
        except BaseException:
            self._staging.close()
            raise
        self._copied = [backend.event() for _ in range(host_slots)]
        self._last_on: list[Ticket | None] = [None] * len(self._copied)
        """Per RAM slot, the ticket that was the last to be told to use it."""
        self._pieces = deque(backend.event() for _ in range(PIECES_IN_FLIGHT))
        self._piece_order = threading.Lock()
        self._tickets: dict[int, Ticket] = {}
        """Per slot the next fetch to land in it; later ones follow by `next`."""
        self.computed(range(len(arena)))  # the first copies come after whatever used this memory before
        self._queue = TicketQueue(READERS, at_once)
        self._stop = threading.Event()
        self._threads = [Reader(target=self._read, name=f"offmoe-reader-{i}", daemon=True) for i in range(READERS)]
        for thread in self._threads:
            thread.start()

    def stream(self, waves: Sequence[Wave]) -> None:
        """Start every fetch of one access, in the order of its waves, which must be computed in that order. A copy into
        a slot that earlier waves compute with comes after `computed` has been called for it by each of them.
        """
        if not waves:
            return
        self.fetch(waves[0].fetches)
        self.demand([slot for _, slot in waves[0].experts])
        if len(waves) == 1:
            return
        users = Counter(slot for _, slot in waves[0].experts)
        with self._queue.lock:
            for wave in waves[1:]:
                for fetch in wave.fetches:
                    self._start(fetch, DEMAND, users[fetch.slot])
                users.update(slot for _, slot in wave.experts)

    def fetch(self, fetches: Sequence[Fetch], *, ahead: bool = False) -> None:
        """Start moving experts; `ahead` for those that nothing waits for yet."""
        if not fetches:
            return
        with self._queue.lock:
            if ahead:
                self._queue.age()
            for fetch in fetches:
                self._start(fetch, NEXT if ahead else DEMAND, 0)

    def demand(self, slots: Sequence[int]) -> None:
        """What was fetched ahead into these slots is wanted now: it goes before everything that still nobody wants."""
        if not self._tickets:
            return
        with self._queue.lock:
            found = [t for s in slots if (t := self._tickets.get(s)) and t.priority != DEMAND]
            if found:
                self._queue.promote(found)

    def ready(self, slot: int) -> None:
        """Make compute wait for what was fetched into `slot`; raises what went wrong with a fetch."""
        ticket = self._tickets.get(slot)
        if ticket is None or ticket.uses > self._uses[slot]:
            return
        if not ticket.issued.is_set():
            began = time.perf_counter()
            ticket.issued.wait()
            self._on_stall(ticket.fetch.key.layer, time.perf_counter() - began)
        if ticket.next is None:
            del self._tickets[slot]
        else:
            self._tickets[slot] = ticket.next
        if ticket.error is not None:
            raise _for_the_demand(ticket) from ticket.error
        self._backend.compute.wait(self._landed[slot])  # W1

    def computed(self, slots: Sequence[int]) -> None:
        """Everything that computes with `slots` has been given to the compute stream."""
        compute = self._backend.compute
        for slot in slots:
            self._last_read[slot].record(compute)
            self._uses[slot] += 1
            ticket = self._tickets.get(slot)
            if ticket is not None and ticket.turn is not None and ticket.uses == self._uses[slot]:
                ticket.turn.set()

    def forget(self) -> None:
        """Drop what is queued and wait for what is under way, so that no slot changes afterwards; errors are dropped
        too.
        """
        with self._queue.lock:
            self._tickets.clear()
            under_way = self._queue.clear()  # not only those with a ticket: a read may be for a slot given away since
        for ticket in under_way:
            ticket.issued.wait()
        self._last_on = [None] * len(self._copied)

    def close(self) -> None:
        """Stop the readers and release buffers; idempotent, bounded by one read of one expert."""
        if self._stop.is_set():
            return
        self._stop.set()
        with self._queue.lock:
            self._queue.clear()
            self._queue.close()
        for thread in self._threads:
            thread.join()
        self.forget()
        for event in (*self._staged, *self._copied):
            event.synchronize()
        self._staging.close()
        if self._host is not None:
            self._host.close()

    def _start(self, fetch: Fetch, priority: int, uses: int) -> None:
        """Queue one fetch, to land after `uses` more times of computing with its slot; the lock is held."""
        if self._stop.is_set():
            raise TransferError("the model was closed; load it again with from_pretrained.")
        slot = fetch.slot
        ticket = self._adopted(fetch, priority) or self._new(fetch, priority)
        ticket.uses = self._uses[slot] + uses
        before = self._tickets.get(slot)
        if uses:
            ticket.turn = threading.Event()
        if before is None or not uses:
            self._tickets[slot] = ticket
        else:
            while before.next is not None:
                before = before.next
            before.next = ticket
        if before is not None and not uses:
            self._queue.drop(before)
            ticket.previous = before if before.landing else before.previous

    def _adopted(self, fetch: Fetch, priority: int) -> Ticket | None:
        """A dropped read of the same expert to the same place, sent on to where this fetch wants it."""
        ticket = self._queue.lost(fetch.key)
        if ticket is None or ticket.fetch.host != fetch.host:
            return None
        if fetch.host is not None and self._last_on[fetch.host] is not ticket:
            return None
        ticket.fetch = fetch._replace(read=ticket.fetch.read)
        ticket.dropped = False
        ticket.turn = ticket.previous = None
        self._queue.promote([ticket], priority)
        return ticket

    def _new(self, fetch: Fetch, priority: int) -> Ticket:
        ticket = Ticket(fetch, priority)
        if fetch.host is not None:
            before = self._last_on[fetch.host]
            if before is not None and fetch.read and before.fetch.read and self._queue.waits(before):
                # It has not begun, and its place in RAM is another's: it is read past RAM, if anybody still wants it.
                ticket.behind, before.behind = before.behind, None
                before.fetch = before.fetch._replace(host=None)
                if before.dropped:
                    self._queue.remove(before)
            elif before is not None:
                ticket.behind = before
                self._queue.promote([before], priority)
            self._last_on[fetch.host] = ticket
        return self._queue.push(ticket)

    def _read(self) -> None:
        while (work := self._queue.take()) is not None:
            if isinstance(work, SharedRead):
                work.help()
                continue
            try:
                self._move(work)
            except BaseException as error:  # handed over to the demand that needs the expert
                work.error = error
            finally:
                self._queue.done(work)

    def _move(self, ticket: Ticket) -> None:
        host, read = ticket.fetch.host, ticket.fetch.read
        behind = ticket.behind
        if behind is not None:
            behind.issued.wait()  # W6
            if not read and behind.error is not None:
                raise behind.error
        if host is None:
            with self._staging_buffer() as i:
                self._bring(ticket, self._staging.memory(i), self._staging.tensor(i), self._staged[i])
            return
        assert self._host is not None
        if read:
            self._copied[host].synchronize()  # W7
        memory, tensor = self._host.memory(host), self._host.tensor(host)
        if self._host.pinned(host) or not self._staging.pinned(0):
            if read:
                self._bring(ticket, memory, tensor, self._copied[host])
            else:
                self._land(ticket, tensor, self._copied[host])
            return
        if read:
            self._read_parts(ticket, lambda part: self._store.read_part(ticket.fetch.key, part, memory, self._stop))
        with self._staging_buffer() as i:  # a copy from memory that is not pinned would hold up the stream
            self._staging.tensor(i).copy_(tensor)
            self._land(ticket, self._staging.tensor(i), self._staged[i])

    @contextmanager
    def _staging_buffer(self) -> Iterator[int]:
        i = self._idle.get()
        try:
            self._staged[i].synchronize()  # W3
            yield i
        finally:
            self._idle.put(i)

    def _bring(self, ticket: Ticket, memory: memoryview, buffer: torch.Tensor, copied: Event) -> None:
        """Read an expert into host memory (`buffer`, uint8 [bytes], is the same) and put it into its slot.

        Where somebody waits for it and its slot is free already, what has arrived is copied while the rest is read.
        """
        key = ticket.fetch.key
        at_once = ticket.priority == DEMAND and ticket.lands_now and ticket.fetch.slot < self._arena.on_device
        landing = None
        if at_once and self._begin(ticket):
            views = self._arena.views(ticket.fetch.slot, self._layouts[key.layer])
            landing = self._assemblies[key.layer].runs(self._store.record(key).segments, views)

        def read(part: int) -> None:
            self._store.read_part(key, part, memory, self._stop)
            if landing is not None:
                self._copy_part(ticket, part, buffer, landing)

        self._read_parts(ticket, read)
        self._land(ticket, buffer, copied, landing)

    def _read_parts(self, ticket: Ticket, read: Callable[[int], None]) -> None:
        parts = self._store.parts(ticket.fetch.key)
        if parts == 1:
            read(0)
        else:
            self._queue.share(SharedRead(ticket, parts, read))

    def _begin(self, ticket: Ticket) -> bool:
        """Wait until the ticket's slot is free: from now on it lands there. False if it goes nowhere any more."""
        self._queue.land(ticket)
        if ticket.turn is not None:
            ticket.turn.wait()  # W5
        if ticket.previous is not None:
            ticket.previous.issued.wait()  # W4
        if ticket.dropped:
            return False
        slot = ticket.fetch.slot
        if slot < self._arena.on_device:
            self._backend.copies.wait(self._last_read[slot])  # W2
        return True

    def _copy_part(self, ticket: Ticket, part: int, buffer: torch.Tensor, runs: Sequence[torch.Tensor | None]) -> None:
        key = ticket.fetch.key
        data = self._store.segments(key, buffer)
        for segment, start, end in self._store.arrived(key, part):
            run = runs[segment]
            if run is not None:
                self._backend.copies.copy(run[start:end], data[segment][start:end])

    def _land(
        self,
        ticket: Ticket,
        buffer: torch.Tensor,
        copied: Event,
        landing: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """From a buffer (uint8 [bytes]) that the expert was read into to its slot, but for the segments that are there
        since `landing` (`Assembly.runs`) began; `copied` marks when that is done.
        """
        there = () if landing is None else [i for i, run in enumerate(landing) if run is not None]
        if landing is None and not self._begin(ticket):
            return
        key, slot, copies = ticket.fetch.key, ticket.fetch.slot, self._backend.copies
        views = self._arena.views(slot, self._layouts[key.layer])
        segments, data = self._store.record(key).segments, self._store.segments(key, buffer)
        if slot >= self._arena.on_device:  # in RAM, where only the host reads it, and is done when it says so
            self._assemblies[key.layer].place(segments, data, views, torch.Tensor.copy_)
            return
        self._assemblies[key.layer].place(segments, data, views, functools.partial(self._copy, ticket), there)
        self._landed[slot].record(copies)
        copied.record(copies)

    def _copy(self, ticket: Ticket, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Into device memory: whole for a demand; in pieces, a few at a time, while nobody waits for it."""
        copies = self._backend.copies
        if ticket.priority == DEMAND or not destination.ndim:
            copies.copy(destination, source)
            return
        rows = max(1, PIECE_BYTES * len(destination) // max(1, destination.nbytes))
        for into, data in zip(destination.split(rows), source.split(rows), strict=True):
            with self._piece_order:
                event = self._pieces.popleft()
                if ticket.priority != DEMAND:
                    event.synchronize()
                copies.copy(into, data)
                event.record(copies)
                self._pieces.append(event)


def _for_the_demand(ticket: Ticket) -> OffmoeError:
    key, error = ticket.fetch.key, ticket.error
    if isinstance(error, OffmoeError):
        return type(error)(f"expert {key.expert} of MoE layer {key.layer}: {error}")
    return TransferError(f"expert {key.expert} of MoE layer {key.layer} could not be loaded: {error!r}")
