"""The ring in RAM through which the device tells the host what was routed, and what it made of it.

Moves: an entry of some tens of bytes per MoE layer and step, written by `assign` of triton/routed.py.
Bound: a read of RAM.
Must never: hand out an entry before all of it was written. The device publishes whole entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch

from offmoe.errors import OffmoeError


class Verdict(IntEnum):
    """What `assign` made of an access. Unless it is ASSIGNED, slots are as before and the host has to place."""

    ASSIGNED = 0
    TOO_FEW_VICTIMS = 1
    NOT_IN_RAM = 2
    GIVEN_UP = 3
    """Never in an entry: the host was not there for too long."""


VERDICTS = tuple(Verdict)


class Entry(NamedTuple):
    """An access as the device logged it. ids: of all pairs, as routed; -1 for one that is no expert's."""

    layer: int
    verdict: Verdict
    misses: int
    ids: list[int]


class RoutingLog:
    """The ring through which the device tells the host what was routed. One per model.

    Entries and progress stand in RAM that the device maps. One thread reads at a time.
    """

    def __init__(self, ring: torch.Tensor, progress: torch.Tensor) -> None:
        """ring: int32 [entries, 3 + pairs] of zeros. progress: int32 [2] of zeros."""
        assert ring.dtype == progress.dtype == torch.int32
        self.ring, self.progress = ring, progress
        self._entries = ring.numpy().data.cast("B").cast("i")
        self._progress = progress.numpy().data
        self._num, self._width = ring.shape

    def read(self, pairs: Sequence[int] | None = None) -> Iterator[Entry]:
        """The entries that were written since, oldest first; each makes room for another one when it is taken.

        Args:
            pairs: by layer, the ids of an entry; None: all of it.

        Raises:
            OffmoeError: an entry cannot be one: the memory was overwritten.
        """
        progress, entries, width = self._progress, self._entries, self._width
        while progress[0] != progress[1]:
            start = progress[1] % self._num * width
            layer, verdict, misses, *ids = entries[start : start + width]
            if pairs is not None and 0 <= layer < len(pairs):
                del ids[pairs[layer] :]
            if verdict not in (0, 1, 2) or not 0 <= misses <= len(ids) or (pairs is not None and layer >= len(pairs)):
                raise OffmoeError(
                    f"the device's log is damaged: layer {layer}, verdict {verdict}, {misses} misses of {len(ids)} ids."
                )
            progress[1] += 1
            yield Entry(layer, VERDICTS[verdict], misses, ids)

    def reset(self) -> None:
        """Forget everything; the device is not to write meanwhile."""
        self._progress[0] = self._progress[1] = 0
