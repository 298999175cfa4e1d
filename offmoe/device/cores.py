"""The cores that this process may use, and how its threads share them.

Everything that starts threads which compute asks here, so that one place knows what else wants the cores:

* torch has as many threads as `torch.get_num_threads`, which it takes from the process's affinity.
* The C kernels have as many as torch, but at most one per core: two threads of a core do not read memory faster. They
  and torch compute in turn. Kernels that wait for work sleep after 30 us.
* Readers (io_limits.READERS) wait for the disk nearly all the time. While they copy or reorder what they have read they
  take a core from the kernels; the pool gives their tasks to whichever thread has a core.

Moves: nothing.
Bound: a few small files of the kernel per call.
Must never: import torch.
"""

from __future__ import annotations

import os
from contextlib import suppress
from math import ceil
from pathlib import Path

import psutil

CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Logical processors that this process may run on: its affinity, which a cpuset narrows; at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores(cpus: Path = CPUS, cgroups: Path = CGROUPS) -> int:
    """Cores that this process may use, without hyper-threads, and no more than its CPU quota is worth; at least 1.

    Args:
        cpus: the system's folder of processors; each has its core in topology/thread_siblings_list.
        cgroups: the folder of the cgroup around this process, as containers show it.
    """
    cores = _allowed_cores(cpus) or min(psutil.cpu_count(logical=False) or 1, usable_cpus())
    quota = _quota(cgroups)
    return max(1, cores if quota is None else min(cores, ceil(quota)))


def _allowed_cores(cpus: Path) -> int:
    """Cores of the processors that this process may run on; 0 if the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return 0
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        try:
            siblings.add((cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            return 0
    return len(siblings)


def _quota(cgroups: Path) -> float | None:
    """Processors' worth of time that the cgroup allows, by version 2 or 1; None without a limit."""
    with suppress(OSError, ValueError):
        quota, period = (cgroups / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((cgroups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if int(quota) <= 0 else int(quota) / int(period)
    return None
