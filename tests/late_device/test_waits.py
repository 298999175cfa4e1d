"""Each wait of transfer/waits.py taken out: a race, or weights and rows that are wrong.

W4 and W6 order threads of the host: test_host_order.py holds one thread until the other has gone ahead. W9 orders what
every stream orders by itself, because results return on the stream that computes with them. So it is taken out on a
device whose copies leave the order of their stream, as queues may that are not CUDA's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offmoe
from offmoe.budget.inspect import inspect
from offmoe.compute.torch_compute import TorchCompute
from offmoe.storage.store import ExpertStore
from offmoe.transfer.host_exchange import HostExchange
from offmoe.transfer.staging import staging_plan
from offmoe.transfer.waits import Waits
from tests import tiny
from tests.late_device import extension
from tests.late_device.conftest import settle

pytestmark = pytest.mark.usefixtures("kind", "host_accesses")

PROMPTS = (tiny.prompt(1, 5), tiny.prompt(1, 1), tiny.prompt(1, 1, seed=8), tiny.prompt(2, 20, seed=9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("waits") / "model")


@pytest.fixture
def host_accesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is told when the host writes a buffer that is copied from, and reads one that is copied to."""
    read_part, to_host = ExpertStore.read_part, HostExchange.to_host

    def read(store: Any, key: Any, part: int, memory: memoryview, *rest: Any) -> Any:
        extension.host_touches(torch.frombuffer(memory, dtype=torch.uint8), writes=True, name="reading from disk")
        return read_part(store, key, part, memory, *rest)

    def received(exchange: Any, rows: torch.Tensor) -> torch.Tensor:
        copied = to_host(exchange, rows)
        extension.host_touches(copied, writes=False, name="computing on the host")
        return copied

    monkeypatch.setattr(ExpertStore, "read_part", read)
    monkeypatch.setattr(HostExchange, "to_host", received)


def logits(folder: Path, slots: int = 2, **options: Any) -> list[torch.Tensor]:
    model = offmoe.from_pretrained(folder, device="late", slots_per_layer=slots, **options)
    with model.offload, torch.no_grad():
        return [model(prompt.to("late")).logits.cpu() for _ in range(2) for prompt in PROMPTS]


def ram_for(folder: Path, slots: int) -> int:
    """host_memory that holds so many experts of each layer, and scratch slots."""
    found = inspect(folder, offmoe.OffloadConfig(device="late", slots_per_layer=2))
    read = max(expert.read for expert in found.needs.experts) + 4096
    return (staging_plan(read).buffers + 8 + 3 * slots) * read


SCENES: dict[str, dict[str, Any]] = {
    "slot_landed": {"prefetch": 0, "host_memory": 0},
    "slot_last_read": {"prefetch": 0, "host_memory": 0},
    "staging_copied": {"prefetch": 0, "host_memory": 0},
    "host_slot_copied": {"prefetch": 0, "ram": 1},
    "rows_on_host": {"prefetch": 0, "exactness": "numeric", "on_miss": "cpu"},
    "rows_on_device": {"prefetch": 0, "exactness": "numeric", "on_miss": "cpu"},
    "slot_turn": {"prefetch": 0, "host_memory": 0},
}
"""By wait: options of a run that needs it."""
LEAVE_STREAMS = {"rows_on_device"}
"""Waits that are needed only where copies leave the order of their stream."""


@pytest.mark.parametrize("when", [extension.LATEST, extension.EARLIEST])
@pytest.mark.parametrize("wait", SCENES)
def test_without_the_wait_there_is_a_race(folder: Path, wait: str, when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(SCENES[wait])
    if "ram" in options:
        options["host_memory"] = ram_for(folder, options.pop("ram"))
    extension.schedule(when)
    extension.copies_leave_streams(wait in LEAVE_STREAMS)
    logits(folder, **options)
    assert not extension.races()
    monkeypatch.setattr(Waits, wait, lambda *_: None)
    with pytest.raises((RuntimeError, offmoe.errors.OffmoeError, extension.Race)):
        logits(folder, **options)
    settle()
    assert any(race.startswith("race:") for race in extension.races())
    extension.forget()


def test_without_w5_an_expert_lands_on_one_that_is_still_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers are fast, the computing thread takes its time before each expert of a layer of several waves."""
    right = logits(folder, slots=8)
    ready = TorchCompute._when_ready

    def slow(compute: Any, layer: Any, slot: int, x: torch.Tensor, transfer: Any) -> torch.Tensor:
        for ticket in [t for t in transfer._tickets.values() if t.next is not None or t.turn is not None]:
            ticket.issued.wait(0.05)  # without W5 the next expert is on its way in this time
        return ready(compute, layer, slot, x, transfer)

    monkeypatch.setattr(TorchCompute, "_when_ready", slow)
    assert all(torch.equal(a, b) for a, b in zip(logits(folder, prefetch=0), right, strict=True))
    monkeypatch.setattr(Waits, "slot_turn", lambda *_: None)
    try:
        same = all(torch.equal(a, b) for a, b in zip(logits(folder, prefetch=0), right, strict=True))
    except (RuntimeError, offmoe.errors.OffmoeError):
        same = False
    settle()
    assert not same
    extension.forget()
