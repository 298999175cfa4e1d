"""Experts on their way: shard -> staging or RAM slot -> device slot. Asking for them, and waiting for them.

What moves: one expert per fetch, read in parts of a few MB by all readers that have nothing else to do, and copied into
its slot on the copy stream; what is demanded is copied while the rest of it is read. What the plan keeps in RAM is read
into its slot there and copied from it, then and later; the rest passes through staging.
Bound: the disk, then the link. The order is that of tickets.py. A layer that needs several waves of experts has all of
them read one behind the other while it computes: a read does not wait for its slot, only its copy does, so that as
many experts as there are staging buffers are ahead of computing even where one slot is left to pass through.

A prefetch that is demanded becomes a demand; one whose slot is given away is dropped. What is read ahead has no slot:
it stays in staging until it is fetched, by which it becomes a demand wherever its read is, or until the next layer runs
without it, by which its read stops. Copies that nobody waits for go in pieces, two at a time, so that a demand's copy
never stands behind more than two of them.

The waits, and what goes wrong without each (tests/transfer/test_engine.py removes them one by one):
  W1 compute waits `landed[slot]`       else it multiplies by weights that have not arrived
  W2 copies wait `last_read[slot]`      else an expert is overwritten while the device still computes with it
  W3 a staging buffer waits `staged[i]` else its next read changes bytes that are still being copied
  W4 a fetch waits for the slot's earlier fetch, if that is copying, else the older expert may land last
  W5 a copy waits for its turn          else it is not even marked yet what W2 has to wait for
  W6 a fetch waits for what its RAM slot was asked for before, else it copies what has not been read
  W7 a RAM slot waits `copied[host]`    as W3
W2 to W7 stand in movement.py, which carries out what is asked for here, in reader threads. The host waits only where it
must: at W1 for the copy to have been issued, and in reader threads.

Must never leave a slot with an expert that nobody asked for: after any failure the caller forgets all residency.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from offmoe.device.arena import SlotArena
from offmoe.device.backend import Backend
from offmoe.errors import OffmoeError, TransferError
from offmoe.io_limits import READERS
from offmoe.storage.layout import Assembly, ExpertLayout
from offmoe.storage.store import ExpertStore
from offmoe.transfer.arrival import Arriving
from offmoe.transfer.mover import Mover
from offmoe.transfer.queue import DEMAND, NEXT, NO_SLOT, SharedRead, Ticket
from offmoe.types import ExpertKey, Fetch, Wave


class Reader(threading.Thread):
    """A reader thread. Collecting garbage may end a model inside one; it must not wait for itself then."""


class TransferEngine:
    """Moves experts into slots. `stream`, `fetch` and `read_ahead` start, `ready` waits, `computed` marks; one thread
    calls these.
    """

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
        self._backend, self._on_stall = backend, on_stall
        self._mover = Mover(store, arena, backend, layouts, assemblies, host_slots)
        self._queue = self._mover.queue
        self._uses = [0] * len(arena)
        """How often each slot has been computed with."""
        self._last_on: list[Ticket | None] = [None] * host_slots
        """Per RAM slot, the ticket that was the last to be told to use it."""
        self._tickets: dict[int, Ticket] = {}
        """Per slot the next fetch to land in it; later ones follow by `next`."""
        self._ahead: dict[ExpertKey, Ticket] = {}
        """What has been read ahead, or is going to be, for the access that comes next."""
        self.computed(range(len(arena)))  # the first copies come after whatever used this memory before
        self._closed = False
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

    def read_ahead(self, keys: Sequence[ExpertKey]) -> None:
        """Give up what was read ahead and has not been fetched, and begin to read these, behind everything else; to be
        called once for every access, after its fetches.
        """
        if not keys and not self._ahead:
            return
        with self._queue.lock:
            if self._closed:
                return
            for ticket in self._ahead.values():
                self._queue.drop(ticket)
            self._ahead = {key: self._queue.push(Ticket(Fetch(key, NO_SLOT, None), NEXT)) for key in keys}

    def demand(self, slots: Sequence[int]) -> None:
        """What was fetched ahead into these slots is wanted now: it goes before everything that still nobody wants."""
        if not self._tickets:
            return
        with self._queue.lock:
            found = [t for s in slots if (t := self._tickets.get(s)) and t.priority != DEMAND]
            if found:
                self._queue.promote(found)

    def arriving(self, slot: int) -> Arriving | None:
        """What is on its way into `slot` and may be computed with as it comes, before `ready` is called for the slot;
        None if there is nothing to gain by it, or the device cannot.
        """
        ticket = self._tickets.get(slot)
        if ticket is None or ticket.uses > self._uses[slot] or ticket.issued.is_set():
            return None
        return self._mover.arriving(ticket)

    def ready(self, slot: int) -> None:
        """Make compute wait for what was fetched into `slot`; raises what went wrong with a fetch."""
        ticket = self._tickets.get(slot)
        if ticket is None or ticket.uses > self._uses[slot]:
            return
        waited = ticket.arrival.waited_s()
        if not ticket.issued.is_set():
            began = time.perf_counter()
            ticket.issued.wait()
            waited += time.perf_counter() - began
        if waited:
            self._on_stall(ticket.fetch.key.layer, waited)
        if ticket.next is None:
            del self._tickets[slot]
        else:
            self._tickets[slot] = ticket.next
        if ticket.error is not None:
            raise _for_the_demand(ticket) from ticket.error
        self._backend.compute.wait(self._mover.landed[slot])  # W1

    def computed(self, slots: Sequence[int]) -> None:
        """Everything that computes with `slots` has been given to the compute stream."""
        compute = self._backend.compute
        for slot in slots:
            self._mover.last_read[slot].record(compute)
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
            self._ahead.clear()
            under_way = self._queue.clear()  # not only those with a ticket: a read may be for a slot given away since
        for ticket in under_way:
            ticket.issued.wait()
        self._queue.reclaim()
        self._last_on = [None] * len(self._last_on)

    def close(self) -> None:
        """Stop the readers and release buffers; idempotent, bounded by one read of one expert."""
        if self._closed:
            return
        self._closed = True
        self._mover.stop()
        with self._queue.lock:
            self._queue.clear()
            self._queue.close()
        for thread in self._threads:
            thread.join()
        self.forget()
        self._mover.close()

    def _start(self, fetch: Fetch, priority: int, uses: int) -> None:
        """Queue one fetch, to land after `uses` more times of computing with its slot; the lock is held."""
        if self._closed:
            raise TransferError("the model was closed; load it again with from_pretrained.")
        slot = fetch.slot
        ticket = (self._adopted(fetch, priority) if fetch.read_ahead else None) or self._new(fetch, priority)
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
        """What was read ahead, now on its way to where this fetch wants it; None if that has not begun or has failed,
        and is to be read like anything else.
        """
        ticket = self._ahead.pop(fetch.key, None)
        if ticket is None or ticket.issued.is_set():
            return None
        if self._queue.waits(ticket):
            self._queue.remove(ticket)
            return None
        ticket.fetch = fetch
        self._line_up(ticket)
        self._queue.resume(ticket, priority)
        return ticket

    def _new(self, fetch: Fetch, priority: int) -> Ticket:
        ticket = Ticket(fetch, priority)
        self._line_up(ticket)
        return self._queue.push(ticket)

    def _line_up(self, ticket: Ticket) -> None:
        """Behind what its RAM slot, if it has one, was asked for before."""
        fetch = ticket.fetch
        if fetch.host is None:
            return
        before = self._last_on[fetch.host]
        if before is not None and fetch.read and before.fetch.read and self._queue.waits(before):
            # It has not begun, and its place in RAM is another's: it is read past RAM, if anybody still wants it.
            ticket.behind, before.behind = before.behind, None
            before.fetch = before.fetch._replace(host=None)
            if before.dropped:
                self._queue.remove(before)
        elif before is not None:
            ticket.behind = before
            self._queue.promote([before], ticket.priority)
        self._last_on[fetch.host] = ticket

    def _read(self) -> None:
        while (work := self._queue.take()) is not None:
            if isinstance(work, SharedRead):
                work.help()
                continue
            try:
                if not self._mover.move(work):
                    continue
            except BaseException as error:  # handed over to the demand that needs the expert
                work.error = error
            self._queue.done(work)


def _for_the_demand(ticket: Ticket) -> OffmoeError:
    key, error = ticket.fetch.key, ticket.error
    if isinstance(error, OffmoeError):
        return type(error)(f"expert {key.expert} of MoE layer {key.layer}: {error}")
    return TransferError(f"expert {key.expert} of MoE layer {key.layer} could not be loaded: {error!r}")
