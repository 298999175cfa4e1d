"""The open files of a store: the most recently read shards, however many a checkpoint has.

Moves: nothing.
Bound: a system call per file that is opened; 20 us on a local disk.
Must never: read from a file other than the one whose size the plan was checked against, or close a descriptor during a
read (it could be reopened as another file, whose bytes would be read as weights).

A checkpoint may have thousands of shards, and a process may open 256 files on some systems. So no more than `most_open`
shards stay open, with one descriptor each: the unbuffered one where the file system has it. A file that is opened again
must be the same one.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from offmoe.errors import CheckpointError, MissingTensorError, ShardChangedError, TransferError
from offmoe.storage.checkpoint import identity

CHECK_EVERY_S = 1.0
"""The least time between two checks of a shard's identity. Every system call may cost a switch of the interpreter lock,
up to 5 ms."""
MOST_OPEN = 64
"""Shards that stay open. Opening one takes a hundredth of the time of reading an expert from it."""
SHARE_OF_LIMIT = 4
"""Open shards take at most 1/SHARE_OF_LIMIT of the descriptors that a process may have."""
UNLIMITED = 1 << 30
"""The limit of a process that may open any number of files."""
TOO_MANY = (errno.EMFILE, errno.ENFILE)
"""The errors of a process, or of a system, that may open no more files."""
SAME_FILE, UNCHANGED = 2, 4
"""How many numbers of an identity tell that a file is the same one, and that it was not modified either."""
READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0)


def file_limit() -> tuple[int, int] | None:
    """How many files this process may open: (soft limit, hard limit). None: the system has no such limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, hard = (
        UNLIMITED if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return soft, hard


def most_open() -> int:
    """How many shards of one store stay open in this process."""
    limit = file_limit()
    return MOST_OPEN if limit is None else max(1, min(MOST_OPEN, limit[0] // SHARE_OF_LIMIT))


class Shard:
    """One shard: its path, and the identity that it had when the store was made."""

    def __init__(self, path: Path, direct: bool, now: float) -> None:
        """
        Raises:
            MissingTensorError: the file does not exist.
            CheckpointError: it cannot be reached.
        """
        self.path = path
        self.direct = direct and hasattr(os, "O_DIRECT")
        """Whether the file is read unbuffered."""
        try:
            self.identity = identity(os.stat(path))
        except FileNotFoundError as error:
            raise MissingTensorError(f"{path}: the shard is missing; complete the download") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be reached ({error.strerror}); check file and disk") from error
        self.size = self.identity[2]
        self._checked = now

    def check_unchanged(self, now: float) -> None:
        """ShardChangedError if the path no longer names the file that it named, or if that was modified.

        Checks at most once in CHECK_EVERY_S. After a change it checks, and raises, at every call.
        """
        if now - self._checked < CHECK_EVERY_S:
            return
        try:
            unchanged = identity(os.stat(self.path)) == self.identity
            what = "was replaced or rewritten"
        except OSError as error:
            unchanged = False
            what = f"can no longer be reached ({error.strerror})"
        if not unchanged:
            raise ShardChangedError(f"{self.path}: {what} while in use; load the model again")
        self._checked = now


OpenFile = Callable[[Shard, int, int], int]
"""open_file(shard, flags, fields) -> a descriptor of the file whose identity has these first `fields` numbers."""


class OpenShard:
    """The descriptors of one shard: one, or two after an unbuffered read was not enough."""

    def __init__(self, shard: Shard, open_file: OpenFile) -> None:
        self.shard = shard
        self.users = 1
        """Reads under way; `OpenShards` counts them."""
        self.refused: OSError | None = None
        """Why the file could not be opened unbuffered."""
        self._open_file = open_file
        self._buffered: int | None = None
        self._direct: int | None = None
        self._lock = threading.Lock()
        if shard.direct:
            try:
                self._direct = open_file(shard, READ_ONLY | os.O_DIRECT, UNCHANGED)
            except OSError as error:
                shard.direct = False
                self.refused = error
        if self._direct is None:
            self._buffered = open_file(shard, READ_ONLY, UNCHANGED)

    @property
    def direct(self) -> int | None:
        """The unbuffered descriptor; None: the file system has none for this shard."""
        return self._direct if self.shard.direct else None

    @property
    def buffered(self) -> int:
        """The buffered descriptor, which can read from any byte; opened when it is first needed."""
        with self._lock:
            if self._buffered is None:
                # Only the same file is asked for: if it was truncated, the read says where it ends now.
                self._buffered = self._open_file(self.shard, READ_ONLY, SAME_FILE)
            return self._buffered

    def close(self) -> None:
        for descriptor in (self._direct, self._buffered):
            if descriptor is not None:
                os.close(descriptor)
        self._direct = self._buffered = None


class OpenShards:
    """The shards of one store. Any number of threads may read from any of them."""

    def __init__(
        self,
        paths: Sequence[Path],
        used: Collection[int],
        *,
        direct: bool,
        clock: Callable[[], float] = time.monotonic,
        limit: int | None = None,
    ) -> None:
        """Look at every file, and open those that will be read, as many as may stay open.

        Args:
            paths: the shards.
            used: indices of those that will be read.
            direct: read unbuffered where file system and platform can.
            clock: gives the time in seconds.
            limit: shards that stay open; None: `most_open`.

        Raises:
            MissingTensorError: a shard does not exist.
            CheckpointError: a shard cannot be opened.
        """
        self._limit = most_open() if limit is None else limit
        self._lock = threading.Lock()
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        """Least recently read first."""
        self._shards = [Shard(Path(path), direct, clock()) for path in paths]
        try:
            for number in sorted(used)[: self._limit]:
                with self.reading(number):
                    pass
        except TransferError as error:
            self.close()
            raise CheckpointError(str(error)) from error
        except BaseException:
            self.close()
            raise

    def __getitem__(self, number: int) -> Shard:
        return self._shards[number]

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def refused(self) -> tuple[Shard, OSError] | None:
        """An open shard that could not be opened unbuffered, and why; None: there is none."""
        return next(((file.shard, file.refused) for file in self._open.values() if file.refused is not None), None)

    @contextmanager
    def reading(self, number: int) -> Iterator[OpenShard]:
        """A shard's descriptors, which stay open within the block.

        Raises:
            ShardChangedError: the file is not the one that it was.
            TransferError: it cannot be opened.
        """
        file = self._acquire(number)
        try:
            yield file
        finally:
            with self._lock:
                file.users -= 1
                self._close_idle(self._limit)

    def close(self) -> None:
        """Close all files; no read may be under way. Idempotent."""
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def _acquire(self, number: int) -> OpenShard:
        with self._lock:
            file = self._open.get(number)
            if file is not None:
                file.users += 1
                self._open.move_to_end(number)
                return file
        opened = OpenShard(self._shards[number], self._open_file)  # unlocked: on a network disk it takes milliseconds
        with self._lock:
            file = self._open.setdefault(number, opened)
            if file is not opened:  # another thread was faster
                file.users += 1
                opened.close()
            return file

    def _open_file(self, shard: Shard, flags: int, fields: int) -> int:
        """A descriptor of the shard, as `OpenFile`.

        Raises:
            OSError: the file system has no unbuffered reads.
            ShardChangedError, TransferError: as `reading`.
        """
        try:
            try:
                descriptor = os.open(shard.path, flags)
            except OSError as error:
                if error.errno not in TOO_MANY:
                    raise
                with self._lock:
                    self._close_idle(0)
                descriptor = os.open(shard.path, flags)
        except FileNotFoundError as error:
            raise ShardChangedError(
                f"{shard.path}: can no longer be reached ({error.strerror}) while in use; load the model again"
            ) from error
        except OSError as error:
            if error.errno in TOO_MANY:
                raise TransferError(
                    f"{shard.path}: this process may open no more files ({error.strerror}); allow it more: ulimit -n "
                    "4096"
                ) from error
            if flags != READ_ONLY:
                raise
            raise TransferError(f"{shard.path}: cannot be opened ({error.strerror}); check file and disk") from error
        if identity(os.fstat(descriptor))[:fields] != shard.identity[:fields]:
            os.close(descriptor)
            raise ShardChangedError(f"{shard.path}: was replaced or rewritten while in use; load the model again")
        return descriptor

    def _close_idle(self, most: int) -> None:
        """Close the least recently read files until `most` are open, but none during a read; needs the lock."""
        if len(self._open) <= most:
            return
        for number in [number for number, file in self._open.items() if not file.users]:
            if len(self._open) <= most:
                return
            self._open.pop(number).close()
