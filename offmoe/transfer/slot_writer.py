"""Copies of experts from host buffers into slots: which bytes go where, and in what sizes.

Moves: one expert at a time, on the copy stream; whole, or part by part as it is read.
Bound: the link to the device, or memcpy on a CPU.
Must never: be called before the slot is free. Readers see to that (reader.py).
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from offmoe.device.arena import SlotArena
from offmoe.device.backend import Backend, Event, copy_in_ram
from offmoe.storage.layout import Assembly, Early, ExpertLayout
from offmoe.storage.read_plan import ALIGNMENT
from offmoe.storage.store import ExpertStore
from offmoe.transfer.arrival import Arrival, Arriving
from offmoe.transfer.ticket import DEMAND, Ticket
from offmoe.types import Fetch, KeptSlots

PIECE_BYTES = 16 << 20
"""Bytes of one copy of a speculative ticket: 0.7 ms on a link of 24 GB/s. The device does copies in the order in which
they are queued, and a demand's copy of 51 KB has been seen to wait 12 ms behind one of 200 MB."""
PIECES_IN_FLIGHT = 2
"""Speculative copies that are queued at once; a demand's copy therefore stands behind at most two of them."""


class StoredLayer(Protocol):
    """How the experts of one MoE layer stand in slots, and how they get there."""

    @property
    def layout(self) -> ExpertLayout:
        """The parameters of an expert in its slot."""

    @property
    def assembly(self) -> Assembly:
        """Which segment of an expert at rest goes to which parameter."""

    def of(self, expert: int) -> StoredLayer:
        """The layer as this expert stands in it, if it is stored otherwise than the rest; else the layer itself."""


class NewSlots(NamedTuple):
    """Slots that a model is to go on with.

    Args:
        on_device: one layout per device slot, as `SlotArena` takes them.
        in_ram: one layout per scratch slot in RAM.
        num_in_host: number of RAM slots of the host tier.
        kept: whose bytes the slots are to hold.
    """

    on_device: Sequence[ExpertLayout]
    in_ram: Sequence[ExpertLayout]
    num_in_host: int
    kept: KeptSlots


