"""What fails, is refused or is interrupted on a device whose work is late: nothing is under way when memory goes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import offmoe
from offmoe.budget.inspect import inspect
from offmoe.device import accelerator
from offmoe.device.accelerator import DeviceStream
from offmoe.device.select import select_backend
from offmoe.errors import CapacityError, ConfigError, OffmoeError
from offmoe.transfer.waits import Waits
from tests import tiny
from tests.late_device import extension
from tests.late_device.extension import LateKind

PROMPTS = (tiny.prompt(1, 9), tiny.prompt(1, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("lifetime") / "model")


def load(folder: Path, device: str = "late", **options: Any) -> tiny.Model:
    return offmoe.from_pretrained(folder, **{"device": device, "slots_per_layer": 3, "prefetch": 0, **options})


def logits(model: tiny.Model, device: str = "late") -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(prompt.to(device)).logits.cpu() for prompt in PROMPTS]


@pytest.fixture
def right(folder: Path, kind: LateKind) -> list[torch.Tensor]:
    model = load(folder, slots_per_layer=8)
    with model.offload:
        return logits(model)


def test_a_copy_that_fails_leaves_none_under_way(
    folder: Path, kind: LateKind, right: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D4: no event marks an expert's first copy if its second one fails."""
    copy, calls = DeviceStream.copy, threading.local()

    def fails(stream: DeviceStream, destination: torch.Tensor, source: torch.Tensor) -> None:
        calls.made = getattr(calls, "made", 0) + 1
        if calls.made % 2 == 0:
            raise OSError("the second copy failed")
        copy(stream, destination, source)

    model = load(folder)
    with monkeypatch.context() as patch:
        patch.setattr(DeviceStream, "copy", fails)
        with pytest.raises(OffmoeError, match="second copy"):
            logits(model)
        model.offload.close()
    assert not kind.held
    assert not extension.races()
    model = load(folder)
    with model.offload:
        with monkeypatch.context() as patch:
            patch.setattr(DeviceStream, "copy", fails)
            with pytest.raises(OffmoeError, match="second copy"):
                logits(model)
        assert all(torch.equal(a, b) for a, b in zip(logits(model), right, strict=True)), "the next pass is right"


