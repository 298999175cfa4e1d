"""Threads that take turns with one model.

One thread computes at a time. After a slice of forward passes it passes its turn on, if others wait. Random numbers
are each thread's own: a thread finds torch's generators as it left them, so its samples do not depend on the others. A
thread without the turn keeps no helpers of OpenMP.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType

import torch

from offmoe.device.backend import Backend
from offmoe.device.openmp import release_threads

SLICE = 8
"""Forward passes of a turn while others wait. A shorter slice mixes the experts of more answers in the cache: with
single passes, 530 misses took the place of 450 on the demo."""


class Turns:
    """A lock that is handed on in the order of asking.

    Args:
        backend: The device whose random generators belong to a turn.
    """

    def __init__(self, backend: Backend):
        self._backend = backend
        self._changed = threading.Condition()
        self._waiting: deque[int] = deque()
        self._holder: int | None = None
        self._passes = 0
        self._random: dict[int, list[torch.Tensor]] = {}

    def is_mine(self) -> bool:
        """Whether the calling thread has the turn."""
        return self._holder == threading.get_ident()

    def __enter__(self) -> None:
        """Wait for the turn. It begins with random generators seeded by chance."""
        self._wait()
        torch.seed()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._random.pop(threading.get_ident(), None)
        self._release()

    def pass_on(self) -> None:
        """Count a forward pass; let the others compute if the slice is used up and somebody waits."""
        assert self.is_mine()
        self._passes += 1
        if self._passes < SLICE or not self._waiting:
            return
        me = threading.get_ident()
        self._random[me] = self._backend.random_state()
        self._release()
        self._wait()
        self._backend.set_random_state(self._random.pop(me))

    def _wait(self) -> None:
        me = threading.get_ident()
        with self._changed:
            self._waiting.append(me)
            self._changed.wait_for(lambda: self._holder is None and self._waiting[0] == me)
            self._waiting.popleft()
            self._holder, self._passes = me, 0

    def _release(self) -> None:
        release_threads()
        with self._changed:
            self._holder = None
            self._changed.notify_all()
