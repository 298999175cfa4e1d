"""Which host buffers are pinned, and a thread that pins more of them while the model is in use.

Moves: nothing.
Bound: registering memory touches every page of it: about 1 s for some GiB. A registration cannot be interrupted, so
whoever stops the thread waits for one buffer at most.
Must never: unpin memory that is being pinned, or that a copy still uses.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from typing import NamedTuple

from offmoe.device.backend import Backend

logger = logging.getLogger(__name__)


OnRefusal = Callable[[int, int], None]
"""Called with (buffers that are pinned, buffers that were to be), by the thread that pins, when the system refuses."""


class PinProgress(NamedTuple):
    """How many buffers are pinned.

    pinned: buffers from which copies are asynchronous by now.
    total: buffers that are to be pinned.
    refused: whether the system pins no more of them.
    """

    pinned: int = 0
    total: int = 0
    refused: bool = False

    @property
    def running(self) -> bool:
        """Whether more will be pinned."""
        return self.pinned < self.total and not self.refused

    def describe(self) -> str:
        """The progress in a few words; "" if everything is pinned."""
        if self.pinned == self.total:
            return ""
        return f"{self.pinned} of {self.total} slots in RAM pinned{', no more can be' if self.refused else ' so far'}"


class PinningThread(threading.Thread):
    """The thread that pins buffers. As with readers, `offmoe.handle` recognizes it by this class."""


class Pins:
    """The pinned ones among buffers of one size. After a refusal no further buffer is tried.

    A refusal is a limit of the machine, and each attempt costs time.
    """

    def __init__(self, backend: Backend, nbytes: int, on_refusal: OnRefusal) -> None:
        """nbytes: bytes of each buffer."""
        self.refused = False
        """Whether the system has refused to pin a buffer."""
        self._backend, self._nbytes, self._on_refusal = backend, nbytes, on_refusal
        self._pinned: dict[int, None] = {}
        """Addresses of the pinned buffers."""
        self._waiting: dict[int, None] = {}
        """Addresses that the thread has to pin, in order."""
        self._first: list[int] = []
        """Those of them that go before the others, the last one first."""
        self._under_way: int | None = None
        self._stopping = False
        self._thread: PinningThread | None = None
        self._changed = threading.Condition()

    def __contains__(self, address: int) -> bool:
        return address in self._pinned

    def add(self, addresses: Collection[int]) -> None:
        """Pin buffers now, up to the first refusal. If an error ends it, none of them is pinned."""
        done: list[int] = []
        try:
            for address in addresses:
                if self.refused or not self._backend.pin(address, self._nbytes):
                    break
                done.append(address)
        except BaseException:
            for address in done:
                self._backend.unpin(address)
            raise
        self._pinned.update(dict.fromkeys(done))
        if len(done) < len(addresses) and not self.refused:
            self._refuse(len(addresses) - len(done))

    def add_later(self, addresses: Collection[int]) -> None:
        """Let the thread pin buffers, behind those that it has to pin already."""
        with self._changed:
            if self.refused or not addresses:
                return
            self._waiting.update(dict.fromkeys(addresses))
            if self._thread is None:
                thread = PinningThread(target=self._run, name="offmoe-pinning", daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify_all()

    def hurry(self, address: int) -> None:
        """Pin a buffer before others, if it waits: copies out of it will be asked for."""
        if address in self._waiting:
            with self._changed:
                self._first.append(address)

    def remove(self, addresses: Collection[int]) -> None:
        """Unpin buffers, and pin none of them any more. Waits for one that is being pinned."""
        with self._changed:
            for address in addresses:
                self._waiting.pop(address, None)
            self._changed.wait_for(lambda: self._under_way not in addresses)
            pinned = [address for address in addresses if address in self._pinned]
        for address in pinned:
            del self._pinned[address]
            self._backend.unpin(address)

    def close(self) -> None:
        """End the thread and unpin everything; idempotent."""
        with self._changed:
            self._stopping = True
            self._waiting.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
        self.remove(list(self._pinned))

    def _run(self) -> None:
        self._backend.enter_thread()
        while (address := self._take()) is not None:
            done = False
            try:
                done = self._backend.pin(address, self._nbytes)
            except Exception as error:  # memory that is not pinned is right, and only slower
                logger.warning("pinning memory for %s failed: %s", self._backend.device, error)
            with self._changed:
                self._under_way = None
                if done:
                    self._pinned[address] = None
                self._changed.notify_all()
            if not done:
                self._refuse(1 + len(self._waiting))

    def _take(self) -> int | None:
        """The next buffer to pin; None when the thread has to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping or self.refused)
            if self._stopping or self.refused:
                return None
            while self._first:
                address = self._first.pop()
                if address in self._waiting:
                    break
            else:
                address = next(iter(self._waiting))
            del self._waiting[address]
            self._under_way = address
            return address

    def _refuse(self, num_left: int) -> None:
        with self._changed:
            self.refused = True
            self._waiting.clear()
            if self._stopping:
                return
        self._on_refusal(len(self._pinned), len(self._pinned) + num_left)
