"""Ctrl-C: one KeyboardInterrupt, and the process ends within two seconds whatever it is doing.

Python runs signal handlers only between its own instructions. During a long matrix product, during a read from a slow
disk, or in a library that swallows the exception, the user would have to wait. So a thread reads the signal from the
wakeup file that the C handler writes, and ends the process if the regular exit takes longer than GRACE_S. This is safe:
weights are read-only, and files get their names only when they are whole.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 130
"""Exit status after Ctrl-C, as in shells."""
GRACE_S = 1.2
"""Seconds for the regular exit: readers closed, recording written. The rest of the two seconds is slack for a busy
machine.
"""


class CtrlC:
    """Context that guards the main thread of a command. `pressed` becomes True with the first SIGINT.

    It does nothing in another thread, or if SIGINT is ignored or handled by the caller.

    Args:
        ends_process: Whether the process ends after the context.
    """

    def __init__(self, ends_process: bool):
        self.pressed = False
        self._ends_process = ends_process
        self._wakeup: int | None = None
        self._over = threading.Event()

    def __enter__(self) -> CtrlC:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            reading_end, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            self._watch = threading.Thread(
                target=self._end_in_time, args=(reading_end,), name="offmoe-ctrl-c", daemon=True
            )
            self._watch.start()
            self._unraisable = sys.unraisablehook
            self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def end(self) -> None:
        """End the process after Ctrl-C at once: Python's own shutdown takes a second with torch loaded, to no use."""
        if self.pressed and self._ends_process:
            os._exit(STATUS)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        if self._ends_process and _imports_torch(frame):
            os.write(2, b"offmoe: interrupted\n")
            os._exit(STATUS)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only disturb the exit
        sys.unraisablehook = lambda _: None  # no tracebacks from destructors that the interrupt hits
        raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        if self._wakeup is None or (self.pressed and self._ends_process):  # keep guarding until the process ends
            return
        # In a process that ends now, a late Ctrl-C would interrupt the shutdown with a traceback, so it kills instead.
        signal.signal(signal.SIGINT, signal.SIG_DFL if self._ends_process else signal.default_int_handler)
        signal.set_wakeup_fd(self._wakeup_before)
        sys.unraisablehook = self._unraisable
        self._over.set()
        os.close(self._wakeup)
        self._watch.join()

    def _end_in_time(self, reading_end: int) -> None:
        """Body of the thread: end the process GRACE_S after a SIGINT, unless the context ends first."""
        while signals := os.read(reading_end, 1):
            if signals[0] == signal.SIGINT and not self._over.wait(GRACE_S):
                os._exit(STATUS)
        os.close(reading_end)


@contextmanager
def interrupts(on_interrupt: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call a function, and end nothing, while the block runs. Nothing changes outside the main thread.

    Args:
        on_interrupt: Called in the main thread for every SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wakeup = signal.set_wakeup_fd(-1)  # the watching thread of CtrlC would end the process
    before = signal.signal(signal.SIGINT, lambda *_: on_interrupt())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)


def _imports_torch(frame: FrameType | None) -> bool:
    """Whether torch is being imported: C++ code of that import calls Python, and aborts on an exception."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "torch":
            return True
        frame = frame.f_back
    return False
