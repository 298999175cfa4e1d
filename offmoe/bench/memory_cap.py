"""A memory cgroup for a process that is measured.

A cgroup counts page cache too, so a process cannot use memory that its figures do not show. `MemoryCap.create` raises
on systems other than Linux. No cgroup is left behind.
"""

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from offmoe.device.cgroup import OF_PROCESS, ROOT, V2, Version, cgroups_around, read_number
from offmoe.errors import CapacityError

PROCESSES = "/proc"
OURS = re.compile(r"offmoe-(\d+)-.+")
"""Names of our cgroups: the process that created it, and the name of what is measured."""
REMOVAL_S = 2.0
"""Seconds to wait until the kernel releases a cgroup whose processes have ended; a large one takes hundredths."""


class MemoryCap:
    """A cgroup with a memory limit. Processes are added to it, and must have ended before `close`."""

    def __init__(self, folder: Path, version: Version):
        self._folder, self._version = folder, version

    @classmethod
    def create(cls, nbytes: int, name: str, root: str = ROOT, of_process: str = OF_PROCESS) -> MemoryCap:
        """Create a cgroup below the one of this process, or below the nearest ancestor that allows it.

        Cgroups of ours whose process has ended are removed first.

        Args:
            nbytes: the memory limit.
            name: ends the name of the cgroup.
            root, of_process: where the kernel shows cgroups; for tests.

        Raises:
            CapacityError: no cgroup can be created; the message says what to do.
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
        """Move a process into the cgroup. Memory that it allocated before stays counted where it was."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory in bytes, page cache included; None if the kernel does not tell (cgroup v2 before Linux 5.19)."""
        return read_number(self._folder / self._version.peak)

    @property
    def kills(self) -> int:
        """Number of processes that the kernel killed in this cgroup because memory ran out."""
        file = "memory.events" if self._version is V2 else "memory.oom_control"
        with suppress(OSError, ValueError):
            lines = dict(line.split() for line in (self._folder / file).read_text().splitlines())
            return int(lines.get("oom_kill", 0))
        return 0

    def close(self) -> None:
        """Remove the cgroup. Idempotent. The kernel may need a moment to notice that it is empty."""
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


def _remove_abandoned(around: Path) -> None:
    """Remove our cgroups whose process has ended. The kernel refuses to remove one that holds processes."""
    for folder in around.glob("offmoe-*"):
        match = OURS.fullmatch(folder.name)
        if match and not Path(PROCESSES, match[1]).exists():
            with suppress(OSError):
                folder.rmdir()
