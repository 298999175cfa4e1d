"""Ctrl-C: one KeyboardInterrupt, and the end of the process in under two seconds whatever it is doing.

Python runs signal handlers between its own instructions only. A long matrix product, a read from a slow disk or a
library that swallows the exception would make the user wait; so a thread hears of the signal too (by the wakeup file
that the C handler writes) and ends the process when the orderly way takes too long. Weights are read-only and traces
are renamed into place: nothing is left half-written under its final name.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

STATUS = 130
"""Exit status after Ctrl-C, as shells have it."""
GRACE_S = 1.2
"""Time for the orderly way: readers closed, recording written. The rest of the promised two is for a busy machine."""


class CtrlC:
    """Context that guards the main thread of a command. `pressed` becomes true with the first SIGINT.

    ends_process: only the end of the process follows the context. Does nothing in another thread, or where SIGINT is
    ignored or handled by the caller.
    """

    def __init__(self, ends_process: bool):
        self.pressed = False
        self._ends_process = ends_process
        self._wakeup: int | None = None
        self._over = threading.Event()

    def __enter__(self) -> CtrlC:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            heard, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            self._watch = threading.Thread(target=self._end_in_time, args=(heard,), name="offmoe-ctrl-c", daemon=True)
            self._watch.start()
            self._unraisable = sys.unraisablehook
            self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def end(self) -> None:
        """End the process after Ctrl-C: the shutdown of Python with torch loaded takes a second and closes nothing."""
        if self.pressed and self._ends_process:
            os._exit(STATUS)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressing again would only disturb the way out
        sys.unraisablehook = lambda _: None  # destructors and callbacks that this hits print no traceback
        raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._wakeup is None or (self.pressed and self._ends_process):  # what is left must be in time too
            return
        # In a process that ends now, a late Ctrl-C has nothing to interrupt but the shutdown, with a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL if self._ends_process else signal.default_int_handler)
        signal.set_wakeup_fd(self._wakeup_before)
        sys.unraisablehook = self._unraisable
        self._over.set()
        os.close(self._wakeup)
        self._watch.join()

    def _end_in_time(self, heard: int) -> None:
        """Thread: end the process GRACE_S after a SIGINT, unless the context is left before."""
        while signals := os.read(heard, 1):
            if signals[0] == signal.SIGINT and not self._over.wait(GRACE_S):
                os._exit(STATUS)
        os.close(heard)
