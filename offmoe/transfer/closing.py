"""The end of a runtime, whichever thread it comes in.

Moves: nothing.
Bound: the threads that the callbacks join.
Must never: join the thread that it runs in. A model that is collected as garbage may be closed inside one of its own
threads.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack

from offmoe.device.pinning import PinningThread
from offmoe.transfer.reader import Reader


def close_all(process: int, closing: ExitStack) -> None:
    """Run the callbacks, but not in a fork of the process, which would overwrite the recording with half of it.

    Args:
        process: Id of the process that owns the runtime.
        closing: The callbacks.
    """
    if os.getpid() != process:
        return
    if isinstance(threading.current_thread(), Reader | PinningThread):
        threading.Thread(target=close_all, args=(process, closing), name="offmoe-closing").start()
        return
    closing.close()
