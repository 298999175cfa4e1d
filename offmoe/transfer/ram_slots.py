"""RAM slots of the host tier as tickets use them, one after the other, and the copies that need no reader.

Moves: experts from pinned RAM slots into device slots. Such a copy is queued by the computing thread, because that
takes less time than to wake a reader up: 224 us went by before a reader had queued it.
Bound: the link to the device.
Must never: wait on the host. A fetch that has to wait for another ticket, for its turn or for a pageable copy is left
to the readers, and so are prefetches, whose copies wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offmoe.transfer.queue import TicketQueue
from offmoe.transfer.slot_writer import SlotWriter
from offmoe.transfer.staging import HostMemory
from offmoe.transfer.ticket import DEMAND, Ticket
from offmoe.transfer.waits import Waits
from offmoe.types import ExpertKey, Fetch


class RamSlots:
    """The RAM slots of one model, for the thread that computes."""

    def __init__(self, queue: TicketQueue, writer: SlotWriter, host: HostMemory, waits: Waits, count: int) -> None:
        """count: number of RAM slots."""
        self._queue, self._writer, self._host, self._waits = queue, writer, host, waits
        self._last: list[Ticket | None] = [None] * count
        """Per RAM slot, the last ticket that uses it."""
        self._segments: dict[int, tuple[ExpertKey, list[torch.Tensor]]] = {}
        """Per RAM slot, the expert that was copied last, and its segments: uint8 [nbytes] each."""
        self._to_copy: list[Ticket] = []
        """Tickets that `copy` has to carry out."""

    @property
    def last(self) -> list[Ticket]:
        """The last tickets of all RAM slots that had one."""
        return [ticket for ticket in self._last if ticket is not None]

    def used_by(self, ticket: Ticket) -> None:
        """Note that a ticket that is under way, or was, uses its RAM slot after all others."""
        if ticket.fetch.host is not None:
            self._last[ticket.fetch.host] = ticket

    def follow(self, ticket: Ticket) -> None:
        """Order a ticket behind the last one that uses its RAM slot, if it has one. The queue's lock is held."""
        fetch = ticket.fetch
        if fetch.host is None:
            return
        before = self._last[fetch.host]
        if before is not None and fetch.read and before.fetch.read and self._queue.is_waiting(before):
            # `before` has not begun and loses its RAM slot to this ticket: it is read past RAM, if it is still wanted.
            ticket.after_in_ram, before.after_in_ram = before.after_in_ram, None
            before.fetch = before.fetch._replace(host=None)
            if before.dropped:
                self._queue.remove(before)
        elif before is not None:
            ticket.after_in_ram = before
            self._queue.promote([before], ticket.priority)
        self._last[fetch.host] = ticket

    def takes(self, ticket: Ticket) -> bool:
        """Whether `copy` will carry the ticket out, so that no reader must. The queue's lock is held.

        The ticket has been ordered behind all that it waits for, and the caller calls `copy` next.
        """
        fetch, slots, before = ticket.fetch, self._host.slots, ticket.after_in_ram
        if ticket.priority != DEMAND or fetch.read or fetch.host is None or not ticket.slot_is_free:
            return False
        if fetch.slot >= self._writer.arena.num_on_device or slots is None or not slots.pinned(fetch.host):
            return False
        if before is not None and (before.error is not None or not before.issued.is_set()):
            return False
        ticket.landing = True
        self._to_copy.append(ticket)
        return True

    def copy(self) -> None:
        """Queue the copies of the tickets that were taken. What goes wrong with one is raised where it is needed."""
        while self._to_copy:
            ticket = self._to_copy[-1]
            slot, host = ticket.fetch.slot, ticket.fetch.host
            assert host is not None
            try:
                self._waits.slot_last_read(self._writer.backend.copies, self._writer.last_read[slot])
                self._writer.write(ticket, self._segments_in(host, ticket.fetch.key), self._host.slots_copied[host])
            except Exception as error:
                ticket.error = error
            self._end(self._to_copy.pop())

    def pieces(self, key: ExpertKey, host: int, slot: int) -> Sequence[tuple[int, int, int]]:
        """The plain copies that bring an expert from a RAM slot into a device slot, for a kernel that makes them.

        Args:
            host: A RAM slot that holds the expert.
            slot: Any slot of the expert's layer.

        Returns:
            (address in RAM, offset in the slot, words of 4 bytes) of each; () if the slot is not pinned, or if copies
            of whole words do not do.
        """
        slots, arena = self._host.slots, self._writer.arena
        if slots is None or not slots.pinned(host):
            return ()
        start, pieces = arena.bytes(slot).data_ptr(), []
        for run, data in zip(self._writer.runs(Fetch(key, slot, None)), self._segments_in(host, key), strict=True):
            if run is None:
                return ()
            address, offset, nbytes = data.data_ptr(), run.data_ptr() - start, data.nbytes
            if address % 4 or offset % 4 or nbytes % 4:
                return ()
            pieces.append((address, offset, nbytes // 4))
        return pieces

    def _segments_in(self, host: int, key: ExpertKey) -> list[torch.Tensor]:
        """The segments of an expert that is in a RAM slot."""
        known = self._segments.get(host)
        if known is not None and known[0] == key:
            return known[1]
        assert self._host.slots is not None
        segments = self._writer.store.segments(key, self._host.slots.tensor(host))
        self._segments[host] = key, segments
        return segments

    def forget(self, count: int | None = None) -> None:
        """Drop everything. count: the new number of RAM slots.

        Ctrl-C may have left tickets that nothing will carry out; a reader may wait for one.
        """
        while self._to_copy:
            self._end(self._to_copy.pop())
        self._segments.clear()  # the memory may be given back
        self._last = [None] * (len(self._last) if count is None else count)

    def _end(self, ticket: Ticket) -> None:
        ticket.superseded = ticket.after_in_ram = None
        ticket.issued.set()
        ticket.arrival.end()
