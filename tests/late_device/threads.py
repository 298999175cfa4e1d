"""Tells the late device what orders the threads of the host, so that an order by luck is a race.

What a thread has done before it releases a lock is before what the next one does that acquires it; the same holds for
the start and the end of a thread (Lamport, "Time, Clocks, and the Ordering of Events in a Distributed System", 1978).
The package has no part in this: its locks are Python's, and here these are watched. Memory that threads hand over by
the interpreter's lock alone, such as a list that one appends to, orders nothing.
"""

from __future__ import annotations

import _thread
import itertools
import threading
from typing import Any

import pytest

from tests.late_device import extension

_numbers = itertools.count(1)


def _number(thing: Any) -> int:
    """A number of an object's own. Not its id, which another object may have later."""
    found: int | None = vars(thing).get("_late_number")
    if found is None:
        found = vars(thing).setdefault("_late_number", next(_numbers))
    return found


class Lock:
    """As threading.Lock."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self.locked = self._lock.locked

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        is_mine = self._lock.acquire(blocking, timeout)
        if is_mine:
            extension.acquired(_number(self))
        return is_mine

    def release(self) -> None:
        extension.releases(_number(self))
        self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _at_fork_reinit(self) -> None:
        self._lock = _thread.allocate_lock()


def watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch every lock of Python's that is made from now on, and every condition, event and thread."""
    condition, event, thread = threading.Condition, threading.Event, threading.Thread
    enter, leave, wait = condition.__enter__, condition.__exit__, condition.wait
    set_flag = event.set
    start, run, join, is_set = thread.start, thread._bootstrap_inner, thread.join, event.is_set  # type: ignore[attr-defined]

    def entered(self: Any) -> Any:
        result = enter(self)
        extension.acquired(_number(self))
        return result

    def left(self: Any, *error: Any) -> None:
        extension.releases(_number(self))
        leave(self, *error)

    def waited(self: Any, timeout: float | None = None) -> bool:
        extension.releases(_number(self))
        try:
            return wait(self, timeout)
        finally:
            extension.acquired(_number(self))

    def sets(self: Any) -> None:
        extension.releases(_number(self._cond))  # before the flag, which is read without the lock
        set_flag(self)

    def was_set(self: Any) -> bool:
        result = is_set(self)
        if result:
            extension.acquired(_number(self._cond))
        return result

    def started(self: Any) -> None:
        extension.releases(_number(self))
        start(self)

    def ran(self: Any) -> None:
        extension.acquired(_number(self))
        try:
            run(self)
        finally:
            extension.releases(_number(self))

    def joined(self: Any, timeout: float | None = None) -> None:
        join(self, timeout)
        if not self.is_alive():
            extension.acquired(_number(self))

    monkeypatch.setattr(threading, "Lock", Lock)
    for owner, name, watched in (
        (condition, "__enter__", entered),
        (condition, "__exit__", left),
        (condition, "wait", waited),
        (event, "set", sets),
        (event, "is_set", was_set),
        (thread, "start", started),
        (thread, "_bootstrap_inner", ran),
        (thread, "join", joined),
    ):
        monkeypatch.setattr(owner, name, watched)