@pytest.mark.parametrize("wait", ["slot_landed", "rows_on_host", "rows_on_device"])
def test_ctrl_c_while_copies_are_under_way(
    folder: Path, kind: LateKind, monkeypatch: pytest.MonkeyPatch, wait: str
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    model = load(folder, exactness="numeric", on_miss="cpu")
    logits(model)
    monkeypatch.setattr(Waits, wait, interrupted)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    model.offload.close()
    assert not kind.held


def test_the_second_device(folder: Path, kind: LateKind, right: list[torch.Tensor]) -> None:
    """D5: the current device of every thread is another one."""
    assert torch.accelerator.current_device_index() == 0
    kind.registered_on.clear()
    allocated = torch.accelerator.memory_allocated(0)
    model = load(folder, device="late:1", prefetch=2)
    with model.offload:
        assert all(torch.equal(a, b) for a, b in zip(logits(model, "late:1"), right, strict=True))
        assert torch.accelerator.memory_allocated(0) <= allocated, "nothing of it is on the first device"
    assert kind.registered_on
    assert set(kind.registered_on) == {1}
    assert torch.accelerator.current_device_index() == 0
    assert not kind.held


def test_two_threads_that_copy_on_one_stream_keep_their_own_device(
    kind: LateKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader's copy and the computing thread's overlap: the reader begins first and ends first."""
    stream = DeviceStream(torch.Stream(torch.device("late", 1)))
    slots, host = torch.zeros(2, 4, device="late:1"), torch.ones(2, 4, pin_memory=True)
    torch.accelerator.synchronize(1)
    reads, issues, reader_is_done = threading.Event(), threading.Event(), threading.Event()
    pieces, seen = accelerator._pieces, []

    def slowly(destination: torch.Tensor, source: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if threading.current_thread() is reader:
            reads.set()
            issues.wait(60)
        else:
            issues.set()
            reader_is_done.wait(60)
        yield from pieces(destination, source)

    def read() -> None:
        torch.accelerator.set_device_index(1)
        stream.copy(slots[0], host[0])
        seen.append((torch.accelerator.current_device_index(), torch.accelerator.current_stream(1)))
        reader_is_done.set()

    monkeypatch.setattr(accelerator, "_pieces", slowly)
    mine = torch.Stream(torch.device("late", 0))
    reader = threading.Thread(target=read)
    usual = torch.accelerator.current_stream(1)
    reader.start()
    assert reads.wait(60)
    with mine:
        stream.copy(slots[1], host[1])
        assert (torch.accelerator.current_device_index(), torch.accelerator.current_stream()) == (0, mine)
    reader.join()
    assert seen == [(1, usual)]
    torch.accelerator.synchronize(1)
    assert torch.equal(slots.cpu(), host)


def test_random_states_are_of_one_device(kind: LateKind) -> None:
    backend, other = select_backend("late:1"), select_backend("late:0")
    states, others = backend.random_state(), other.random_state()
    drawn = torch.rand(3)
    backend.set_random_state([states[0], states[1] + 5])
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(backend.random_state()[1], states[1] + 5)
    assert torch.equal(other.random_state()[1], others[1])
    backend.set_random_state(states)


def test_devices_of_different_size(folder: Path, kind: LateKind) -> None:
    small = 48 << 20
    extension.limit(1, small)
    try:
        free = [select_backend(f"late:{i}").free_bytes() for i in range(2)]
        assert free[1] <= small < free[0]
        plans = [inspect(folder, offmoe.OffloadConfig(device=f"late:{i}")).plan for i in range(2)]
        assert plans[1].budget <= small < plans[0].budget
    finally:
        extension.limit(1, 2 << 30)


@pytest.mark.parametrize("pins", [0, 5, 20])
def test_a_driver_that_refuses_registration(
    folder: Path, kind: LateKind, right: list[torch.Tensor], pins: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As on WSL: copies from memory that is not pinned hold the host up, and the bits are the same."""
    kind.refuses_after = len(kind.registered_on) + pins
    model = load(folder)
    with model.offload:
        assert all(torch.equal(a, b) for a, b in zip(logits(model), right, strict=True))
    assert "could be pinned" in caplog.text
    assert not kind.held


@pytest.mark.parametrize(("rows", "copies"), [(64, 1), (512, 2), (600, 3)])
def test_copies_into_transposed_memory_are_bounded(kind: LateKind, rows: int, copies: int) -> None:
    """D1b: torch copies into temporary device memory as large as the copy, which no plan counts."""
    source = torch.arange(rows * 1024, dtype=torch.float32).view(rows, 1024).pin_memory()
    memory = torch.zeros(1024, rows, device="late")
    stream, before = DeviceStream(torch.accelerator.current_stream()), extension.counts()
    stream.copy(memory.T, source)
    assert extension.since(before).async_copies == copies
    assert torch.equal(memory.cpu(), source.T)
    before = extension.counts()
    stream.copy(memory.view(rows, 1024), source)  # contiguous: no temporary memory, so in one piece
    assert extension.since(before).async_copies == 1


def test_a_card_without_bfloat16(folder: Path, kind: LateKind, caplog: pytest.LogCaptureFixture) -> None:
    """Turing and older: torch emulates it, so results are the same, and the log says what would be faster."""
    model = load(folder, dtype=torch.bfloat16)
    with model.offload:
        want = logits(model)
    assert "bfloat16" not in caplog.text
    kind.bfloat16 = False
    model = load(folder, dtype=torch.float32)
    model.offload.close()
    assert "bfloat16" not in caplog.text
    model = load(folder, dtype=torch.bfloat16)
    with model.offload:
        assert all(torch.equal(a, b) for a, b in zip(logits(model), want, strict=True))
    assert "late:0 has no bfloat16 of its own: torch emulates it" in caplog.text
    assert "--dtype float16" in caplog.text


def test_devices_that_are_not_there(kind: LateKind) -> None:
    with pytest.raises(ConfigError, match="there are 2 LATE devices"):
        select_backend("late:2")
    with pytest.raises(ConfigError, match="is not supported"):
        select_backend("xpu")


def test_slots_that_do_not_fit(folder: Path, kind: LateKind) -> None:
    backend = select_backend("late:1")
    with pytest.raises(CapacityError, match="--slots-per-layer"):
        backend.allocate(3 << 30)
    assert torch.equal((torch.ones(2, device="late:1") + 1).cpu(), torch.full((2,), 2.0))


def test_memory_that_ends_in_the_middle_of_a_prompt(folder: Path, kind: LateKind, right: list[torch.Tensor]) -> None:
    model = load(folder)
    with model.offload:
        free, total = torch.accelerator.get_memory_info(0)
        extension.limit(0, total - free)
        try:
            with pytest.raises(CapacityError, match="ran out of memory"), torch.no_grad():
                model(tiny.prompt(4, 120).to("late"))
        finally:
            extension.limit(0, 2 << 30)
        assert all(torch.equal(a, b) for a, b in zip(logits(model), right, strict=True)), "the model goes on"
