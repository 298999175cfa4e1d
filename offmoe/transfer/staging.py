"""How many readers and host buffers experts pass through, told from the size of one.

Nothing moves here. Bound: memory that is pinned or, on a CPU, is not there for slots. Must never give less than a
buffer for each expert that is read at once."""

from __future__ import annotations

import logging
from typing import NamedTuple

from offmoe.device.arena import HostBuffers
from offmoe.device.backend import Backend
from offmoe.io_limits import READERS

logger = logging.getLogger(__name__)

FEW_BYTES = 64 << 20
MOST_AHEAD = 8


class StagingPlan(NamedTuple):
    """Experts that are read at once, staging buffers, and how many of these what is read ahead may hold."""

    at_once: int
    buffers: int
    ahead: int


def staging_plan(buffer_bytes: int) -> StagingPlan:
    """For experts of this size.

    Above 64 MB two at once, each by several readers and in a buffer of its own, which keeps the buffers of 352 MB
    experts at 0.7 GB: while one is read the other is copied. Smaller ones have a buffer more, so that none waits for
    its own copy, and as many as fit in 64 MB may be read ahead.
    """
    if buffer_bytes > FEW_BYTES:
        return StagingPlan(READERS // 2, READERS // 2, 1)
    ahead = min(MOST_AHEAD, max(2, FEW_BYTES // max(1, buffer_bytes)))
    return StagingPlan(READERS, READERS - 1 + ahead, ahead)


def host_buffers(count: int, nbytes: int, backend: Backend) -> HostBuffers:
    """Slots in RAM, pinned as far as the system lets; a warning where it does not."""
    slots = HostBuffers(count, nbytes, register=backend.pin, unregister=backend.unpin)
    pinned = sum(slots.pinned(i) for i in range(count))
    if pinned < count:
        logger.warning(
            "only %d of %d expert slots in RAM could be pinned for %s: what is in the others is copied once more on "
            "its way there, and more slowly. A lower host_memory, or a higher limit of the system, avoids it.",
            pinned,
            count,
            backend.device,
        )
    return slots
