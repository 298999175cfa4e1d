"""How experts are read: how many threads, in parts of which size, and what a read costs that is stopped.

The runtime reads by these numbers, the simulator prices by them and decisions weigh by them.
"""

from __future__ import annotations

READERS = 4
"""Threads; they reach the disk's limit for 5 MB and 50 MB experts alike (io.md section 1)."""
WHOLE_BYTES = 8 * 1024 * 1024
"""An expert up to this is read by one reader in one system call. One reader alone does not keep the disk busy (1.4
GB/s, four 2.1 on the disk of docs/measurements.md), so several share a larger one.
"""
LEAST_PART_BYTES, MOST_PART_BYTES, PARTS = 2 * 1024 * 1024, 8 * 1024 * 1024, 32
"""What has arrived is copied, and may be computed with, while the rest is read; the parts that four readers have in
hand arrive last, all at once. Of 69 MB, parts of 8 MB left 6 ms of copying and computing behind the last read, 4 MB
3.5, 2 MB 2.2. A part takes its reader some 0.1 ms beside reading, so those of the largest experts are larger.
"""
AHEAD_BYTES = 1024 * 1024
"""Of what is read while nobody waits for it, in one system call: it may turn out to be for nothing in between."""
STOP_BYTES = READERS // 2 * AHEAD_BYTES
"""What is still read of an expert when that turns out to be for nothing: half of the readers read one ahead at most."""


def part_bytes(nbytes: int) -> int:
    """Of an expert, what a reader brings in one system call, at most."""
    return nbytes if nbytes <= WHOLE_BYTES else max(LEAST_PART_BYTES, min(nbytes // PARTS, MOST_PART_BYTES))


def last_share(nbytes: int) -> float:
    """Of an expert, what all readers have in hand, and what is still to be copied when the last of it was read."""
    return min(1.0, READERS * part_bytes(nbytes) / nbytes)


def stop_share(nbytes: int) -> float:
    """Of an expert, what a read costs that turns out to be for nothing."""
    return min(1.0, STOP_BYTES / nbytes)
