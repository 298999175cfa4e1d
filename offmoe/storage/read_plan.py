"""Which reads bring one expert from its shards into a buffer.

Moves: nothing.
Bound: some microseconds per expert, once.
Must never: leave a byte of a segment out, or let two windows overlap in the buffer.

An unbuffered read takes whole pages of the file, so every run of bytes is widened to pages. Runs that stand close
together become one read, gaps included. A large expert is cut into parts of a few MB: several threads read them, and
the first can be used while the rest is being read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from offmoe.io_limits import part_bytes
from offmoe.storage.layout import ExpertRecord, aligned

ALIGNMENT = 4096
"""Bytes. The file offset, length and memory address of an unbuffered read are multiples of it. 512 is often enough,
4096 always."""

READ_THROUGH_BYTES = 64 * 1024
"""Bytes. A smaller gap between two segments is read, not skipped: a second request costs more than those bytes."""


class Window(NamedTuple):
    """One read: file bytes [offset, offset + nbytes) of a shard to buffer byte `at`. All are multiples of ALIGNMENT."""

    shard: int
    offset: int
    nbytes: int
    at: int


class ReadPlan(NamedTuple):
    """How one expert is read.

    Args:
        parts: the reads, in groups of at most `part_bytes` bytes that different threads may read. Computation begins
            with the record's first segments, so the parts that hold them come first.
        places: per segment of the record (first byte in the buffer, nbytes).
        shards: the shards that are read, ascending.
        nbytes: bytes of the buffer.
    """

    parts: tuple[tuple[Window, ...], ...]
    places: tuple[tuple[int, int], ...]
    shards: tuple[int, ...]
    nbytes: int

    def segments(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The segments in a buffer (uint8 [bytes]) that holds the reads: uint8 [nbytes] each; no bytes move."""
        return [buffer[start : start + nbytes] for start, nbytes in self.places]


def plan_reads(record: ExpertRecord) -> ReadPlan:
    """Merge neighboring segments, widen each run to pages, and lay the runs out in the buffer one after the other."""
    segments, places = record.segments, [(0, 0)] * len(record.segments)
    runs: list[list[int]] = []  # indices of segments that are read at once
    end = at = 0
    for i in sorted(range(len(segments)), key=lambda i: (segments[i].shard, segments[i].offset)):
        shard, offset, nbytes = segments[i].shard, segments[i].offset, segments[i].nbytes
        if not nbytes:
            continue
        if not runs or segments[runs[-1][0]].shard != shard or offset - end >= READ_THROUGH_BYTES:
            runs.append([])
            end = 0
        runs[-1].append(i)
        end = max(end, offset + nbytes)
    windows: list[Window] = []
    for run in runs:
        start = segments[run[0]].offset // ALIGNMENT * ALIGNMENT
        end = aligned(max(segments[i].offset + segments[i].nbytes for i in run), ALIGNMENT)
        windows.append(Window(segments[run[0]].shard, start, end - start, at))
        for i in run:
            places[i] = (at + segments[i].offset - start, segments[i].nbytes)
        at += end - start
    parts = sorted(_parts(windows, at), key=lambda part: _first_segment(part, places))
    return ReadPlan(tuple(parts), tuple(places), tuple(sorted({w.shard for w in windows})), at)


def _first_segment(part: Sequence[Window], places: Sequence[tuple[int, int]]) -> int:
    """The record's first segment that the part holds bytes of; one past the last if the part holds none."""
    begin, end = part[0].at, part[-1].at + part[-1].nbytes
    held = (i for i, (start, nbytes) in enumerate(places) if start < end and begin < start + nbytes)
    return min(held, default=len(places))


def _parts(windows: Sequence[Window], nbytes: int) -> list[tuple[Window, ...]]:
    """The windows, cut into groups as equal as whole pages allow, in the order of the buffer."""
    if not windows:
        return []
    count = -(-nbytes // part_bytes(nbytes))
    size = aligned(-(-nbytes // count), ALIGNMENT)
    parts: list[list[Window]] = []
    room = 0
    for window in windows:
        done = 0
        while done < window.nbytes:
            if not room:
                parts.append([])
                room = size
            n = min(room, window.nbytes - done)
            parts[-1].append(Window(window.shard, window.offset + done, n, window.at + done))
            done += n
            room -= n
    return list(map(tuple, parts))
