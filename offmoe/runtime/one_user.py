"""One thread uses a model at a time, unless it is lent to threads that take turns."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from offmoe.errors import OffmoeError


class OneUser:
    """A context manager that one thread may enter, and enter again; it raises OffmoeError for every other one.

    A model serves one thread of one process at a time, because its cache has one state.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._lent_to: Callable[[], bool] | None = None

    def __enter__(self) -> None:
        if os.getpid() != self._process:  # a fork has no reader threads: its first fetch would wait forever
            raise OffmoeError(
                f"the model was loaded by process {self._process} and cannot run in a fork of it. Load it in the "
                "process that uses it, or start that one with 'spawn'."
            )
        lent_to = self._lent_to
        if lent_to is not None and lent_to():
            return
        if lent_to is not None or not self._lock.acquire(blocking=False):
            raise OffmoeError(
                "the model is already generating in another thread. Wait for it, or load a second model: "
                "one cache serves one user."
            )

    def __exit__(self, *error: object) -> None:
        if self._lent_to is None:
            self._lock.release()

    @contextmanager
    def lend(self, holds: Callable[[], bool]) -> Iterator[None]:
        """Give the model to threads that take turns among themselves, until the block ends.

        Args:
            holds: Whether the calling thread has the turn. At most one thread may have it.

        Raises:
            OffmoeError: The model is in use.
        """
        with self:
            pass
        self._lent_to = holds
        try:
            yield
        finally:
            self._lent_to = None
