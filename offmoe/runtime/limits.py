"""How much host memory this process may still take: the machine's limit and those of the cgroups around it.

Nothing moves. psutil knows the machine, but no cgroup; these are read from the kernel's files, v2 and v1. Where there
are no such files, or not the ones that are expected, there is no such limit. Must never say more than either allows:
the kernel ends whoever goes past its cgroup."""

from __future__ import annotations

from contextlib import suppress

import psutil

UNLIMITED = 1 << 62


def available_memory() -> int:
    """Bytes of host memory: what psutil calls available, or what the memory cgroup leaves if that is less."""
    return min(int(psutil.virtual_memory().available), cgroup_available())


def cgroup_available(root: str = "/sys/fs/cgroup", of_process: str = "/proc/self/cgroup") -> int:
    """Bytes that the memory cgroups around this process (v2, then v1) still allow; very many without a limit.

    Page cache counts as available: the kernel gives it back before it refuses memory.
    """
    least = UNLIMITED
    for controller, path in _cgroups(of_process):
        if controller == "":
            folder, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        else:
            folder, limit, used, cache = (
                f"{root}/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            here = "/".join([folder, *parts[:depth]])
            least = min(least, _left(here, limit, used, cache))
    return least


def _cgroups(of_process: str) -> list[tuple[str, str]]:
    """(controller, path) of the process's memory cgroups; controller "" is v2. A container may show its as the root."""
    found = [("", "/"), ("memory", "/")]
    with suppress(OSError, ValueError), open(of_process) as lines:  # absent where there are no cgroups
        for line in lines:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                found.append(("" if controllers == "" else "memory", path))
    return found


def _left(folder: str, limit: str, used: str, cache: str) -> int:
    try:
        with open(f"{folder}/{limit}") as file:
            text = file.read().strip()
        if text == "max":
            return UNLIMITED
        with open(f"{folder}/{used}") as file:
            taken = int(file.read())
        with open(f"{folder}/memory.stat") as file:
            stat = dict(line.split() for line in file)
        return max(0, int(text) - taken + int(stat.get(cache, 0)))
    except (OSError, ValueError):
        return UNLIMITED
