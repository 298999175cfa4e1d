"""A memory cgroup made for a process that is measured.

A cgroup counts page cache too, so a process in one cannot borrow memory that its figures do not show. Elsewhere than on
Linux `MemoryCap.create` refuses. Must never leave a cgroup behind.
"""

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from offmoe.device.cgroup import OF_PROCESS, ROOT, V2, Version, cgroups_around, read_number
from offmoe.errors import CapacityError

PROCESSES = "/proc"
OURS = re.compile(r"offmoe-(\d+)-.+")
"""Names of cgroups made here: whose they are, and what for."""
REMOVAL_S = 2.0
"""Seconds in which a cgroup whose processes have ended is let go; a large one needs some hundredths."""


class MemoryCap:
    """A cgroup of our own with a limit, for processes that are added. `close` needs them to have ended."""

    def __init__(self, folder: Path, version: Version):
        self._folder, self._version = folder, version

    @classmethod
    def create(cls, nbytes: int, name: str, root: str = ROOT, of_process: str = OF_PROCESS) -> MemoryCap:
        """A cgroup for `name` below that of this process, or below the nearest around it that takes one.

        Removes those that processes which are no more have left there. CapacityError saying what to do where none can
        be made.
        """
        refused = "there are no memory cgroups here"
        for around, version in cgroups_around(root, of_process):
            _remove_abandoned(around)
            folder = around / f"offmoe-{os.getpid()}-{name}"
            try:
                folder.mkdir()
            except OSError as error:
                refused = f"{folder}: {error.strerror}"
                continue
            try:
                (folder / version.limit).write_text(str(nbytes))  # absent where v2 does not delegate memory
                return cls(folder, version)
            except OSError as error:
                refused = f"{folder / version.limit}: {error.strerror}"
                with suppress(OSError):
                    folder.rmdir()
        raise CapacityError(
            f"no memory cgroup can be made ({refused}). Run as root, or inside 'systemd-run --user --scope -p "
            f"MemoryMax={nbytes} -p Delegate=yes', or without a memory cap."
        )

    def add(self, pid: int) -> None:
        """Move a process in. What it has allocated before stays where it was counted."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    @property
    def peak_bytes(self) -> int | None:
        """The most that was in use, page cache included; None where the kernel does not say (v2 before 5.19)."""
        return read_number(self._folder / self._version.peak)

    @property
    def kills(self) -> int:
        """Processes that the kernel ended here for want of memory."""
        file = "memory.events" if self._version is V2 else "memory.oom_control"
        with suppress(OSError, ValueError):
            lines = dict(line.split() for line in (self._folder / file).read_text().splitlines())
            return int(lines.get("oom_kill", 0))
        return 0

    def close(self) -> None:
        """Remove the cgroup; nothing happens the second time. The kernel may take a moment to see that it is empty."""
        deadline = time.monotonic() + REMOVAL_S
        while True:
            try:
                return self._folder.rmdir()
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def __enter__(self) -> MemoryCap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def _remove_abandoned(around: Path) -> None:
    """Cgroups whose process is no more. One with processes in it cannot be removed."""
    for folder in around.glob("offmoe-*"):
        match = OURS.fullmatch(folder.name)
        if match and not Path(PROCESSES, match[1]).exists():
            with suppress(OSError):
                folder.rmdir()
