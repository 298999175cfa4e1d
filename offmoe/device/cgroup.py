"""Memory cgroups of Linux, v1 and v2: how much memory they still allow this process.

Nothing moves. Page cache counts as available. Elsewhere than on Linux there is no limit. Must never import torch.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 62
"""Bytes; v1 writes "no limit" as a number beyond it."""
ROOT = "/sys/fs/cgroup"
OF_PROCESS = "/proc/self/cgroup"


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
    return min([UNLIMITED, *(_left(folder, version) for folder, version in cgroups_around(root, of_process))])


def memory_limit(root: str = ROOT, of_process: str = OF_PROCESS) -> tuple[int, int] | None:
    """(bytes, version) of the tightest limit around this process; None without one."""
    limits = [(_limit(folder, version), version.number) for folder, version in cgroups_around(root, of_process)]
    tightest = min(limits, default=(UNLIMITED, 0))
    return None if tightest[0] >= UNLIMITED else tightest


def cgroups_around(root: str, of_process: str) -> list[tuple[Path, Version]]:
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


def _limit(folder: Path, version: Version) -> int:
    return min(UNLIMITED, read_number(folder / version.limit) or UNLIMITED)


def _left(folder: Path, version: Version) -> int:
    limit, used = _limit(folder, version), read_number(folder / version.used)
    if limit >= UNLIMITED or used is None:
        return UNLIMITED
    cache = 0
    with suppress(OSError, ValueError):
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache = int(stat.get(version.cache, 0))
    return max(0, limit - used + cache)


def read_number(file: Path) -> int | None:
    """Of a file with one number; None for "max" and where there is none."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
