"""Memory cgroups of Linux, v1 and v2: how much memory they still allow this process.

Moves: nothing.
Bound: a few small files of the kernel per call. On other systems there is no limit.
Must never: import torch.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 62
"""Bytes that stand for "no limit". Version 1 writes it as a number above this one."""
ROOT = "/sys/fs/cgroup"
"""The folder under which all cgroups are."""
OF_PROCESS = "/proc/self/cgroup"
"""The file that names the cgroups of this process."""


@dataclass(frozen=True)
class Version:
    """The names of the files of one version of cgroups."""

    number: int
    limit: str
    used: str
    peak: str
    cache: str
    """The line of memory.stat that counts page cache which the kernel frees on demand."""


V1 = Version(1, "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.max_usage_in_bytes", "total_inactive_file")
V2 = Version(2, "memory.max", "memory.current", "memory.peak", "inactive_file")


def cgroup_free_bytes(root: str = ROOT, of_process: str = OF_PROCESS) -> int:
    """Bytes that the memory cgroups around this process still allow; UNLIMITED without a limit.

    Page cache counts as available, because the kernel frees it before it refuses memory.
    """
    return min([UNLIMITED, *(_available(folder, version) for folder, version in cgroups_around(root, of_process))])


def memory_limit(root: str = ROOT, of_process: str = OF_PROCESS) -> tuple[int, int] | None:
    """The tightest limit around this process as (bytes, version of cgroups); None without a limit."""
    limits = [(_limit(folder, version), version.number) for folder, version in cgroups_around(root, of_process)]
    tightest = min(limits, default=(UNLIMITED, 0))
    return None if tightest[0] >= UNLIMITED else tightest


def cgroups_around(root: str, of_process: str) -> list[tuple[Path, Version]]:
    """Folders of the memory cgroups around this process, innermost first.

    The roots are always among them, because a container may show its own cgroup as the root.
    """
    folders: dict[Path, Version] = {}
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
            if folder not in folders and (folder / "cgroup.procs").exists():
                folders[folder] = version
    return list(folders.items())


def _limit(folder: Path, version: Version) -> int:
    return min(UNLIMITED, read_number(folder / version.limit) or UNLIMITED)


def _available(folder: Path, version: Version) -> int:
    limit, used = _limit(folder, version), read_number(folder / version.used)
    if limit >= UNLIMITED or used is None:
        return UNLIMITED
    cache = 0
    with suppress(OSError, ValueError):
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache = int(stat.get(version.cache, 0))
    return max(0, limit - used + cache)


def read_number(file: Path) -> int | None:
    """The number in a file that holds one; None if it holds "max" or does not exist."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
