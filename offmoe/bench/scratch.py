"""Folders that a benchmark fills and removes again, also after runs that could not.

What moves: nothing. A folder is locked by the process that made it for as long as that lives, in whichever container;
one that nobody locks belongs to nobody, and the next run removes it. Where there are no such locks (Windows) only a
run's own folder is removed. Must never remove a folder that it has not locked itself.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".offmoe-lock"
TERMINATED = 143
"""Exit status after SIGTERM, as shells have it."""


@contextmanager
def scratch_folder(prefix: str, parent: str | Path | None = None) -> Iterator[Path]:
    """A new folder below `parent` (None: where temporary files go), removed at the end; first those that earlier
    runs with this prefix left there.
    """
    parent = Path(parent or tempfile.gettempdir())
    for folder in parent.glob(f"{prefix}*"):
        _remove_abandoned(folder)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as made,
        ExitStack() as stack,
    ):
        if fcntl is not None:
            new = Path(made, f"{LOCK}-new")
            _lock(stack.enter_context(open(new, "w")))
            new.replace(new.with_name(LOCK))  # nobody finds it unlocked
        yield Path(made)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM as an exception (SystemExit), so that what is open is closed. Where it is not ignored or handled already,
    and in the main thread; elsewhere nothing changes."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would only disturb the way out
    raise SystemExit(TERMINATED)


def _remove_abandoned(folder: Path) -> None:
    with suppress(OSError), open(folder / LOCK, "r+") as file:
        if _lock(file):
            shutil.rmtree(folder, ignore_errors=True)


def _lock(file: IO[str]) -> bool:
    """Whether the lock is ours now; it ends with the file."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody has it, or this file system knows no locks
        return False
    return True
