"""Buffers pinned in the background: in which order, what ends it, and that none is unpinned while it is pinned."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from offmoe.device.host_buffers import HostBuffers
from offmoe.device.pinning import PinProgress
from offmoe.transfer.closing import close_all
from tests.doubles import wait_until

PAGE = 4096


class Driver:
    """Pins a buffer each time that the test lets it; refuses after `most`."""

    device = "double"

    def __init__(self) -> None:
        self.lets = threading.Semaphore(0)
        self.begun: list[int] = []
        self.pinned: list[int] = []
        self.unpinned: list[int] = []
        self.most = 1000
        self.error: Exception | None = None

    def enter_thread(self) -> None:
        pass

    def pin(self, address: int, nbytes: int) -> bool:
        self.begun.append(address)
        assert self.lets.acquire(timeout=60)
        if self.error is not None:
            raise self.error
        if len(self.pinned) >= self.most:
            return False
        self.pinned.append(address)
        return True

    def unpin(self, address: int) -> None:
        assert address in self.pinned
        self.unpinned.append(address)


@pytest.fixture
def driver() -> Iterator[Any]:
    driver = Driver()
    yield driver
    assert driver.unpinned == driver.pinned, "everything is unpinned, once"
    assert not any(thread.name == "offmoe-pinning" for thread in threading.enumerate())


@pytest.fixture
def refusals() -> list[tuple[int, int]]:
    return []


@pytest.fixture
def buffers(driver: Any, refusals: list[tuple[int, int]]) -> Iterator[HostBuffers]:
    buffers = HostBuffers(4, PAGE, pinning=driver, later=True, on_refusal=lambda *n: refusals.append(n))
    wait_until(lambda: bool(driver.begun))
    yield buffers
    driver.lets.release(100)
    buffers.close()


def addresses(buffers: HostBuffers) -> list[int]:
    return [buffers.tensor(i).data_ptr() for i in range(len(buffers))]


def test_nothing_waits_and_filled_buffers_go_first(driver: Any, buffers: HostBuffers) -> None:
    assert buffers.pin_progress == PinProgress(0, 4)
    assert buffers.untouched_bytes == 4 * PAGE
    buffers.filled(3)
    buffers.filled(3)
    assert buffers.untouched_bytes == 3 * PAGE
    driver.lets.release(4)
    wait_until(lambda: not buffers.pin_progress.running)
    first, second, third, last = addresses(buffers)
    assert driver.pinned == [first, last, second, third], "the first was under way"
    assert all(buffers.pinned(i) for i in range(4))
    assert buffers.pin_progress.describe() == ""
    assert buffers.untouched_bytes == 0


def test_closing_waits_for_the_buffer_that_is_being_pinned(driver: Any, buffers: HostBuffers) -> None:
    first = addresses(buffers)[0]
    closing = threading.Thread(target=buffers.close)
    closing.start()
    wait_until(lambda: not buffers._pins._waiting)  # type: ignore[union-attr]
    assert closing.is_alive()
    driver.lets.release()
    closing.join(60)
    assert driver.pinned == driver.unpinned == [first]
    buffers.close()


def test_a_refusal_is_told_once_and_ends_it(driver: Any, buffers: HostBuffers, refusals: list[tuple[int, int]]) -> None:
    driver.most = 2
    driver.lets.release(4)
    wait_until(lambda: bool(refusals))
    assert refusals == [(2, 4)]
    assert buffers.pin_progress == PinProgress(2, 4, refused=True)
    assert buffers.pin_progress.describe() == "2 of 4 slots in RAM pinned, no more can be"
    buffers.prepare(6, {i: i for i in range(4)})()
    assert len(driver.begun) == 3, "nothing more is tried"
    assert [buffers.pinned(i) for i in range(6)] == [True, True] + [False] * 4
    assert refusals == [(2, 4)]


def test_an_error_is_a_refusal(driver: Any, buffers: HostBuffers, caplog: pytest.LogCaptureFixture) -> None:
    driver.error = RuntimeError("no such driver")
    driver.lets.release()
    wait_until(lambda: buffers.pin_progress.refused)
    assert "no such driver" in caplog.text


def test_other_numbers_of_buffers_in_the_middle(driver: Any, buffers: HostBuffers) -> None:
    """Buffers that go are not unpinned before they have been pinned; bytes that stay are pinned first."""
    for i in range(4):
        buffers.memory(i)[:] = bytes([i]) * PAGE
        buffers.filled(i)
    old = addresses(buffers)
    change = buffers.prepare(2, {0: 3, 1: 1})
    assert driver.begun == old[:1]

    def lets_one() -> None:  # the one that is under way, when no other is waiting any more
        wait_until(lambda: not buffers._pins._waiting)  # type: ignore[union-attr]
        driver.lets.release()

    letting = threading.Thread(target=lets_one)
    letting.start()
    change()
    letting.join()
    assert [bytes(buffers.memory(i)[:2]) for i in range(2)] == [bytes([3, 3]), bytes([1, 1])]
    driver.lets.release(10)
    wait_until(lambda: not buffers.pin_progress.running)
    assert all(buffers.pinned(i) for i in range(2))


def test_none_at_first(driver: Any) -> None:
    buffers = HostBuffers(0, PAGE, pinning=driver, later=True)
    dropped = buffers.prepare(3, {})
    del dropped
    gc.collect()
    assert threading.active_count() == len([t for t in threading.enumerate() if t.name != "offmoe-pinning"])
    buffers.close()


def test_a_model_that_is_collected_in_the_thread_that_pins(driver: Any) -> None:
    """The thread cannot join itself."""
    import os

    closed = threading.Event()
    closing = ExitStack()

    def in_thread(address: int, nbytes: int) -> bool:
        close_all(os.getpid(), closing)
        return False

    driver.pin = in_thread
    buffers = HostBuffers(1, PAGE, pinning=driver, later=True)
    closing.callback(closed.set)
    closing.callback(buffers.close)
    wait_until(lambda: buffers.pin_progress.refused)
    buffers.close()
