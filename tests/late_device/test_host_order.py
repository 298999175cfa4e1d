"""W4 and W6 of transfer/waits.py on the late device: they order threads of the host.

Tests hold one reader in the middle of its work. With the wait, the other one does not go ahead, however long it has;
without it, the other one is waited for, and whoever uses the slot meets a race.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from offmoe.device.accelerator import DeviceStream
from offmoe.device.arena import SlotArena
from offmoe.device.select import select_backend
from offmoe.errors import OffmoeError
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import Assembly, Destination, ExpertLayout, ExpertRecord
from offmoe.storage.store import ExpertStore, positional_read
from offmoe.transfer.engine import TransferEngine
from offmoe.transfer.slot_writer import SlotWriter
from offmoe.transfer.waits import WAITS, Waits
from offmoe.types import ExpertKey, Fetch
from tests.doubles import Layer, wait_until, without
from tests.late_device import extension
from tests.late_device.conftest import settle
from tests.late_device.extension import LateKind

EXPERTS, VALUES = 12, 700
LAYOUT = ExpertLayout.of({"weight": (torch.float32, (VALUES,))})
AHEAD_S = 0.2
"""Seconds that the second thread has, to show that it waits. A slower machine makes the test weaker, not red."""
LIMIT_S = 60


class Held:
    """Work that blocks its thread, the first time, until the test opens the gate.

    It looks again and again: an event would order the two threads, which the race check would see.
    """

    def __init__(self, work: Any) -> None:
        self._work = work
        self.has_begun = self.is_open = False

    def __call__(self, *arguments: Any) -> Any:
        if not self.has_begun:
            self.has_begun = True
            wait_until(lambda: self.is_open, LIMIT_S)
        return self._work(*arguments)

    def begun(self) -> None:
        """Wait until a thread is held."""
        wait_until(lambda: self.has_begun, LIMIT_S)


class Rig:
    """Three slots and as many RAM slots as experts. Expert n has the value n everywhere."""

    def __init__(self, folder: Path, waits: Waits, read_at: Any = None) -> None:
        save_file({str(e): torch.full((VALUES,), float(e)) for e in range(EXPERTS)}, folder / "model.safetensors")
        checkpoint, backend = Checkpoint.open(folder), select_backend("late")
        records = {ExpertKey(0, e): ExpertRecord((checkpoint.segment(str(e)),)) for e in range(EXPERTS)}
        self.store = ExpertStore(checkpoint.shards, records, read_at=read_at)
        self.arena = SlotArena(backend.allocate, [LAYOUT] * 3)
        layer = Layer(LAYOUT, Assembly((Destination("weight", 0, 0),)))
        writer = SlotWriter(self.store, self.arena, backend, [layer])
        self.engine = TransferEngine(writer, host_slots=EXPERTS, waits=waits)
        wait_until(lambda: not self.engine.host.pin_progress.running)

    def ticket(self, slot: int) -> Any:
        return self.engine._tickets[slot]

    def holds(self, expert: int, slot: int) -> bool:
        """Whether computing with the slot would compute with this expert."""
        self.engine.ready(slot)
        weight = self.arena.views(slot, LAYOUT)["weight"].cpu()
        self.engine.computed([slot])
        return torch.equal(weight, torch.full((VALUES,), float(expert)))

    def close(self) -> None:
        self.engine.close()
        self.store.close()


def raced() -> bool:
    """Whether there were races, which are forgotten."""
    settle()
    found = extension.races()
    extension.forget()
    return bool(found)


def told(read_at: Any) -> Any:
    """A read of which the device is told: the host writes its buffer."""

    def read(descriptor: int, buffer: memoryview, offset: int) -> Any:
        extension.host_touches(torch.frombuffer(buffer, dtype=torch.uint8), writes=True, name="reading from disk")
        return read_at(descriptor, buffer, offset)

    return read


@pytest.fixture
def held_copy(kind: LateKind, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """The first copy to the device."""
    copy = DeviceStream.copy
    held = Held(copy)
    monkeypatch.setattr(DeviceStream, "copy", lambda *arguments: held(*arguments))
    yield held
    held.is_open = True


@pytest.mark.parametrize("waits", [WAITS, without("superseded_issued")], ids=["with W4", "without"])
def test_a_slot_given_away_while_it_is_copied_into(held_copy: Held, tmp_path: Path, waits: Waits) -> None:
    """Expert 0 is about to be copied into slot 2 when the slot is given to expert 9."""
    rig = Rig(tmp_path, waits)
    try:
        rig.engine.prefetch([Fetch(ExpertKey(0, 0), 2, None)])
        held_copy.begun()
        earlier = rig.ticket(2)
        rig.engine.fetch([Fetch(ExpertKey(0, 9), 2, None)])
        later = rig.ticket(2)
        goes_ahead = later.issued.wait(AHEAD_S if waits is WAITS else LIMIT_S)
        held_copy.is_open = True
        assert earlier.issued.wait(LIMIT_S)
        assert later.issued.wait(LIMIT_S)
        assert goes_ahead == (waits is not WAITS)
        if waits is WAITS:
            assert rig.holds(9, 2)
        else:  # the copies are queued by two readers, and nothing orders these
            with pytest.raises(RuntimeError, match="race: copy to the host"):
                rig.holds(9, 2)
    finally:
        held_copy.is_open = True
        rig.close()
    assert raced() == (waits is not WAITS)


@pytest.mark.parametrize("waits", [WAITS, without("host_slot_issued")], ids=["with W6", "without"])
def test_a_copy_of_what_is_being_read(kind: LateKind, tmp_path: Path, waits: Waits) -> None:
    """Expert 4 is being read into RAM for a slot that is given away, when it is copied from there to another slot."""
    held = Held(positional_read())
    rig = Rig(tmp_path, waits, told(held))
    try:
        rig.engine.prefetch([Fetch(ExpertKey(0, 4), 0, None, 0)])
        held.begun()
        rig.engine._queue.running[0].landing = True  # from here on it cannot be dropped
        rig.engine.fetch([Fetch(ExpertKey(0, 4), 1, None, 0, read=False)])
        ticket = rig.ticket(1)
        goes_ahead = ticket.issued.wait(AHEAD_S if waits is WAITS else LIMIT_S)
        if goes_ahead:  # the copy takes what the RAM slot holds before the read
            with pytest.raises(OffmoeError, match="race: copy from the host"):
                rig.holds(4, 1)
            torch.accelerator.synchronize()  # else the read goes on first, and the copy finds its source changed
        held.is_open = True
        assert goes_ahead == (waits is not WAITS)
        if not goes_ahead:
            assert rig.holds(4, 1)
    finally:
        held.is_open = True
        rig.close()
    assert raced() == (waits is not WAITS)
