"""RAM slots of the host tier as tickets use them, one after the other, and the copies that need no reader.

Moves: experts from pinned RAM slots into device slots. Such a copy is queued by the computing thread, because that
takes less time than to wake a reader up: 224 us went by before a reader had queued it.
Bound: the link to the device.
Must never: wait on the host. A fetch that has to wait for another ticket, for its turn or for a pageable copy is left
to the readers, and so are prefetches, whose copies wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from offmoe.transfer.plain_copies import CopyTable
from offmoe.transfer.queue import TicketQueue
from offmoe.transfer.slot_writer import SlotWriter
from offmoe.transfer.staging import HostMemory
from offmoe.transfer.ticket import Ticket
from offmoe.transfer.waits import Waits
from offmoe.types import ExpertKey, Fetch


class RamSlots:
    """The RAM slots of one model, for the thread that computes."""

    def __init__(self, queue: TicketQueue, writer: SlotWriter, host: HostMemory, waits: Waits, count: int) -> None:
        """count: number of RAM slots."""
        self._queue, self._writer, self._host, self._waits = queue, writer, host, waits
        self._last: list[Ticket | None] = [None] * count
        """Per RAM slot, the last ticket that uses it; None if nothing has to wait for it."""
        self._copies = CopyTable(writer)

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
            if not before.issued.is_set():
                self._queue.promote([before], ticket.priority)
        self._last[fetch.host] = ticket

    def copy(self, fetch: Fetch, lands_after: int) -> Ticket | None:
        """Queue the copy of a demanded expert from its RAM slot into its slot, which nothing else copies into.

        Args:
            lands_after: As the ticket keeps it; reached.

        Returns:
            A ticket that is over, and has the error if the copy failed. None if the copy has to wait for another
            ticket, or is for a reader; nothing has changed then.
        """
        host, slots, writer = fetch.host, self._host.slots, self._writer
        if fetch.read or host is None or slots is None or fetch.slot >= writer.arena.num_on_device:
            return None
        before = self._last[host]
        if before is not None and (before.error is not None or not before.issued.is_set()):
            return None
        if not slots.pinned(host):
            return None
        try:
            self._copy(fetch, host)
        except Exception as error:  # raised where the expert is needed, if it is
            self._last[host] = failed = Ticket.over(fetch, lands_after, error)
            return failed
        self._last[host] = None
        return Ticket.over(fetch, lands_after)

    def _copy(self, fetch: Fetch, host: int) -> None:
        writer, slots = self._writer, self._host.slots
        assert slots is not None
        copies, memory, copied = writer.backend.copies, slots.tensor(host), self._host.slots_copied[host]
        self._waits.slot_last_read(copies, writer.last_read[fetch.slot])
        pairs = self._copies.pairs(fetch, memory)
        if pairs is None:
            writer.write(Ticket.over(fetch, 0), writer.store.segments(fetch.key, memory), copied)
            return
        for into, data in pairs:
            copies.copy(into, data)
        writer.copied(fetch.slot, copied)

    def pieces(self, key: ExpertKey, host: int, slot: int) -> Sequence[tuple[int, int, int]]:
        """The plain copies that bring an expert from a RAM slot into a device slot, for a kernel that makes them.

        Args:
            host: A RAM slot that holds the expert.
            slot: Any slot of the expert's layer.

        Returns:
            (address in RAM, offset in the slot, words of 4 bytes) of each; () if the slot is not pinned, or if copies
            of whole words do not do.
        """
        slots = self._host.slots
        if slots is None or not slots.pinned(host):
            return ()
        start, pieces = slots.tensor(host).data_ptr(), []
        for offset, place, nbytes in self._copies.segments(Fetch(key, slot, None)) or ():
            if (start + place) % 4 or offset % 4 or nbytes % 4:
                return ()
            pieces.append((start + place, offset, nbytes // 4))
        return pieces

    def forget(self, count: int | None = None) -> None:
        """Drop everything. count: the new number of RAM slots."""
        self._copies.forget_memory()
        self._last = [None] * (len(self._last) if count is None else count)
