"""Which plain copies bring an expert from a RAM slot into a device slot.

Moves: nothing. Segments that are neighbors in both places are one copy: a copy takes the host 5 to 10 us, however few
bytes it has.
Bound: a look-up per expert; the first copies of an expert or of a slot are worked out in some microseconds.
Must never: join bytes that are apart in one of the two places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from offmoe.transfer.slot_writer import SlotWriter, StoredLayer
from offmoe.types import ExpertKey, Fetch


class Segment(NamedTuple):
    """One segment of an expert: its first byte in the slot, its first byte in the RAM slot, and its bytes."""

    offset: int
    place: int
    nbytes: int


class PlainCopies(NamedTuple):
    """The least copies of one expert.

    into: (first byte, bytes) in the slot of each. Equal ones are one object.
    out_of: first byte in the RAM slot of each.
    """

    into: tuple[tuple[int, int], ...]
    out_of: tuple[int, ...]


class CopyTable:
    """The plain copies of one model's experts; for one thread at a time."""

    def __init__(self, writer: SlotWriter) -> None:
        """writer: knows slots and layers."""
        self._writer = writer
        self._offsets: dict[int, tuple[StoredLayer, Sequence[int | None]]] = {}
        """By id of a layer, per segment its first byte in a slot; None where its bytes do not stay together."""
        self._copies: dict[ExpertKey, PlainCopies] = {}
        self._into: dict[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]] = {}
        """Every `PlainCopies.into`, so that equal ones are one object."""
        self._targets: dict[int, tuple[object, list[torch.Tensor]]] = {}
        """Per slot: `into` of its last expert, and these bytes."""
        self._sources: dict[int, tuple[ExpertKey, list[torch.Tensor]]] = {}
        """Per RAM slot: its last expert, and the bytes that are copied."""

    def segments(self, fetch: Fetch) -> list[Segment] | None:
        """The segments of the fetch's expert, in the order of its record; None unless each is one plain copy."""
        writer, layer = self._writer, self._writer.layer(fetch)
        known = self._offsets.get(id(layer))
        if known is None or known[0] is not layer:
            start = writer.arena.bytes(fetch.slot).data_ptr()
            offsets = [None if run is None else run.data_ptr() - start for run in writer.runs(fetch)]
            known = self._offsets[id(layer)] = layer, offsets
        segments = []
        for offset, (place, nbytes) in zip(known[1], writer.store.places(fetch.key), strict=True):
            if offset is None:
                return None
            segments.append(Segment(offset, place, nbytes))
        return segments

    def pairs(self, fetch: Fetch, memory: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]] | None:
        """(destination, source) of each copy: uint8 [bytes]; None if plain copies do not do.

        Args:
            fetch: its RAM slot holds the expert.
            memory: the RAM slot, uint8 [bytes].
        """
        key, slot, host = fetch.key, fetch.slot, fetch.host
        assert host is not None
        into, out_of = self._copies.get(key) or self._joined(fetch)
        if not into:
            return None
        targets = self._targets.get(slot)
        if targets is None or targets[0] is not into:
            whole = self._writer.arena.bytes(slot)
            targets = self._targets[slot] = into, [whole[start : start + nbytes] for start, nbytes in into]
        sources = self._sources.get(host)
        if sources is None or sources[0] != key:
            runs = zip(out_of, into, strict=True)
            sources = self._sources[host] = key, [memory[start : start + nbytes] for start, (_, nbytes) in runs]
        return zip(targets[1], sources[1], strict=True)

    def forget_memory(self) -> None:
        """Hold no reference to slots and RAM slots: their memory may be given back."""
        self._targets.clear()
        self._sources.clear()

    def _joined(self, fetch: Fetch) -> PlainCopies:
        """The least copies of the fetch's expert; none if plain copies do not do."""
        joined: list[Segment] = []
        for segment in sorted(self.segments(fetch) or ()):
            last = joined[-1] if joined else None
            if last is not None and (last.offset + last.nbytes, last.place + last.nbytes) == segment[:2]:
                joined[-1] = last._replace(nbytes=last.nbytes + segment.nbytes)
            elif segment.nbytes:
                joined.append(segment)
        into = tuple([(segment.offset, segment.nbytes) for segment in joined])
        copies = PlainCopies(self._into.setdefault(into, into), tuple([segment.place for segment in joined]))
        self._copies[fetch.key] = copies
        return copies
