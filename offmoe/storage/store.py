"""Experts at rest: the checkpoint's own safetensors shards, read one expert at a time into the caller's buffer.

Moves: the bytes of one expert from the disk to a host buffer, and up to 8 KiB around each run, because unbuffered reads
(O_DIRECT) take whole pages of 4096 bytes.
Bound: the disk.
Must never: map a file (a shard truncated under a mapping kills the process), allocate memory per read, or return bytes
of a shard that was replaced after it was opened.

Reads are few and large. Buffered and mapped reads reach a third of the same disk's unbuffered speed (page faults and
copies of the page cache take 0.3 CPU-seconds per GB instead of 0.01). Many small reads lose to the interpreter lock
what they gain in parallelism. Tensors of one expert that stand close together are therefore read at once, gaps
included; in shards written by safetensors that is one read per expert.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Protocol

import torch

from offmoe.errors import CheckpointError, ShardChangedError, TransferError
from offmoe.storage.layout import ExpertRecord
from offmoe.storage.open_shards import OpenShard, OpenShards, Shard
from offmoe.storage.read_plan import ALIGNMENT, ReadPlan, Window, plan_reads
from offmoe.types import ExpertKey

logger = logging.getLogger(__name__)

DIRECT_REFUSED = (errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP)
"""What an unbuffered read fails with where the file system has none."""

ReadAt = Callable[[int, memoryview, int], int]
"""read_at(descriptor, buffer, offset) -> bytes read, at most len(buffer), in one system call. 0: the end of the file.
"""


class Stop(Protocol):
    """Tells whether a read is no longer wanted, as a threading.Event does."""

    def is_set(self) -> bool: ...


class ExpertStore:
    """Reads experts from shards. Any number of threads may read at a time, each into its own buffer."""

    buffer_bytes: int
    """The size of a buffer that holds any expert. It must be aligned to ALIGNMENT."""

    def __init__(
        self,
        shards: Sequence[Path],
        records: Mapping[ExpertKey, ExpertRecord],
        *,
        direct: bool = True,
        read_at: ReadAt | None = None,
        clock: Callable[[], float] = time.monotonic,
        most_open: int | None = None,
    ) -> None:
        """Look at the shards and plan every read.

        Args:
            shards: the files that `Segment.shard` is an index into.
            records: the segments of each expert.
            direct: read unbuffered where file system and platform can.
            read_at: reads bytes; the platform's positional read by default. Tests replace it.
            clock: gives the time in seconds. Tests replace it.
            most_open: shards that stay open; None: as many as this process may well keep open, 64 at most.

        Raises:
            MissingTensorError: a shard does not exist.
            CheckpointError: a shard cannot be opened, or is shorter than the records say.
        """
        self._records = dict(records)
        self._plans = {key: plan_reads(record) for key, record in self._records.items()}
        self.buffer_bytes = max((plan.nbytes for plan in self._plans.values()), default=0)
        self._read_at = read_at or positional_read()
        self._clock = clock
        self._state = threading.Condition()
        self._readers = 0
        self._closed = False
        self._warned = False
        used = {number for plan in self._plans.values() for number in plan.shards}
        self._shards = OpenShards(shards, used, direct=direct, clock=clock, limit=most_open)
        try:
            self._check_bounds()
        except BaseException:
            self.close()
            raise
        refused = self._shards.refused
        if refused is not None:
            self._warn(*refused)

    def record(self, key: ExpertKey) -> ExpertRecord:
        """The segments of one expert."""
        return self._records[key]

    def read_into(self, key: ExpertKey, buffer: memoryview, stop: Stop | None = None) -> None:
        """Read one expert. Blocks without the interpreter lock; `segments` then gives its tensors.

        Args:
            key: the expert.
            buffer: writable bytes, aligned to ALIGNMENT; `buffer_bytes` are always enough. Undefined after an error.
            stop: checked before every system call.

        Raises:
            ShardChangedError: a shard was replaced, rewritten, truncated or removed since it was opened.
            TransferError: the disk failed, or the store is closed.
            concurrent.futures.CancelledError: `stop` was set.
        """
        for part in range(self.parts(key)):
            self.read_part(key, part, buffer, stop)

    def parts(self, key: ExpertKey) -> int:
        """The number of parts that this expert is read in."""
        return len(self._plans[key].parts)

    def read_part(
        self, key: ExpertKey, part: int, buffer: memoryview, stop: Stop | None = None, step: int | None = None
    ) -> None:
        """Read one part of an expert to its place in the buffer. Any thread may read any part at any time.

        Args:
            key: the expert.
            part: 0 .. parts(key) - 1.
            buffer: as in `read_into`; all parts of an expert share one.
            stop: checked before every system call.
            step: the most bytes per system call, a multiple of ALIGNMENT. None: no limit.

        Raises:
            as `read_into`.
        """
        self.read_planned(self._plans[key], part, buffer, stop, step)

    def plan_of(self, keys: Sequence[ExpertKey]) -> ReadPlan:
        """How these experts are read into one buffer. Neighbors on the disk are read at once.

        The places of the plan are those of the segments of all experts, in the order of `keys`.
        """
        if len(keys) == 1:
            return self._plans[keys[0]]
        return plan_reads(ExpertRecord(tuple(s for key in keys for s in self._records[key].segments)))

    def position(self, key: ExpertKey) -> tuple[int, int]:
        """Where an expert begins: (shard, byte)."""
        return min((segment.shard, segment.offset) for segment in self._records[key].segments)

    def read_planned(
        self, plan: ReadPlan, part: int, buffer: memoryview, stop: Stop | None = None, step: int | None = None
    ) -> None:
        """As `read_part`, for a plan that `plan_of` gave."""
        assert len(buffer) >= plan.nbytes
        assert not buffer.readonly
        assert torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % ALIGNMENT == 0
        with self._state:
            if self._closed:
                raise TransferError("the expert store is closed; load the model again")
            self._readers += 1
        try:
            for window in plan.parts[part]:
                with self._shards.reading(window.shard) as file:
                    if file.refused is not None:
                        self._warn(file.shard, file.refused)
                    self._read_window(file, window, buffer, stop, step)
            # Checked after the read: a shard that is unchanged now did not change during the read either.
            for number in plan.shards:
                self._shards[number].check_unchanged(self._clock())
        finally:
            with self._state:
                self._readers -= 1
                self._state.notify_all()

    def segments(self, key: ExpertKey, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The segments of one expert in a buffer that `read_into` filled; no bytes move.

        Args:
            key: the expert.
            buffer: uint8 [bytes].

        Returns:
            uint8 [nbytes] per segment, in the order of the record.
        """
        return self._plans[key].segments(buffer)

    def places(self, key: ExpertKey) -> Sequence[tuple[int, int]]:
        """Where the segments of one expert stand in a buffer that `read_into` filled: (first byte, nbytes) each."""
        return self._plans[key].places

    def stands_as(self, key: ExpertKey, places: Sequence[tuple[int, int]]) -> bool:
        """Whether the segments of one expert stand in a buffer at these places (first byte, nbytes), in their order."""
        return self._plans[key].places == places

    def read_bytes(self, key: ExpertKey) -> int:
        """Bytes that are read of one expert: those of its segments, and what stands between and around them."""
        return self._plans[key].nbytes

    def arrived(self, key: ExpertKey, part: int) -> list[tuple[int, int, int]]:
        """The pieces of segments that one part holds.

        Returns:
            (index of the segment in the record, first byte within the segment, end) for each segment it touches.
        """
        plan = self._plans[key]
        first, last = plan.parts[part][0], plan.parts[part][-1]
        begin, end = first.at, last.at + last.nbytes
        pieces = []
        for index, (start, nbytes) in enumerate(plan.places):
            low, high = max(begin, start), min(end, start + nbytes)
            if low < high:
                pieces.append((index, low - start, high - start))
        return pieces

    def close(self) -> None:
        """Close the files once reads under way have stopped, at the end of their current system call. Idempotent."""
        with self._state:
            self._closed = True
            self._state.wait_for(lambda: self._readers == 0)
            self._shards.close()

    def _check_bounds(self) -> None:
        """CheckpointError if a segment ends behind its shard's end."""
        for record in self._records.values():
            for segment in record.segments:
                shard = self._shards[segment.shard]
                if segment.offset + segment.nbytes > shard.size:
                    raise CheckpointError(
                        f"{shard.path}: has {shard.size} bytes, tensor {segment.name!r} needs it to have "
                        f"{segment.offset + segment.nbytes}; the file is truncated: download it again"
                    )

    def _read_window(
        self, file: OpenShard, window: Window, buffer: memoryview, stop: Stop | None, step: int | None
    ) -> None:
        """Read one window. Retries a failed read once, and reads on buffered where unbuffered reads are refused."""
        shard = file.shard
        wanted = min(window.nbytes, shard.size - window.offset)  # the last page of a file is not a whole one
        done = 0
        retried = False
        while done < wanted:
            if stop is not None and stop.is_set():
                raise CancelledError
            if self._closed:
                raise TransferError("the expert store was closed while it was being read")
            # After a short read the rest may start anywhere, and only a buffered descriptor can read from there.
            direct = file.direct if done % ALIGNMENT == 0 else None
            end = wanted if direct is None else window.nbytes
            end = end if step is None else min(end, done + step)
            into = buffer[window.at + done : window.at + end]
            try:
                read = self._read_at(file.buffered if direct is None else direct, into, window.offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                if direct is not None and error.errno in DIRECT_REFUSED:
                    # Reads on buffered from now on. The descriptor stays open: other threads may be reading from it.
                    shard.direct = False
                    self._warn(shard, error)
                elif error.errno == errno.EIO and not retried:
                    retried = True
                else:
                    raise TransferError(
                        f"{shard.path} @ byte {window.offset + done}: reading failed ({error.strerror}); "
                        "check the disk and the system log"
                    ) from error
                continue
            if read == 0:
                raise ShardChangedError(
                    f"{shard.path}: ends at byte {window.offset + done} although it had {shard.size} bytes when it was "
                    "opened; it was truncated while in use: restore the file and load the model again"
                )
            done += read

    def _warn(self, shard: Shard, error: OSError) -> None:
        """Log once per store that reads are buffered: the other shards stand in the same file system."""
        with self._state:
            first, self._warned = not self._warned, True
        if first:
            logger.warning(
                "%s: unbuffered reads are refused here (%s); reading through the page cache, which is slower. "
                "A local ext4, xfs or btrfs disk avoids it.",
                shard.path,
                error.strerror,
            )


def positional_read() -> ReadAt:
    """The platform's read at an offset, which several threads may call on one descriptor.

    `preadv` reads into the caller's buffer. Elsewhere (Windows, older systems) a lock guards seek and read.
    """
    if hasattr(os, "preadv"):
        return lambda descriptor, buffer, offset: os.preadv(descriptor, [buffer], offset)
    lock = threading.Lock()

    def seek_and_read(descriptor: int, buffer: memoryview, offset: int) -> int:
        with lock, open(descriptor, "rb", buffering=0, closefd=False) as file:
            file.seek(offset)
            return file.readinto(buffer) or 0

    return seek_and_read
