"""One expert on its way, as a reader thread carries it: shard -> staging or RAM slot -> device slot.

What moves: what tickets say, in parts of a few MB by all readers that have nothing else to do; what is demanded is
copied into its slot while the rest of it is read. Bound: the disk, then the link. The waits W2 to W7 are here; what
each is for stands in transfer.py, which decides what is moved and in which order.

Must never write to a slot before its turn, nor go on reading what nobody can want any more.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch

from offmoe.device.arena import HostBuffers, SlotArena
from offmoe.device.backend import Backend, Event, copy_in_ram
from offmoe.io_limits import AHEAD_BYTES, READERS
from offmoe.storage.layout import Assembly, ExpertLayout
from offmoe.storage.store import ExpertStore
from offmoe.transfer.arrival import Arriving
from offmoe.transfer.queue import DEMAND, SharedRead, Ticket, TicketQueue
from offmoe.transfer.staging import host_buffers, staging_plan

PIECE_BYTES = 16 << 20
"""Of a copy that nobody waits for: 0.7 ms of a 24 GB/s link. The copy engine takes copies in order (io.md section 6:
51 KB waited 12 ms behind 200 MB)."""
PIECES_IN_FLIGHT = 2


class _Interest:
    """Asked between two system calls of a read: is it still for something?"""

    def __init__(self, ticket: Ticket, closing: threading.Event):
        self._ticket, self._closing = ticket, closing

    def is_set(self) -> bool:
        return self._closing.is_set() or self._ticket.is_stopped


class Mover:
    """Carries out tickets. Reader threads call `move`, several at once; `stop` and `close` are their owner's."""

    def __init__(
        self,
        store: ExpertStore,
        arena: SlotArena,
        backend: Backend,
        layouts: Sequence[ExpertLayout],
        assemblies: Sequence[Assembly],
        host_slots: int,
    ):
        """host_slots: those in RAM that tickets name."""
        self._store, self._arena, self._backend = store, arena, backend
        self._layouts, self._assemblies = layouts, assemblies
        self.landed = [backend.event() for _ in range(len(arena))]
        """Per slot: what was copied into it last is there."""
        self.last_read = [backend.event() for _ in range(len(arena))]
        """Per slot: what computed with it last is done."""
        plan = staging_plan(store.buffer_bytes)
        self._staging = HostBuffers(plan.buffers, store.buffer_bytes, register=backend.pin, unregister=backend.unpin)
        self._staged = [backend.event() for _ in range(plan.buffers)]
        try:  # after staging: where little can be pinned, that little is what everything passes through
            self._host = host_buffers(host_slots, store.buffer_bytes, backend) if host_slots else None
        except BaseException:
            self._staging.close()
            raise
        self._copied = [backend.event() for _ in range(host_slots)]
        self._pieces = deque(backend.event() for _ in range(PIECES_IN_FLIGHT))
        self._piece_order = threading.Lock()
        self.queue = TicketQueue(READERS, plan, self._needs_buffer)
        self._stop = threading.Event()

    def stop(self) -> None:
        """Reads under way end at once, with an error."""
        self._stop.set()

    def close(self) -> None:
        """Release buffers, when no reader is left."""
        for event in (*self._staged, *self._copied):
            event.synchronize()
        self._staging.close()
        if self._host is not None:
            self._host.close()

    def arriving(self, ticket: Ticket) -> Arriving | None:
        """For what is copied into its slot part by part and stays as it was read; None for anything else."""
        key = ticket.fetch.key
        parts = self._store.parts(key)
        if parts == 1 or not self._backend.unified_memory:
            return None
        views = self._arena.views(ticket.fetch.slot, self._layouts[key.layer])
        assembly, runs = self._assemblies[key.layer], self._runs(ticket)
        places: dict[str, list[tuple[int, int, int]]] = {name: [] for name in views}
        for part in range(parts):
            for segment, start, end in self._store.arrived(key, part):
                run = runs[segment]
                if run is None:
                    return None
                name = assembly.destinations[segment].param
                at = run.data_ptr() - views[name].data_ptr()
                places[name].append((at + start, at + end, part))
        return Arriving(ticket.arrival, places)

    def move(self, ticket: Ticket) -> bool:
        """Whether there is nothing more to do: false for what has been read ahead and waits to be fetched."""
        if not ticket.arrival.begun and ticket.fetch.host is not None:
            self._move_through_ram(ticket, ticket.fetch.host)
            return True
        assert ticket.buffer is not None
        if not ticket.arrival.begun:
            self._staged[ticket.buffer].synchronize()  # W3
            self._bring(ticket, self._staging.memory(ticket.buffer), self._staging.tensor(ticket.buffer))
            if self.queue.parks(ticket):
                return False
        buffer = self._staging.tensor(ticket.buffer)
        if ticket.fetch.host is None:
            self._land(ticket, buffer, self._staged[ticket.buffer])
            return True
        self._wait_for_ram(ticket)
        assert self._host is not None
        copy_in_ram(self._host.tensor(ticket.fetch.host), buffer)
        self._land(ticket, buffer, self._staged[ticket.buffer])
        return True

    def _move_through_ram(self, ticket: Ticket, host: int) -> None:
        assert self._host is not None
        key, i = ticket.fetch.key, ticket.buffer
        self._wait_for_ram(ticket)
        memory, tensor = self._host.memory(host), self._host.tensor(host)
        if i is None:
            if ticket.fetch.read:
                self._bring(ticket, memory, tensor)
            self._land(ticket, tensor, self._copied[host])
            return
        if ticket.fetch.read:
            self._read_parts(ticket, lambda part: self._store.read_part(key, part, memory, self._stop))
        self._staged[i].synchronize()
        copy_in_ram(self._staging.tensor(i), tensor)
        self._land(ticket, self._staging.tensor(i), self._staged[i])

    def _needs_buffer(self, ticket: Ticket) -> bool:
        """Also where it comes from a RAM slot that is not pinned: a copy from there would hold up the stream."""
        host = ticket.fetch.host
        if host is None or self._host is None:
            return True
        return self._staging.pinned(0) and not self._host.pinned(host)

    def _wait_for_ram(self, ticket: Ticket) -> None:
        """Until the RAM slot of a ticket holds what is copied from there, or may be written to."""
        fetch, behind = ticket.fetch, ticket.behind
        if behind is not None:
            behind.issued.wait()  # W6
            if not fetch.read and behind.error is not None:
                raise behind.error
        if fetch.read and fetch.host is not None:
            self._copied[fetch.host].synchronize()  # W7

    def _bring(self, ticket: Ticket, memory: memoryview, buffer: torch.Tensor) -> None:
        """Read an expert into host memory (`buffer`, uint8 [bytes], is the same).

        As soon as somebody waits for it and its slot is free, what has arrived is copied while the rest is read.
        """
        arrival, key = ticket.arrival, ticket.fetch.key
        arrival.begun = True
        in_staging, interest = ticket.buffer is not None, _Interest(ticket, self._stop)

        def read(part: int) -> None:
            step = None if ticket.priority == DEMAND else AHEAD_BYTES
            self._store.read_part(key, part, memory, interest, step)
            arrival.add(part)
            if not in_staging or ticket.fetch.host is None:  # else it goes into its RAM slot first
                self._copy_arrived(ticket, buffer)

        self._read_parts(ticket, read)

    def _read_parts(self, ticket: Ticket, read: Callable[[int], None]) -> None:
        parts = self._store.parts(ticket.fetch.key)
        if parts == 1:
            read(0)
        else:
            self.queue.share(SharedRead(ticket, parts, read))

    def _copy_arrived(self, ticket: Ticket, buffer: torch.Tensor) -> None:
        """Into the slot, if that is the device's and it may land by now."""
        arrival = ticket.arrival
        if ticket.fetch.slot >= self._arena.on_device:
            return
        if arrival.runs is None:
            with arrival.lock:
                if arrival.runs is None and self.queue.lands_early(ticket) and self._begin(ticket):
                    arrival.runs = self._runs(ticket)
        while arrival.runs is not None and (part := arrival.take()) is not None:
            self._copy_part(ticket, part, buffer, arrival.runs)
            arrival.landed(part)

    def _runs(self, ticket: Ticket) -> Sequence[torch.Tensor | None]:
        key, slot = ticket.fetch.key, ticket.fetch.slot
        views = self._arena.views(slot, self._layouts[key.layer])
        return self._assemblies[key.layer].runs(self._store.record(key).segments, views)

    def _begin(self, ticket: Ticket) -> bool:
        """Wait until the ticket's slot is free: from now on it lands there. False if it goes nowhere any more."""
        self.queue.land(ticket)
        if ticket.turn is not None:
            ticket.turn.wait()  # W5
        if ticket.previous is not None:
            ticket.previous.issued.wait()  # W4
        if ticket.dropped:
            return False
        slot = ticket.fetch.slot
        if slot < self._arena.on_device:
            self._backend.copies.wait(self.last_read[slot])  # W2
        return True

    def _copy_part(self, ticket: Ticket, part: int, buffer: torch.Tensor, runs: Sequence[torch.Tensor | None]) -> None:
        key = ticket.fetch.key
        data = self._store.segments(key, buffer)
        for segment, start, end in self._store.arrived(key, part):
            run = runs[segment]
            if run is not None:
                self._backend.copies.copy(run[start:end], data[segment][start:end])

    def _land(self, ticket: Ticket, buffer: torch.Tensor, copied: Event) -> None:
        """From a buffer (uint8 [bytes]) that the expert was read into to its slot, but for what is there since it
        arrived; `copied` marks when that is done.
        """
        arrival = ticket.arrival
        if arrival.begun and arrival.runs is None and ticket.priority == DEMAND:  # read while nobody waited
            self._read_parts(ticket, lambda part: self._copy_arrived(ticket, buffer))
        early = arrival.runs
        landed = () if early is None else [i for i, run in enumerate(early) if run is not None]
        if early is None and not self._begin(ticket):
            return
        key, slot, copies = ticket.fetch.key, ticket.fetch.slot, self._backend.copies
        views = self._arena.views(slot, self._layouts[key.layer])
        segments, data = self._store.record(key).segments, self._store.segments(key, buffer)
        if slot >= self._arena.on_device:  # in RAM, where only the host reads it, and is done when it says so
            self._assemblies[key.layer].place(segments, data, views, copy_in_ram)
            return
        self._assemblies[key.layer].place(segments, data, views, functools.partial(self._copy, ticket), landed)
        self.landed[slot].record(copies)
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
