"""What a reader thread does with one batch of the background fill: shard -> window or staging buffer -> free places.

Moves: experts that nothing has asked for. An expert for RAM alone is read into its RAM slot itself.
Bound: the disk while the model is idle, a ninth of its time while the model computes.
Must never: read on while a demand is queued, or write to a place that a demand has taken.

Before each system call the reader gives way: it carries out whatever has been demanded meanwhile, and goes on after.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from itertools import islice

import torch

from offmoe.device.backend import Event, copy_in_ram
from offmoe.io_limits import AHEAD_BYTES, FILL_BYTES
from offmoe.transfer.fill_queue import FillBatch
from offmoe.transfer.queue import TicketQueue
from offmoe.transfer.slot_writer import SlotWriter
from offmoe.transfer.staging import HostMemory
from offmoe.transfer.ticket import NO_SLOT, SharedRead, Ticket
from offmoe.transfer.waits import Waits

logger = logging.getLogger(__name__)


class FillReader:
    """The part of a reader that fills. Each reader has one."""

    def __init__(
        self,
        queue: TicketQueue,
        writer: SlotWriter,
        host: HostMemory,
        waits: Waits,
        carry_out: Callable[[Ticket | SharedRead], None],
    ) -> None:
        """carry_out: does what goes before the fill, in the calling thread."""
        self._queue, self._writer, self._host, self._waits = queue, writer, host, waits
        self._carry_out = carry_out

    def carry_out(self, batch: FillBatch) -> None:
        """Read a batch and bring its experts to their places."""
        try:
            memory, buffer, copied = self._open(batch)
            self._read(batch, memory)
            data = iter(batch.plan.segments(buffer))
            for ticket in batch.tickets:
                segments = list(islice(data, len(self._writer.store.record(ticket.fetch.key).segments)))
                self._land(batch, ticket, segments, copied)
        except CancelledError:  # displaced, or the model is being closed
            pass
        except BaseException as error:
            batch.error = error
            self._end_of_fill(batch, error)
        self._queue.finish_fill(batch, self._host.close_windows)

    def give_way(self, batch: FillBatch) -> None:
        """Carry out what goes before a batch, and rest as long as the model's computing asks for it."""
        self._queue.step_ended(batch)
        while (work := self._queue.take_before(batch)) is not None:
            self._carry_out(work)

    def _open(self, batch: FillBatch) -> tuple[memoryview, torch.Tensor, Event]:
        """Where a batch is read to, when nothing is copied out of there any more: memory, the same as uint8 [bytes],
        and the event that is to mark the last copy out of it."""
        i = batch.tickets[0].fetch.host if batch.direct else batch.buffer
        assert i is not None
        if batch.direct:
            assert self._host.slots is not None
            buffers, copied = self._host.slots, self._host.slots_copied[i]
            self._waits.host_slot_copied(copied)
        elif batch.windowed:
            assert self._host.windows is not None
            buffers, copied = self._host.windows, self._host.windows_copied[i]
            self._waits.staging_copied(copied)
        else:
            buffers, copied = self._host.staging, self._host.staging_copied[i]
            self._waits.staging_copied(copied)
        return buffers.memory(i), buffers.tensor(i), copied

    def _read(self, batch: FillBatch, memory: memoryview) -> None:
        stop, parts = _Stop(self, batch, self._queue), len(batch.plan.parts)

        def read(part: int) -> None:
            step = FILL_BYTES if self._queue.fills.is_idle else AHEAD_BYTES
            self._writer.store.read_planned(batch.plan, part, memory, stop, None if batch.is_demanded else step)

        if parts == 1 or batch.windowed:
            for part in range(parts):
                read(part)
        else:
            self._queue.share(SharedRead(batch.tickets[0], parts, read))

    def _land(self, batch: FillBatch, ticket: Ticket, data: Sequence[torch.Tensor], copied: Event) -> None:
        """Copy an expert to its places. data: uint8 [nbytes] per segment."""
        fetch, writer = ticket.fetch, self._writer
        self._queue.begin_landing(ticket)
        if ticket.dropped:
            return
        if fetch.host is not None and not batch.direct:
            assert self._host.slots is not None
            self._waits.host_slot_copied(self._host.slots_copied[fetch.host])
            places = writer.store.segments(fetch.key, self._host.slots.tensor(fetch.host))
            for into, segment in zip(places, data, strict=True):
                copy_in_ram(into, segment)
        if fetch.host is not None:
            self._host.filled(fetch.host)
        if fetch.slot != NO_SLOT:
            if fetch.slot < writer.arena.num_on_device:
                self._waits.slot_last_read(writer.backend.copies, writer.last_read[fetch.slot])
            writer.write(ticket, data, copied)
        self._queue.fill_landed(ticket, writer.store.record(fetch.key).nbytes)

    def _end_of_fill(self, batch: FillBatch, error: BaseException) -> None:
        """Nothing waits for the expert: say why the fill ends, and end it. A demand for the expert reads it again."""
        key = batch.tickets[0].fetch.key
        reason = f"expert {key.expert} of MoE layer {key.layer}: {error}"
        with self._queue.lock:
            first = self._queue.fills.progress.error is None
            self._queue.fills.fail(reason)
        if first:
            logger.warning("the background fill ends early: %s", reason)


class _Stop:
    """Asked before every system call of a batch: gives way, then tells whether the read should end."""

    def __init__(self, reader: FillReader, batch: FillBatch, queue: TicketQueue) -> None:
        self._reader, self._batch, self._queue = reader, batch, queue

    def is_set(self) -> bool:
        self._reader.give_way(self._batch)
        return self._queue.stopping.is_set() or self._batch.is_useless or self._batch.displaced
