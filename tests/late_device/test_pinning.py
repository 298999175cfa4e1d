"""D16: RAM slots are pinned in the background, while the model is used, resized, interrupted and closed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import offmoe
from offmoe.budget.inspect import inspect
from offmoe.device.accelerator import AcceleratorBackend
from offmoe.device.pinning import PinProgress
from offmoe.transfer.staging import staging_plan
from offmoe.transfer.waits import Waits
from tests import tiny
from tests.doubles import wait_until
from tests.late_device import extension
from tests.late_device.extension import LateKind

PROMPTS = (tiny.prompt(1, 9), tiny.prompt(1, 1), tiny.prompt(1, 1, seed=8))
LIMIT_S = 30


class SlowDriver:
    """Registers memory for the thread that pins only when the test lets it."""

    def __init__(self) -> None:
        self.lets = threading.Semaphore(0)
        self.begun = threading.Event()

    def __call__(self) -> None:
        if threading.current_thread().name == "offmoe-pinning":
            self.begun.set()
            assert self.lets.acquire(timeout=LIMIT_S)


@pytest.fixture
def driver(kind: LateKind) -> Iterator[SlowDriver]:
    driver = SlowDriver()
    kind.before_register = driver
    yield driver
    driver.lets.release(1000)
    assert not kind.held


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("pinning") / "model")


def ram_for(folder: Path, slots: int) -> int:
    """host_memory that holds so many experts of each layer."""
    found = inspect(folder, offmoe.OffloadConfig(device="late", slots_per_layer=2))
    read = max(expert.read for expert in found.needs.experts)
    return (staging_plan(read).buffers + 3 * slots) * read


def load(folder: Path, slots_in_ram: int = 8, **options: Any) -> tiny.Model:
    options = {"slots_per_layer": 2, "prefetch": 0, "host_memory": ram_for(folder, slots_in_ram), **options}
    return offmoe.from_pretrained(folder, device="late", **options)


def logits(model: tiny.Model) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(prompt.to("late")).logits.cpu() for prompt in PROMPTS]


def same(model: tiny.Model, right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(logits(model), right, strict=True))


@pytest.fixture
def right(folder: Path, kind: LateKind) -> list[torch.Tensor]:
    model = offmoe.from_pretrained(folder, device="late", slots_per_layer=8)
    with model.offload:
        return logits(model)


def test_a_model_runs_while_its_ram_is_pinned(folder: Path, driver: SlowDriver, right: list[torch.Tensor]) -> None:
    model = load(folder)
    with model.offload as offload:
        host = offload._executor.host_memory
        assert host.untouched_bytes == 24 * host.staging.nbytes
        assert same(model, right)
        assert offload.pin_progress() == PinProgress(0, 24)
        assert offload.pin_progress().describe() == "0 of 24 slots in RAM pinned so far"
        assert host.untouched_bytes < 24 * host.staging.nbytes, "what was read into has been taken"
        driver.lets.release(7)
        wait_until(lambda: offload.pin_progress().pinned == 7)
        assert same(model, right), "some are pinned"
        driver.lets.release(100)
        wait_until(lambda: not offload.pin_progress().running)
        assert offload.pin_progress() == PinProgress(24, 24)
        assert same(model, right)
        disk = offload.stats().disk_bytes
        logits(model)
        assert offload.stats().disk_bytes == disk, "everything is in RAM"


def test_where_bytes_come_from_changes_no_decision(folder: Path, driver: SlowDriver) -> None:
    found = []
    for lets in (1, 5, 100):
        model = load(folder, slots_in_ram=3, prefetch=1)
        with model.offload as offload:
            driver.lets.release(lets)
            logits(model)
            stats = offload.stats()
            found.append((stats.hits, stats.misses, stats.evictions, stats.disk_bytes, stats.h2d_bytes))
            driver.lets.release(100)
    assert len(set(found)) == 1


def test_closing_in_the_middle(folder: Path, kind: LateKind, driver: SlowDriver) -> None:
    model = load(folder)
    logits(model)
    assert driver.begun.wait(LIMIT_S)
    closing = threading.Thread(target=model.offload.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive(), "memory that is being registered cannot go"
    driver.lets.release()
    closing.join(LIMIT_S)
    assert not closing.is_alive()
    assert not kind.held


@pytest.mark.parametrize("slots", [2, 5, 0])
def test_resizing_in_the_middle(folder: Path, driver: SlowDriver, right: list[torch.Tensor], slots: int) -> None:
    model = load(folder, slots_in_ram=4)
    with model.offload as offload:
        logits(model)
        driver.lets.release(1)
        assert driver.begun.wait(LIMIT_S)
        pins = offload._executor.host_memory.slots._pins

        def lets_one() -> None:  # the one that is under way, when no other is waiting any more
            wait_until(lambda: not pins._waiting)
            driver.lets.release()

        letting = threading.Thread(target=lets_one)
        letting.start()
        offload.resize(host_memory=ram_for(folder, slots))
        driver.lets.release(100)
        letting.join()
        assert same(model, right)
        wait_until(lambda: not offload.pin_progress().running)
        assert offload.pin_progress() == PinProgress(3 * slots, 3 * slots)
        assert same(model, right)


def test_ctrl_c_in_the_middle(
    folder: Path, kind: LateKind, driver: SlowDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    model = load(folder)
    logits(model)
    with monkeypatch.context() as patch:
        patch.setattr(Waits, "slot_landed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits(model)
    driver.lets.release()
    model.offload.close()
    assert not kind.held


def test_a_refusal_is_said_once(
    folder: Path, kind: LateKind, right: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(folder)
    model.offload.close()
    kind.refuses_after = len(kind.registered_on) + staging_plan(1).buffers + 5
    model = load(folder)
    with model.offload as offload:
        wait_until(lambda: not offload.pin_progress().running)
        assert offload.pin_progress() == PinProgress(5, 24, refused=True)
        assert same(model, right)
        offload.resize(host_memory=ram_for(folder, 0))
        offload.resize(host_memory=ram_for(folder, 2))
        assert same(model, right)
    assert caplog.text.count("could be pinned") == 1
    assert "only 5 of 24 expert slots in RAM could be pinned for late:0" in caplog.text
    assert not kind.held


def test_auto_after_loading_does_not_count_memory_twice(
    folder: Path, driver: SlowDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAM that was promised and not yet written counts as free in what the system says."""
    ram = ram_for(folder, 6)
    monkeypatch.setattr(AcceleratorBackend, "host_free_bytes", lambda backend: ram)
    model = load(folder, slots_in_ram=6)
    with model.offload as offload:
        plan = offload.resize(host_memory="auto")
        assert plan.host is not None
        assert plan.host.budget <= ram + plan.host.staging
        driver.lets.release(100)


@pytest.mark.parametrize("interrupted", [False, True])
def test_offloaded_dense_layers(
    folder: Path, driver: SlowDriver, right: list[torch.Tensor], interrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their images in RAM are copied from while they are pinned, and none is under way when they go."""
    found = inspect(folder, offmoe.OffloadConfig(device="late", slots_per_layer=2))
    model = offmoe.from_pretrained(folder, device="late", prefetch=0, device_memory=found.plan.smallest)
    with model.offload as offload:
        assert offload.memory().offloaded_in == "host"
        assert same(model, right)
        driver.lets.release(1000)
        assert same(model, right)
        if interrupted:

            def ctrl_c(*_: object) -> None:
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(Waits, "slot_landed", ctrl_c)
                with pytest.raises(KeyboardInterrupt):
                    logits(model)
    assert not extension.races()
