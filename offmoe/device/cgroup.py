"""Memory cgroups of Linux, v1 and v2: what they still allow this process, and one made for a process that is measured.

Nothing moves. A cgroup counts page cache too, so a process in one cannot borrow memory that its figures do not show.
Elsewhere than on Linux there is nothing to ask: no limit, and `MemoryCap.create` refuses. Must never import torch, and
never leave a cgroup behind.
"""

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from offmoe.errors import CapacityError

UNLIMITED = 1 << 62
"""Bytes; v1 writes "no limit" as a number beyond it."""
ROOT = "/sys/fs/cgroup"
OF_PROCESS = "/proc/self/cgroup"
PROCESSES = "/proc"
OURS = re.compile(r"offmoe-(\d+)-.+")
"""Names of cgroups made here: whose they are, and what for."""
REMOVAL_S = 2.0
"""Seconds in which a cgroup whose processes have ended is let go; a large one needs some hundredths."""


@dataclass(frozen=True)
class Version:
    """What one version calls its files. cache: the line of memory.stat with page cache that the kernel gives back."""

    number: int
    limit: str
    used: str
    peak: str
    cache: str


V1 = Version(1, "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.max_usage_in_bytes", "total_inactive_file")
V2 = Version(2, "memory.max", "memory.current", "memory.peak", "inactive_file")


def memory_left(root: str = ROOT, of_process: str = OF_PROCESS) -> int:
    """Bytes that the memory cgroups around this process still allow; UNLIMITED without a limit.

    Page cache counts as available: the kernel gives it back before it refuses memory.
    """
    return min([UNLIMITED, *(_left(folder, version) for folder, version in _around(root, of_process))])


def memory_limit(root: str = ROOT, of_process: str = OF_PROCESS) -> tuple[int, int] | None:
    """(bytes, version) of the tightest limit around this process; None without one."""
    limits = [(_limit(folder, version), version.number) for folder, version in _around(root, of_process)]
    tightest = min(limits, default=(UNLIMITED, 0))
    return None if tightest[0] >= UNLIMITED else tightest


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
        for around, version in _around(root, of_process):
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
        return _number(self._folder / self._version.peak)

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


def _around(root: str, of_process: str) -> list[tuple[Path, Version]]:
    """Folders of the memory cgroups around this process, innermost first. A container may show its own as the root."""
    found: dict[Path, Version] = {}
    paths = []
    with suppress(OSError, ValueError), open(of_process) as lines:  # absent where there are no cgroups
        for line in lines:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                paths.append((V2 if controllers == "" else V1, path))
    for version, path in [*paths, (V2, "/"), (V1, "/")]:
        base = Path(root, "memory") if version is V1 else Path(root)
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            folder = base.joinpath(*parts[:depth])
            if folder not in found and (folder / "cgroup.procs").exists():
                found[folder] = version
    return list(found.items())


def _remove_abandoned(around: Path) -> None:
    """Cgroups whose process is no more. One with processes in it cannot be removed."""
    for folder in around.glob("offmoe-*"):
        match = OURS.fullmatch(folder.name)
        if match and not Path(PROCESSES, match[1]).exists():
            with suppress(OSError):
                folder.rmdir()


def _limit(folder: Path, version: Version) -> int:
    return min(UNLIMITED, _number(folder / version.limit) or UNLIMITED)


def _left(folder: Path, version: Version) -> int:
    limit, used = _limit(folder, version), _number(folder / version.used)
    if limit >= UNLIMITED or used is None:
        return UNLIMITED
    cache = 0
    with suppress(OSError, ValueError):
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache = int(stat.get(version.cache, 0))
    return max(0, limit - used + cache)


def _number(file: Path) -> int | None:
    """Of a file with one number; None for "max" and where there is none."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
