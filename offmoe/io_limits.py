"""How experts are read: number of readers, bytes per system call, and the cost of a read that is stopped.

The runtime reads by these numbers, the simulator prices with them, and prefetching weighs them.
"""

from __future__ import annotations

READERS = 4
"""Reader threads. Four reach the disk's limit for experts of 5 MB and of 50 MB alike (docs/measurements.md)."""
WHOLE_BYTES = 8 * 1024 * 1024
"""Largest expert that one reader reads in one system call. One reader alone does not keep the disk busy (1.4 GB/s; four
reach 2.1 GB/s), so several share a larger expert."""
LEAST_PART_BYTES, MOST_PART_BYTES, PARTS = 2 * 1024 * 1024, 8 * 1024 * 1024, 32
"""A larger expert is read in PARTS parts of LEAST_PART_BYTES to MOST_PART_BYTES. What has arrived is copied, and may be
computed with, while the rest is read; the parts in the hands of the four readers arrive last, together. For an expert
of 69 MB, parts of 8 MB left 6 ms of copying and computing behind the last read, 4 MB 3.5 ms, 2 MB 2.2 ms. Each part
costs its reader 0.1 ms besides reading, so the largest experts have larger parts."""
AHEAD_BYTES = 1024 * 1024
"""Bytes per system call of a speculative read. Small, so that a canceled prefetch stops quickly."""
FILL_BYTES = 4 * 1024 * 1024
"""Bytes per system call of the background fill while the model is idle. Four readers then have 16 MB under way, which
the first demand waits for at most."""
STOP_BYTES = READERS // 2 * AHEAD_BYTES
"""Bytes that are still read after a speculative read is canceled: at most half of the readers are speculating."""


def part_bytes(nbytes: int) -> int:
    """Most bytes of an expert of `nbytes` that a reader reads in one system call."""
    return nbytes if nbytes <= WHOLE_BYTES else max(LEAST_PART_BYTES, min(nbytes // PARTS, MOST_PART_BYTES))


def last_share(nbytes: int) -> float:
    """Share of an expert that is still in the readers' hands, and so to be copied, when its last byte is read."""
    return min(1.0, READERS * part_bytes(nbytes) / nbytes)


def stop_share(nbytes: int) -> float:
    """Share of a full read that a canceled speculative read costs."""
    return min(1.0, STOP_BYTES / nbytes)
