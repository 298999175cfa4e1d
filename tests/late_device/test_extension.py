"""The late device itself: what it must refuse, how late it is, and which accesses it calls races."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.late_device import extension
from tests.late_device.conftest import settle
from tests.late_device.extension import EARLIEST, EARLY_COPIES, LateKind

pytestmark = pytest.mark.usefixtures("kind")

ROOT = Path(__file__).resolve().parents[2]


def device(index: int = 0) -> torch.device:
    return torch.device("late", index)


def pinned(*shape: int) -> torch.Tensor:
    """Pinned float32 memory of the host, of zeros."""
    return torch.zeros(shape, pin_memory=True)


def on_stream(stream: torch.Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
    with stream:
        destination.copy_(source, non_blocking=True)


def take_races() -> list[str]:
    """The races that were found, which are then no failure of the test."""
    found = extension.races()
    torch.accelerator.synchronize()  # what raced must not race with the end of its memory too
    extension.forget()
    return found


# --- lateness


def test_the_host_cannot_touch_device_memory() -> None:
    script = (
        "import ctypes, torch; from tests.late_device import extension; extension.library(); "
        "x = torch.ones(8, device='late'); torch.accelerator.synchronize(); print('so far', flush=True); "
        "print(ctypes.c_float.from_address(x.data_ptr()).value)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "so far\n"
    assert done.returncode == -signal.SIGSEGV


def test_a_copy_lands_when_it_is_waited_for() -> None:
    source, back = pinned(4).fill_(3.0), pinned(4)
    x = torch.zeros(4, device=device())
    settle()
    x.copy_(source, non_blocking=True)
    back.copy_(x, non_blocking=True)
    assert back.isnan().all()
    torch.accelerator.current_stream().synchronize()
    assert (back == 3).all()


def test_computing_is_late() -> None:
    ran = []
    x = torch.ones(4, device=device())
    y = x * 2  # its shape is known at once
    assert y.shape == (4,)
    extension.submit(device(), "look", lambda: ran.append(extension.on_host(y).tolist()), [y], [])
    assert not ran
    event = torch.Event(device())
    event.record()
    assert not ran
    event.synchronize()
    assert ran == [[2.0] * 4]


@pytest.mark.parametrize("when", [EARLIEST, EARLY_COPIES])
def test_copies_can_be_early(when: int) -> None:
    extension.schedule(when)
    source, back = pinned(4).fill_(3.0), pinned(4)
    x = torch.empty(4, device=device())
    x.copy_(source, non_blocking=True)
    back.copy_(x, non_blocking=True)
    assert (back == 3).all()


def test_a_question_that_is_asked_again_and_again_is_answered() -> None:
    x = torch.ones(4, device=device())
    for _ in range(5):
        x = x + 1
    event = torch.Event(device())
    event.record()
    asked = 0
    while not event.query():
        asked += 1
    assert 1 < asked < 30


def test_new_memory_holds_no_zeros() -> None:
    assert torch.empty(64, device=device()).cpu().isnan().all()


def test_values_are_the_cpus() -> None:
    x = torch.randn(6, 5)
    want = torch.softmax(x @ x.T, -1).sort(descending=True)[0].cumsum(-1)
    on_device = x.to("late")
    got = torch.softmax(on_device @ on_device.T, -1).sort(descending=True)[0].cumsum(-1)
    assert torch.equal(got.cpu(), want)
    assert got.sum().item() == want.sum().item()
    assert torch.equal((on_device > 0).nonzero().cpu(), (x > 0).nonzero())


def test_an_error_of_late_work_is_raised_where_it_is_waited_for() -> None:
    index = torch.tensor([9], device=device())
    table = torch.ones(4, 2, device=device())
    table.index_select(0, index)
    with pytest.raises(RuntimeError, match="index_select"):
        torch.accelerator.synchronize()


# --- races


def test_two_streams_that_nothing_orders_race() -> None:
    x, source = torch.zeros(8, device=device()), pinned(8)
    settle()
    on_stream(torch.Stream(device()), x, source)
    with pytest.raises(RuntimeError, match="race: aten::mul"):
        x * 2
    assert len(take_races()) == 1


def test_an_event_orders_them() -> None:
    x, source, copies = torch.zeros(8, device=device()), pinned(8), torch.Stream(device())
    settle()
    on_stream(copies, x, source)
    event = copies.record_event()
    torch.accelerator.current_stream().wait_event(event)
    x * 2


def test_an_event_orders_nothing_that_came_after_it() -> None:
    x, source, copies = torch.zeros(8, device=device()), pinned(8), torch.Stream(device())
    settle()
    event = copies.record_event()
    on_stream(copies, x, source)
    torch.accelerator.current_stream().wait_event(event)
    with pytest.raises(RuntimeError, match="race"):
        x * 2
    assert take_races()


def test_a_wait_of_the_host_orders_them() -> None:
    x, source, copies = torch.zeros(8, device=device()), pinned(8), torch.Stream(device())
    settle()
    on_stream(copies, x, source)
    copies.synchronize()
    x * 2


def test_other_bytes_do_not_race() -> None:
    x, source, copies = torch.zeros(8, device=device()), pinned(4), torch.Stream(device())
    settle()
    on_stream(copies, x[4:], source)
    x[:4] * 2
    with pytest.raises(RuntimeError, match="race"):
        x[3:5] * 2
    assert take_races()


def test_reads_do_not_race() -> None:
    x, other = torch.ones(8, device=device()), torch.Stream(device())
    settle()
    with other:
        x + 1
    x + 2
    settle()


@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_copy_over_what_is_still_read_races_whatever_the_timing(when: int) -> None:
    """W2, which no result can show while computing is never late."""
    extension.schedule(when)
    x, source, copies = torch.zeros(8, device=device()), pinned(8), torch.Stream(device())
    settle()
    x * 2
    with pytest.raises(RuntimeError, match="race: copy from the host"):
        on_stream(copies, x, source)
    assert take_races()


def test_memory_that_is_freed_while_another_stream_uses_it() -> None:
    x, other = torch.ones(1 << 20, device=device()), torch.Stream(device())
    settle()
    with other:
        x + 1
    del x
    assert any(race.startswith("race: free") for race in take_races())
    y = torch.ones(1 << 20, device=device())
    settle()
    with other:
        y + 1
    y.record_stream(other)
    del y
    assert not extension.races()


def test_the_host_must_not_touch_what_is_still_copied() -> None:
    x, source = torch.zeros(8, device=device()), pinned(8)
    settle()
    x.copy_(source, non_blocking=True)
    extension.host_touches(source, writes=False, name="reading")
    with pytest.raises(extension.Race, match="writing"):
        extension.host_touches(source, writes=True, name="writing")
    take_races()
    torch.accelerator.synchronize()
    extension.host_touches(source, writes=True, name="writing")
    source.copy_(x, non_blocking=True)
    with pytest.raises(extension.Race, match="reading"):
        extension.host_touches(source, writes=False, name="reading")
    assert take_races()


def test_a_source_that_was_overwritten_is_an_error() -> None:
    x, source = torch.zeros(8, device=device()), pinned(8)
    settle()
    x.copy_(source, non_blocking=True)
    source.fill_(1.0)
    with pytest.raises(RuntimeError, match="has changed the source"):
        torch.accelerator.synchronize()


def test_memory_is_unregistered_while_a_copy_reads_it(kind: LateKind) -> None:
    memory = torch.zeros(1024, dtype=torch.uint8)
    x = torch.zeros(1024, dtype=torch.uint8, device=device())
    assert kind.register(memory.data_ptr(), memory.nbytes)
    assert memory.is_pinned()
    x.copy_(memory, non_blocking=True)
    kind.unregister(memory.data_ptr())
    assert any("unregistering" in race for race in take_races())
    assert not memory.is_pinned()
    torch.accelerator.synchronize()


def test_work_of_python_is_checked_too() -> None:
    x, other = torch.ones(8, device=device()), torch.Stream(device())
    settle()
    with other:
        extension.submit(device(), "kernel", lambda: None, [], [x])
    with pytest.raises(extension.Race, match="kernel"):
        extension.submit(device(), "another", lambda: None, [x], [])
    assert take_races()


# --- devices and memory


def test_two_devices() -> None:
    assert torch.accelerator.device_count() == 2
    a = torch.arange(4.0, device=device(0))
    b = a.to(device(1)) * 2
    assert b.device == device(1)
    assert torch.equal((b.to(device(0)) + a).cpu(), torch.arange(4.0) * 3)
    with torch.accelerator.device_index(1):
        assert torch.empty(1, device="late").device == device(1)
        assert torch.accelerator.current_stream().device == device(1)
    event = torch.Event(device(0))
    event.record(torch.accelerator.current_stream(device(0)))
    with pytest.raises(RuntimeError, match="another device"):
        event.record(torch.accelerator.current_stream(device(1)))


def test_statistics_and_limit() -> None:
    before, size = torch.accelerator.memory_allocated(1), 1 << 20
    torch.accelerator.reset_peak_memory_stats(1)
    x = torch.empty(size, dtype=torch.uint8, device=device(1))
    y = torch.empty(size, dtype=torch.uint8, device=device(1))
    assert torch.accelerator.memory_allocated(1) == before + 2 * size
    del y
    assert torch.accelerator.memory_allocated(1) == before + size
    assert torch.accelerator.max_memory_allocated(1) == before + 2 * size
    assert torch.accelerator.memory_reserved(1) >= before + 2 * size
    free, total = torch.accelerator.get_memory_info(1)
    extension.limit(1, total - free + 4 * size)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(6 * size, dtype=torch.uint8, device=device(1))
        del x  # what is cached is given back before an allocation fails
        torch.empty(5 * size, dtype=torch.uint8, device=device(1))
    finally:
        extension.limit(1, total)


def test_what_needs_values_waits_and_is_counted() -> None:
    before = extension.counts()
    x = torch.tensor([3.0, 1.0], device=device())
    assert extension.since(before).blocking_h2d == 1
    x.max().item()
    assert extension.since(before).scalars == 1
    x[x > 2]
    assert extension.since(before).at_once >= 1
    assert any("nonzero" in name or "index" in name for name in extension.at_once())
