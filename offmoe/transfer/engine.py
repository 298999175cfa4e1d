"""What the computing thread asks for: start fetches, wait for them, say which slots have been computed with.

Moves: nothing itself. Reader threads (reader.py) carry out the tickets that are queued here; copies out of pinned RAM
are queued at once (ram_slots.py).
Bound: some microseconds per fetch; waits are bound by the disk, then by the link to the device.
Must never: leave a slot with an expert that nothing has asked for. After any failure the caller forgets all residency.

A fetch is one movement of one expert: from disk, or from a RAM slot of the host tier, into a device slot. A prefetch is
a fetch that no computation waits for yet. A read-ahead has no slot: its bytes stay in a staging buffer until a fetch
adopts it, or until the next access runs without it and it is cancelled.

The fetches of a layer that needs several waves are queued at once. Their reads do not wait for their slots, only their
copies do: as many experts as there are staging buffers are read ahead, even where the layer has a single slot.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from offmoe.device.backend import Stream
from offmoe.errors import CLOSED, TransferError
from offmoe.io_limits import READERS
from offmoe.transfer.arrival import Arriving
from offmoe.transfer.fill_queue import FillProgress, fill_batches
from offmoe.transfer.queue import TicketQueue
from offmoe.transfer.ram_slots import RamSlots
from offmoe.transfer.read_aheads import ReadAheads
from offmoe.transfer.reader import Reader
from offmoe.transfer.slot_writer import NewSlots, SlotWriter
from offmoe.transfer.staging import HostMemory
from offmoe.transfer.ticket import DEMAND, NEXT, NO_SLOT, Ticket
from offmoe.transfer.waits import WAITS, Waits
from offmoe.types import ExpertKey, Fetch, Fill, Wave


class TransferEngine:
    """Moves the experts of one model into slots. All methods are for one thread, which computes."""

    def __init__(
        self,
        writer: SlotWriter,
        *,
        host_slots: int = 0,
        on_stall: Callable[[int, float], None] = lambda layer, seconds: None,
        waits: Waits = WAITS,
    ) -> None:
        """Allocate host memory and start the readers.

        Args:
            writer: The slots, and the store whose experts fill them.
            host_slots: Number of RAM slots that plans name (`Fetch.host`).
            on_stall: Called with (MoE layer, seconds) when computation has waited for an expert.
            waits: The waits; tests leave one of them out.

        Raises:
            CapacityError: The system does not give the host memory.
        """
        self.writer = writer
        self._on_stall, self._waits = on_stall, waits
        self.host = HostMemory(writer.backend, writer.store.buffer_bytes, host_slots)
        self._queue = TicketQueue(READERS, self.host.plan, self.host.needs_staging)
        self._tickets: dict[int, Ticket] = {}
        """Per slot the next ticket to land in it; tickets of later waves follow by `Ticket.next`."""
        self._num_uses = [0] * len(writer.arena)
        """Per slot, how many times it has been computed with."""
        self.ram = RamSlots(self._queue, writer, self.host, waits, host_slots)
        self._read_aheads = ReadAheads(self._queue)
        self._closed = False
        self._readers: list[Reader] = []
        try:
            for i in range(READERS):
                reader = Reader(i, self._queue, writer, self.host, waits)
                reader.start()
                self._readers.append(reader)
        except BaseException:  # the system gives no more threads, or Ctrl-C
            self.close()
            raise

    def stream(self, waves: Sequence[Wave]) -> None:
        """Start all fetches of one access, in the order of its waves.

        The waves must be computed in that order. An expert is copied into a slot of earlier waves only when `computed`
        has been called for each of them.
        """
        if not waves:
            return
        self.fetch(waves[0].fetches)
        self.demand([slot for _, slot in waves[0].experts])
        if len(waves) == 1:
            return
        num_uses = Counter(slot for _, slot in waves[0].experts)
        for wave in waves[1:]:
            for fetch in wave.fetches:
                self._start(fetch, DEMAND, num_uses[fetch.slot])
            num_uses.update(slot for _, slot in wave.experts)

    def fetch(self, fetches: Sequence[Fetch]) -> None:
        """Start fetches that computation is about to wait for."""
        for fetch in fetches:
            self._start(fetch, DEMAND)

    def prefetch(self, fetches: Sequence[Fetch]) -> None:
        """Start fetches for the next layer. They go before earlier prefetches that have not begun."""
        if fetches:
            with self._queue.lock:
                self._queue.age()
                for fetch in fetches:
                    self._start(fetch, NEXT)

    def read_ahead(self, keys: Sequence[ExpertKey]) -> None:
        """Cancel the read-aheads that no fetch has adopted, and begin to read these experts, behind everything else.

        To be called once per access, after its fetches.
        """
        if not self._closed:
            self._read_aheads.replace(keys)

    def demand(self, slots: Sequence[int]) -> None:
        """Put prefetches into these slots before other prefetches: computation is about to wait for them."""
        if not self._tickets:
            return
        tickets = [t for slot in slots if (t := self._tickets.get(slot)) and t.priority != DEMAND]
        if tickets:
            with self._queue.lock:
                self._queue.promote(tickets)

    def coming(self, slot: int) -> Ticket | None:
        """The ticket that the next computation with `slot` has to wait for; None if its expert is resident."""
        ticket = self._tickets.get(slot)
        return None if ticket is None or ticket.lands_after > self._num_uses[slot] else ticket

    def is_resident(self, slots: Sequence[int]) -> bool:
        """Whether `ready` has to be called for none of these slots."""
        return not self._tickets or all(self.coming(slot) is None for slot in slots)

    def divide(self, experts: Sequence[tuple[int, int]]) -> tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]]:
        """(expert, slot) pairs: those that are resident, and those for which `ready` has to be called."""
        if not self._tickets:
            return experts, ()
        coming = {slot for _, slot in experts if self.coming(slot) is not None}
        return [pair for pair in experts if pair[1] not in coming], [pair for pair in experts if pair[1] in coming]

    def arriving(self, slot: int) -> Arriving | None:
        """The expert on its way into `slot`, to compute with while it arrives; None if it does not part by part."""
        ticket = self.coming(slot)
        return None if ticket is None or ticket.issued.is_set() else self.writer.arriving(ticket)

    def ready(self, *slots: int) -> None:
        """Make computation wait for the last fetch into each of these slots.

        The calling thread waits only until the copies have been queued; how long is reported to `on_stall`.

        Raises:
            OffmoeError: A fetch failed.
        """
        compute: Stream | None = None
        for slot in slots:
            ticket = self.coming(slot)
            if ticket is None:
                continue
            self._take(slot, ticket)
            compute = compute or self.writer.backend.compute
            self._waits.slot_landed(compute, self.writer.landed(slot))

    def _take(self, slot: int, ticket: Ticket) -> None:
        """Wait until the copy of a ticket has been queued; the slot's next ticket is the next one to land."""
        waited = ticket.arrival.take_waited_s()
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
        ticket.check()

    def fill(self, fills: Sequence[Fill]) -> None:
        """Begin to read experts into free slots and free RAM slots, behind everything else.

        They take effect by `settle_fills` only. No two fills may have the same place.

        Raises:
            CapacityError: The system does not give the memory for the windows of small experts.
        """
        batches = fill_batches(self.writer.store, fills, self.host)
        with self._queue.lock:
            if self._closed or not batches:
                return
            if any(batch.windowed for batch in batches) and self.host.windows is None:
                self._queue.fills.idle_windows = [*range(self.host.open_windows())]
            self._queue.fills.add(batches, lambda key: self.writer.store.record(key).nbytes)
            self._queue.lock.notify_all()

    def settle_fills(self, demanded: Iterable[ExpertKey]) -> list[Fetch]:
        """The fills that take effect now, before an access: those that have landed, and demanded ones under way.

        From now on their experts are in their slots like fetched ones, and must be planned as such.

        Args:
            demanded: The experts that the access demands.
        """
        queue = self._queue
        if not queue.fills.is_open:
            return []
        with queue.lock:
            tickets = queue.fills.settle(frozenset(demanded))
            for ticket in tickets:
                slot = ticket.fetch.slot
                if slot != NO_SLOT:
                    ticket.lands_after = self._num_uses[slot]
                    self._tickets[slot] = ticket
                self.ram.used_by(ticket)
            queue.lock.notify_all()
        return [ticket.fetch for ticket in tickets]

    @property
    def filling(self) -> bool:
        """Whether a fill may still take effect."""
        return self._queue.fills.is_open

    @property
    def fill_progress(self) -> FillProgress:
        """How far the background fill has come. Any thread may ask."""
        return self._queue.fills.progress

    def computed(self, slots: Sequence[int]) -> None:
        """Note that everything that computes with `slots` has been queued on the compute stream."""
        if slots:
            self.writer.computed(slots)
        for slot in slots:
            self._num_uses[slot] += 1
        if not self._tickets:
            return
        for slot in slots:
            ticket = self._tickets.get(slot)
            if ticket is not None and ticket.turn is not None and ticket.lands_after == self._num_uses[slot]:
                ticket.turn.set()

    def forget(self) -> None:
        """Drop all tickets and wait for those that readers work on, so that no slot changes afterwards and no copy uses
        host memory any more.

        Errors of dropped tickets are not raised.
        """
        with self._queue.lock:
            self._tickets.clear()
            self._read_aheads.forget()
            running = self._queue.clear()  # more than `_tickets` had: a slot may have been given to another expert
            batches = self._queue.fills.clear()
        self.ram.forget()
        for issued in [ticket.issued for ticket in running] + [batch.issued for batch in batches]:
            issued.wait()
        self.writer.drain()
        self._queue.reclaim()

    def settle(self) -> None:
        """Carry out everything that is under way, but for fills, and wait until all copies have landed.

        Raises:
            OffmoeError: A fetch failed. The caller forgets all residency.
        """
        self.read_ahead(())
        self._queue.finish()
        for ticket in (*self._tickets.values(), *self.ram.last):
            ticket.check()
        self._tickets.clear()
        self.writer.settle()

    def prepare(self, slots: NewSlots) -> Callable[[], None]:
        """Allocate what other slots need, and change nothing yet; as `SlotArena.prepare`, behind `settle`."""
        changes = self.host.prepare(slots.num_in_host, slots.kept.in_ram), self.writer.prepare(slots)

        def commit() -> None:
            self.ram.forget(slots.num_in_host)
            for change in changes:
                change()
            self._num_uses = [0] * len(self.writer.arena)

        return commit

    def close(self) -> None:
        """Stop the readers and release host memory; idempotent. Takes at most as long as one system call of a read."""
        if self._closed:
            return
        self._closed = True
        with self._queue.lock:
            self._queue.clear()
            self._queue.close()
        for reader in self._readers:
            reader.join()
        self.forget()
        self.writer.release()
        self.host.close()

    def _start(self, fetch: Fetch, priority: int, num_uses: int = 0) -> None:
        """Start a fetch that lands when its slot has been computed with `num_uses` more times."""
        if self._closed:
            raise TransferError(CLOSED)
        slot = fetch.slot
        copying, ticket = self._displace(fetch, num_uses), None
        lands_after = self._num_uses[slot] + num_uses
        if priority == DEMAND and not num_uses and copying is None:
            ticket = self.ram.copy(fetch, lands_after)
        if ticket is None:
            turn = threading.Event() if num_uses else None
            ticket = self._queued(Ticket(fetch, priority, lands_after=lands_after, turn=turn, superseded=copying))
        before = self._tickets.get(slot)
        if before is None or not num_uses:
            self._tickets[slot] = ticket
        else:
            while before.next is not None:
                before = before.next
            before.next = ticket

    def _displace(self, fetch: Fetch, num_uses: int) -> Ticket | None:
        """Drop what a fetch takes its places from; gives the ticket that is still copying into its slot."""
        queue = self._queue
        before = None if num_uses else self._tickets.get(fetch.slot)
        if not queue.fills.is_open and (before is None or before.issued.is_set()):
            return None
        copying: Ticket | None = None
        with queue.lock:
            if queue.fills.is_open:
                filled, filled_in_ram = queue.fills.displace(fetch)
                if filled_in_ram is not None:
                    self.ram.used_by(filled_in_ram)
                if filled is not None and filled.landing:
                    copying = filled
            if before is not None:
                queue.drop(before)
                copying = copying or (before if before.landing else before.superseded)
        return None if copying is None or copying.issued.is_set() else copying

    def _queued(self, ticket: Ticket) -> Ticket:
        """Hand a ticket to the readers, or let the read-ahead of its expert go on in its place; gives which it is."""
        with self._queue.lock:
            adopted = self._read_aheads.adopt(ticket) if ticket.fetch.read_ahead else None
            self.ram.follow(adopted or ticket)
            if adopted is None:
                return self._queue.push(ticket)
            self._queue.resume(adopted, ticket.priority)
            return adopted
