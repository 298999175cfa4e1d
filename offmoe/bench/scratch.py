"""Folders that a benchmark fills and removes again, even after runs that could not clean up.

The process that creates a folder locks it for as long as it lives. Processes in other containers see the lock too. A
folder without a lock is abandoned, and the next run removes it. On systems without such locks (Windows) a run removes
its own folder only. A run never removes a folder that it could not lock.
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
"""Exit status after SIGTERM: 128 + 15, as in shells."""


@contextmanager
def scratch_folder(prefix: str, parent: str | Path | None = None) -> Iterator[Path]:
    """Create a folder below `parent` and remove it at the end. Abandoned folders with this prefix are removed first.

    prefix: begins the folder's name. parent: None is the system's folder for temporary files.
    """
    parent = Path(parent or tempfile.gettempdir())
    for folder in parent.glob(f"{prefix}*"):
        _remove_abandoned(folder)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as folder_name,
        ExitStack() as stack,
    ):
        if fcntl is not None:
            new = Path(folder_name, f"{LOCK}-new")
            _lock(stack.enter_context(open(new, "w")))
            new.replace(new.with_name(LOCK))  # so the lock file is never seen unlocked
        yield Path(folder_name)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that context managers run.

    This changes nothing outside the main thread, or if SIGTERM is ignored or handled already.
    """
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
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would disturb the cleanup
    raise SystemExit(TERMINATED)


def _remove_abandoned(folder: Path) -> None:
    with suppress(OSError), open(folder / LOCK, "r+") as file:
        if _lock(file):
            shutil.rmtree(folder, ignore_errors=True)


def _lock(file: IO[str]) -> bool:
    """Whether this process holds the lock now. The lock ends when the file is closed."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process holds it, or the file system has no locks
        return False
    return True
