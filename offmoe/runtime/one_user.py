"""A model serves one thread of one process at a time: its cache has one state."""

from __future__ import annotations

import os
import threading

from offmoe.errors import OffmoeError


class OneUser:
    """A context manager that one thread may enter, and enter again; it raises OffmoeError for every other one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()

    def __enter__(self) -> None:
        if os.getpid() != self._process:  # a fork has no reader threads: its first fetch would wait forever
            raise OffmoeError(
                f"the model was loaded by process {self._process} and cannot run in a fork of it. Load it in the "
                "process that uses it, or start that one with 'spawn'."
            )
        if not self._lock.acquire(blocking=False):
            raise OffmoeError(
                "the model is already generating in another thread. Wait for it, or load a second model: "
                "one cache serves one user."
            )

    def __exit__(self, *error: object) -> None:
        self._lock.release()
