"""What a reader thread does with one ticket: shard -> staging buffer or RAM slot -> device slot.

Moves: experts, in parts of a few MB. All readers without a ticket help with the parts of another. The expert of a
demand is copied into its slot while the rest of it is read. If it stands there as on the disk, it is read into the
slot itself.
Bound: the disk, then the link to the device.
Must never: write to a slot before its turn, or go on with a read that nobody needs. W2 to W7 of waits.py are called
here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from offmoe.device.backend import Event, copy_in_ram
from offmoe.io_limits import AHEAD_BYTES
from offmoe.transfer.fill_queue import FillBatch
from offmoe.transfer.fill_reader import FillReader
from offmoe.transfer.queue import TicketQueue
from offmoe.transfer.slot_writer import SlotWriter
from offmoe.transfer.staging import HostMemory
from offmoe.transfer.ticket import DEMAND, SharedRead, Ticket
from offmoe.transfer.waits import Waits


class Reader(threading.Thread):
    """One of the threads that carry out tickets.

    A model that is collected as garbage may be closed inside one of its own readers, which cannot wait for its own end.
    `offmoe.handle` recognizes a reader by this class.
    """

    def __init__(self, number: int, queue: TicketQueue, writer: SlotWriter, host: HostMemory, waits: Waits) -> None:
        super().__init__(name=f"offmoe-reader-{number}", daemon=True)
        self._queue, self._writer, self._host, self._waits = queue, writer, host, waits

    def run(self) -> None:
        """Take tickets and carry them out until the queue is closed."""
        self._writer.backend.enter_thread()
        fill = FillReader(self._queue, self._writer, self._host, self._waits, self._carry_out)
        while (work := self._queue.take()) is not None:
            if isinstance(work, FillBatch):
                fill.carry_out(work)
            else:
                self._carry_out(work)

    def _carry_out(self, work: Ticket | SharedRead) -> None:
        if isinstance(work, SharedRead):
            work.help()
            return
        try:
            if not self._move(work):
                return
        except BaseException as error:  # `TransferEngine.ready` raises it, if anything needs the expert
            work.error = error
        self._queue.done(work)

    def _move(self, ticket: Ticket) -> bool:
        """Carry out a ticket; False if it is a read-ahead that now stays in staging."""
        host_slot, i = ticket.fetch.host, ticket.buffer
        if host_slot is not None and not ticket.arrival.begun:
            self._move_through_ram(ticket, host_slot)
            return True
        assert i is not None
        buffer, copied = self._host.staging.tensor(i), self._host.staging_copied[i]
        if not ticket.arrival.begun:
            self._waits.staging_copied(copied)
            self._read(ticket, self._host.staging.memory(i), buffer)
            if self._queue.stays_in_staging(ticket):
                return False
        if ticket.fetch.host is not None:  # a read-ahead that a fetch has given a RAM slot
            assert self._host.slots is not None
            self._wait_for_host_slot(ticket, ticket.fetch.host)
            copy_in_ram(self._host.slots.tensor(ticket.fetch.host), buffer)
            self._host.filled(ticket.fetch.host)
        self._land(ticket, buffer, copied)
        return True

    def _move_through_ram(self, ticket: Ticket, host_slot: int) -> None:
        """Carry out a ticket whose expert is in a RAM slot, or is to be kept there."""
        assert self._host.slots is not None
        memory, tensor = self._host.slots.memory(host_slot), self._host.slots.tensor(host_slot)
        self._wait_for_host_slot(ticket, host_slot)
        i = ticket.buffer
        if i is None:  # the RAM slot is pinned, or nothing is
            if ticket.fetch.read:
                self._read(ticket, memory, tensor)
                self._host.filled(host_slot)
            self._land(ticket, tensor, self._host.slots_copied[host_slot])
            return
        if ticket.fetch.read:
            key, store = ticket.fetch.key, self._writer.store
            self._by_parts(ticket, lambda part: store.read_part(key, part, memory, self._queue.stopping))
            self._host.filled(host_slot)
        buffer, copied = self._host.staging.tensor(i), self._host.staging_copied[i]
        self._waits.staging_copied(copied)
        copy_in_ram(buffer, tensor)
        self._land(ticket, buffer, copied)

    def _wait_for_host_slot(self, ticket: Ticket, host_slot: int) -> None:
        """Wait until the RAM slot holds the expert, or may be read into."""
        earlier = ticket.after_in_ram
        if earlier is not None:
            self._waits.host_slot_issued(earlier.issued)
            if not ticket.fetch.read and earlier.error is not None:
                raise earlier.error
        if ticket.fetch.read:
            self._waits.host_slot_copied(self._host.slots_copied[host_slot])

    def _read(self, ticket: Ticket, memory: memoryview, buffer: torch.Tensor) -> None:
        """Read an expert into host memory, of which `buffer` (uint8 [bytes]) is a tensor.

        Parts are copied into the slot while others are read, as soon as the ticket is a demand and its slot is free.
        """
        ticket.arrival.begun = True
        in_staging, stop = ticket.buffer is not None, _Stop(ticket, self._queue.stopping)
        slot = self._slot_to_read_into(ticket)

        def read(part: int) -> None:
            step = None if ticket.priority == DEMAND else AHEAD_BYTES
            self._writer.store.read_part(ticket.fetch.key, part, memory if slot is None else slot, stop, step)
            if slot is not None:
                ticket.arrival.part_landed(part)
                return
            ticket.arrival.part_read(part)
            if not in_staging or ticket.fetch.host is None:  # else it is copied to its RAM slot first
                self._copy_read_parts(ticket, buffer)

        self._by_parts(ticket, read)

    def _slot_to_read_into(self, ticket: Ticket) -> memoryview | None:
        """The memory of a ticket's slot, claimed, if the expert may land there now and needs no copy."""
        if ticket.fetch.host is not None:
            return None
        slot = self._writer.slot_as_stored(ticket.fetch)
        if slot is None or not self._queue.lands_early(ticket) or not self._claim_slot(ticket):
            return None
        ticket.arrival.early = self._writer.early(ticket.fetch)
        return slot

    def _by_parts(self, ticket: Ticket, do: Callable[[int], None]) -> None:
        """do(part) for each part of an expert, by as many readers as are free."""
        num_parts = self._writer.store.parts(ticket.fetch.key)
        if num_parts == 1:
            do(0)
        else:
            self._queue.share(SharedRead(ticket, num_parts, do))

    def _copy_read_parts(self, ticket: Ticket, buffer: torch.Tensor) -> None:
        """Copy the parts that have been read into the device slot, if the expert may land there already."""
        arrival = ticket.arrival
        if ticket.fetch.slot >= self._writer.arena.num_on_device:
            return
        if arrival.early is None:
            with arrival.lock:
                if arrival.early is None and self._queue.lands_early(ticket) and self._claim_slot(ticket):
                    arrival.early = self._writer.early(ticket.fetch)
        while arrival.early is not None and (part := arrival.take_part()) is not None:
            self._writer.write_part(ticket.fetch, part, buffer, arrival)
            arrival.part_landed(part)

    def _claim_slot(self, ticket: Ticket) -> bool:
        """Wait until the ticket's slot is free; False if the ticket was dropped meanwhile."""
        self._queue.begin_landing(ticket)
        if ticket.turn is not None:
            self._waits.slot_turn(ticket.turn)
        if ticket.superseded is not None:
            self._waits.superseded_issued(ticket.superseded.issued)
        if ticket.dropped:
            return False
        slot, writer = ticket.fetch.slot, self._writer
        if slot < writer.arena.num_on_device:
            self._waits.slot_last_read(writer.backend.copies, writer.last_read[slot])
        return True

    def _land(self, ticket: Ticket, buffer: torch.Tensor, copied: Event) -> None:
        """Copy what is not in the slot yet from `buffer` (uint8 [bytes]); `copied` will mark the end of the copies."""
        arrival = ticket.arrival
        if arrival.begun and arrival.early is None and ticket.priority == DEMAND:  # speculative while it was read
            self._by_parts(ticket, lambda part: self._copy_read_parts(ticket, buffer))
        if arrival.early is not None or self._claim_slot(ticket):
            self._writer.write_rest(ticket, buffer, copied)


class _Stop:
    """Whether a read should end: its ticket has become useless, or the model is being closed."""

    def __init__(self, ticket: Ticket, stopping: threading.Event) -> None:
        self._ticket, self._stopping = ticket, stopping

    def is_set(self) -> bool:
        return self._stopping.is_set() or self._ticket.is_useless