class SlotWriter:
    """Writes experts of all layers into the slots of one model. Several readers call it at once."""

    def __init__(
        self,
        store: ExpertStore,
        arena: SlotArena,
        backend: Backend,
        layers: Sequence[StoredLayer],
        in_ram: Sequence[StoredLayer] | None = None,
    ) -> None:
        """Prepare what all slots share.

        Args:
            store: The experts.
            arena: The slots.
            backend: The device.
            layers: One entry per MoE layer.
            in_ram: The same as they stand in scratch slots in RAM; None: as on the device.
        """
        self.store, self.arena, self.backend = store, arena, backend
        self._layers, self._in_ram = layers, layers if in_ram is None else in_ram
        self._landed: dict[int, Event] = {}
        """By slot: the event of `landed`."""
        self._reads: dict[int, Event] = {}
        """By slot: marks computation with it, and with slots that were computed with at once."""
        self.last_read: list[Event] = []
        """Per slot: marks the last computation with it, and sometimes later work of the compute stream."""
        self._early: dict[tuple[int, bool], tuple[StoredLayer, Early]] = {}
        """By slot, and whether an expert is read in parts: the slot's last layer and the result of `early`. Working it
        out takes longer than to queue the copies."""
        self._forget_slots()
        self._pieces = deque(backend.event(blocking=True) for _ in range(PIECES_IN_FLIGHT))
        self._pieces_lock = threading.Lock()

    def layer(self, fetch: Fetch) -> StoredLayer:
        """The layer as the fetch's expert stands in the fetch's slot."""
        layers = self._layers if fetch.slot < self.arena.num_on_device else self._in_ram
        return layers[fetch.key.layer].of(fetch.key.expert)

    def release(self) -> None:
        """Hold no reference to the memory of slots."""
        self._early.clear()

    def _forget_slots(self) -> None:
        """Begin anew with the arena's slots; the first copies wait for what has used or moved their memory so far."""
        self.release()
        self._landed, self._reads, used = {}, {}, self.backend.event()
        used.record(self.backend.compute)
        self.last_read = [used] * len(self.arena)

    def settle(self) -> None:
        """Block until every copy that was queued is done, and every computation with a slot."""
        self.drain()
        for event in (*self._landed.values(), *dict.fromkeys(self.last_read)):
            event.synchronize()

    def prepare(self, slots: NewSlots) -> Callable[[], None]:
        """Allocate what other slots need; returns a function that changes to them. As `SlotArena.prepare`."""
        change = self.arena.prepare(slots.on_device, slots.kept.on_device, in_ram=slots.in_ram)

        def commit() -> None:
            change()
            self._forget_slots()

        return commit

    def _views(self, fetch: Fetch) -> dict[str, torch.Tensor]:
        """The fetch's slot as the parameters of its expert."""
        return self.arena.views(fetch.slot, self.layer(fetch).layout)

    def early(self, fetch: Fetch) -> Early:
        """How the expert gets into its slot part by part."""
        layer, in_parts = self.layer(fetch), self.store.parts(fetch.key) > 1
        known = self._early.get((fetch.slot, in_parts))
        if known is not None and known[0] is layer:
            return known[1]
        early = layer.assembly.early(self.store.record(fetch.key).segments, self._views(fetch), in_parts)
        self._early[fetch.slot, in_parts] = layer, early
        return early

    def runs(self, fetch: Fetch) -> Sequence[torch.Tensor | None]:
        """Per segment of the expert, the bytes of the slot that it fills unchanged; None for other segments."""
        return self.early(fetch).runs

    def slot_as_stored(self, fetch: Fetch) -> memoryview | None:
        """The memory of the fetch's slot, if the expert can be read there itself: it stands in the slot as on the disk.

        None for slots that the host cannot write, for slots in RAM, and for a read-ahead, which has none.
        """
        if not self.backend.unified_memory or not 0 <= fetch.slot < self.arena.num_on_device:
            return None
        slot, layout = self.arena.bytes(fetch.slot), self.layer(fetch).layout
        places = tuple((param.offset, param.nbytes) for param in layout.params)
        if slot.data_ptr() % ALIGNMENT or not self.store.stands_as(fetch.key, places):
            return None
        if self.store.read_bytes(fetch.key) > slot.numel() or None in self.runs(fetch):
            return None
        return memoryview(slot.numpy())  # type: ignore[arg-type]

    def arriving(self, ticket: Ticket) -> Arriving | None:
        """The expert of a ticket as something to compute with while it arrives.

        Returns None if its parts do not land one by one: because it is read in one part, because a segment of it has to
        be there as a whole, or because a copy on this device has not landed when it returns.
        """
        key = ticket.fetch.key
        num_parts = self.store.parts(key)
        if num_parts == 1 or not self.backend.unified_memory:
            return None
        views, (runs, units, is_all) = self._views(ticket.fetch), self.early(ticket.fetch)
        if not is_all:
            return None
        params = [to.param for to in self.layer(ticket.fetch).assembly.destinations]
        places: dict[str, list[tuple[int, int, int]]] = {name: [] for name in views}
        for part in range(num_parts):
            for segment, start, end in self.store.arrived(key, part):
                run, of_segment = runs[segment], units[segment]
                if run is not None:
                    offset = run.data_ptr() - views[params[segment]].data_ptr()
                    places[params[segment]].append((offset + start, offset + end, part))
                elif of_segment is not None:
                    for name in of_segment.params:  # wherever the units are put in it
                        places[name].append((0, views[name].nbytes, part))
        return Arriving(ticket.arrival, places)

    def write_part(self, fetch: Fetch, part: int, buffer: torch.Tensor, arrival: Arrival) -> None:
        """Put one part of an expert into its slot, but for segments that have neither a run nor units.

        Args:
            fetch: The expert and its slot.
            part: The part, as `ExpertStore.arrived` numbers them.
            buffer: uint8 [bytes], into which the expert is being read.
            arrival: Of the expert; knows `early`, and which units other parts have begun.
        """
        assert arrival.early is not None
        (runs, units, _), copy = arrival.early, self.backend.copies.copy
        data = self.store.segments(fetch.key, buffer)
        for segment, start, end in self.store.arrived(fetch.key, part):
            run, of_segment = runs[segment], units[segment]
            if run is not None:
                copy(run[start:end], data[segment][start:end])
            elif of_segment is not None:
                first, last = arrival.whole_units(segment, start, end, of_segment.nbytes)
                if first < last:
                    of_segment.put(first, data[segment][first:last], copy)

    def write_rest(self, ticket: Ticket, buffer: torch.Tensor, copied: Event) -> None:
        """Copy an expert into its slot, but for the segments that `write_part` has copied.

        Args:
            ticket: Its slot must be free.
            buffer: uint8 [bytes], into which the whole expert has been read.
            copied: Is made to mark the end of the copies.
        """
        self.write(ticket, self.store.segments(ticket.fetch.key, buffer), copied)

    def write(self, ticket: Ticket, data: Sequence[torch.Tensor], copied: Event) -> None:
        """As `write_rest`. data: uint8 [nbytes] per segment of the expert, in the order of its record."""
        fetch, early = ticket.fetch, ticket.arrival.early
        segments = self.store.record(fetch.key).segments
        assembly, views = self.layer(fetch).assembly, self._views(fetch)
        if fetch.slot >= self.arena.num_on_device:  # a slot in RAM, which the host alone reads, after `issued`
            assembly.place(segments, data, views, copy_in_ram)
            return
        if early is None or not early.is_all:
            present = () if early is None else [i for i, run in enumerate(early.runs) if run is not None]
            copy = functools.partial(self._copy, ticket)
            assembly.place(segments, data, views, copy, present, self.runs(fetch))
        self.copied(fetch.slot, copied)

    def copied(self, slot: int, copied: Event) -> None:
        """Mark the end of the copies into a device slot. copied: is made to mark it too."""
        copies = self.backend.copies
        self.landed(slot).record(copies)
        copied.record(copies)

    def landed(self, slot: int) -> Event:
        """Marks the last copy into a slot. Made when it is first needed, as most slots of a large model need none."""
        event = self._landed.get(slot)
        if event is None:  # a thread that copies into the slot is over before another one does, or waits for it
            event = self._landed[slot] = self.backend.event()
        return event

    def computed(self, slots: Sequence[int]) -> None:
        """Mark the work of the compute stream so far as the last computation with these slots.

        One event serves all of them: a layer of 8 experts would else record 8. Whoever waits for a slot whose event has
        been recorded again meanwhile waits longer than it has to, but not for anything that is queued behind it.
        """
        event = self._reads.get(slots[0])
        if event is None:
            event = self._reads[slots[0]] = self.backend.event()
        event.record(self.backend.compute)
        for slot in slots:
            self.last_read[slot] = event

    def drain(self) -> None:
        """Block until every copy that was queued is done, also those of reads that failed, which no event marks."""
        event = self.backend.event(blocking=True)
        event.record(self.backend.copies)
        event.synchronize()

    def _copy(self, ticket: Ticket, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy into device memory: whole for a demand, in pieces for a speculative ticket."""
        copies = self.backend.copies
        if ticket.priority == DEMAND or not destination.ndim:
            copies.copy(destination, source)
            return
        rows = max(1, PIECE_BYTES * len(destination) // max(1, destination.nbytes))
        for into, data in zip(destination.split(rows), source.split(rows), strict=True):
            with self._pieces_lock:
                event = self._pieces.popleft()
                if ticket.priority != DEMAND:  # it may have become one meanwhile
                    event.synchronize()
                copies.copy(into, data)
                event.record(copies)
                self._pieces.append(event)
