"""The threads of OpenMP, with which torch computes on a CPU.

Every thread that computes gets helpers of its own. If all helpers together are more than the processors, GNU's OpenMP
lets them sleep between two products instead of waiting actively: on two cores a small product took 74 us instead of 23
in a second thread, once the first had computed. So a thread that will not compute for a while gives its helpers up.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

MAPS = Path("/proc/self/maps")
LIBRARIES = ("libgomp", "libomp", "libiomp5")
SOFT = 1
"""omp_pause_soft of OpenMP 5.0: what the program has set, such as the number of threads, stays."""


@cache
def _pause() -> Callable[[int], int] | None:
    """omp_pause_resource_all of the library that torch has loaded; None if there is none that has it."""
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:  # not Linux
        return None
    paths = {path for path in (line.split()[-1] for line in lines) if Path(path).name.startswith(LIBRARIES)}
    for path in sorted(paths):
        try:
            found: Callable[[int], int] = ctypes.CDLL(path).omp_pause_resource_all
        except (OSError, AttributeError):  # deleted, or older than OpenMP 5.0
            continue
        return found
    return None


def release_threads() -> None:
    """End the helpers of the calling thread. Its next product starts new ones, in some 0.1 ms."""
    pause = _pause()
    if pause is not None:
        pause(SOFT)
