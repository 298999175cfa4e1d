"""Copies out of pinned RAM slots are queued by the thread that computes, unless they would have to wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from offmoe.device.arena import SlotArena
from offmoe.errors import TransferError
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import Assembly, Destination, ExpertLayout, ExpertRecord
from offmoe.storage.store import ExpertStore
from offmoe.transfer.engine import TransferEngine
from offmoe.transfer.slot_writer import SlotWriter
from offmoe.types import ExpertKey, Fetch, Wave
from tests.doubles import Layer, PinningBackend, wait_until

EXPERTS = 4
LAYOUT = ExpertLayout.of({"w": (torch.float32, (4, 8))})


class Rig:
    """An engine whose RAM slot i holds expert i, and a list of the threads that queued copies."""

    def __init__(self, folder: Path, pins: int) -> None:
        save_file({f"{e}": torch.full((4, 8), float(e)) for e in range(EXPERTS)}, folder / "model.safetensors")
        checkpoint = Checkpoint.open(folder)
        records = {ExpertKey(0, e): ExpertRecord((checkpoint.segment(f"{e}"),)) for e in range(EXPERTS)}
        self.backend = PinningBackend()
        self.backend.pins = pins
        self.store = ExpertStore(checkpoint.shards, records)
        self.arena = SlotArena(self.backend.allocate, [LAYOUT] * EXPERTS)
        writer = SlotWriter(self.store, self.arena, self.backend, [Layer(LAYOUT, Assembly((Destination("w", 0, 0),)))])
        self.engine = TransferEngine(writer, host_slots=EXPERTS)
        wait_until(lambda: not self.engine.host.pin_progress.running)
        self.backend.guard(writer)
        copies, self.threads = self.backend.copies, list[threading.Thread]()
        copy = copies.copy
        self.fail: BaseException | None = None

        def noted(destination: torch.Tensor, source: torch.Tensor) -> None:
            self.threads.append(threading.current_thread())
            if self.fail is not None:
                raise self.fail
            copy(destination, source)

        copies.copy = noted  # type: ignore[method-assign]

    def read(self, *experts: int) -> None:
        """Read experts into their RAM slots, past slots of the same number."""
        self.engine.fetch([Fetch(ExpertKey(0, e), e, None, host=e) for e in experts])
        self.use(*[(e, e) for e in experts])
        self.threads.clear()

    def fetch(self, *pairs: tuple[int, int]) -> None:
        """Fetch (expert, slot) pairs from RAM."""
        self.engine.fetch([Fetch(ExpertKey(0, e), slot, None, host=e, read=False) for e, slot in pairs])

    def use(self, *pairs: tuple[int, int]) -> None:
        for expert, slot in pairs:
            self.engine.ready(slot)
            assert torch.equal(self.arena.views(slot, LAYOUT)["w"], torch.full((4, 8), float(expert)))
        self.engine.computed([slot for _, slot in pairs])


@pytest.fixture
def pins() -> int:
    return 1000


@pytest.fixture
def rig(tmp_path: Path, pins: int) -> Iterator[Rig]:
    rig = Rig(tmp_path, pins)
    yield rig
    rig.engine.close()
    rig.store.close()


def test_a_copy_out_of_pinned_ram_needs_no_reader(rig: Rig) -> None:
    """D8: 224 us went by before a reader had queued it."""
    rig.read(0, 1, 2)
    rig.fetch((0, 1), (2, 0))
    assert rig.threads == [threading.current_thread()] * 2
    rig.use((0, 1), (2, 0))
    rig.fetch((1, 0))
    rig.use((1, 0), (0, 1))
    assert set(rig.threads) == {threading.current_thread()}


def test_such_a_copy_needs_no_lock_that_readers_hold(rig: Rig) -> None:
    """Nor does it wake one of them: nothing is queued for it."""
    rig.read(0, 1)
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with rig.engine._queue.lock:
            held.set()
            assert over.wait(20)

    reader = threading.Thread(target=hold)
    reader.start()
    assert held.wait(20)
    try:
        rig.fetch((0, 1), (1, 0))
        rig.use((0, 1), (1, 0))
    finally:
        over.set()
        reader.join()
    assert rig.threads == [threading.current_thread()] * 2


def test_a_ram_slot_may_change_its_expert(rig: Rig) -> None:
    rig.read(0, 1)
    for expert in (0, 1, 0):
        rig.engine.fetch([Fetch(ExpertKey(0, expert), 3, None, host=2)])
        rig.use((expert, 3))
        rig.engine.fetch([Fetch(ExpertKey(0, expert), 2, None, host=2, read=False)])
        rig.use((expert, 2))


def test_what_has_to_wait_is_left_to_readers(rig: Rig) -> None:
    """The second fetch takes its bytes from a RAM slot that the first one is still reading into."""
    key = ExpertKey(0, 0)
    for _ in range(20):
        rig.engine.fetch([Fetch(key, 1, None, host=0), Fetch(key, 2, None, host=0, read=False)])
        rig.use((0, 1), (0, 2))
    assert threading.current_thread() not in rig.threads


def test_a_later_wave_may_have_a_slot_of_its_own(rig: Rig) -> None:
    """It waits for no earlier wave, so its copy is queued with theirs."""
    rig.read(0, 1)
    fetches = [Fetch(ExpertKey(0, e), 2 + e, None, host=e, read=False) for e in (0, 1)]
    rig.engine.stream([Wave(((fetch.key.expert, fetch.slot),), (fetch,)) for fetch in fetches])
    assert rig.threads == [threading.current_thread()] * 2
    rig.use((0, 2))
    rig.use((1, 3))


@pytest.mark.parametrize("pins", [10**9, 0])
def test_prefetches_are_left_to_readers(rig: Rig) -> None:
    rig.read(0)
    rig.engine.prefetch([Fetch(ExpertKey(0, 0), 3, None, host=0, read=False)])
    rig.use((0, 3))
    assert threading.current_thread() not in rig.threads


@pytest.mark.parametrize("pins", [0])
def test_pageable_copies_are_left_to_readers(rig: Rig) -> None:
    rig.read(0)
    rig.fetch((0, 3))
    rig.use((0, 3))
    assert threading.current_thread() not in rig.threads


def test_a_failed_copy_is_raised_where_it_is_needed(rig: Rig) -> None:
    rig.read(0, 1)
    rig.fail = RuntimeError("out of memory")
    rig.fetch((0, 2))
    with pytest.raises(TransferError, match=r"expert 0 of MoE layer 0.*out of memory"):
        rig.engine.ready(2)
    rig.fail = None
    rig.engine.forget()
    rig.read(1)
    rig.fetch((1, 2))
    rig.use((1, 2))


def test_a_prefetch_that_nothing_used_gives_its_slot_up(rig: Rig) -> None:
    """Its copy is on the same stream, so what is fetched there next lands behind it."""
    rig.read(0, 1)
    rig.engine.prefetch([Fetch(ExpertKey(0, 0), 3, None, host=0, read=False)])
    wait_until(lambda: rig.engine._tickets[3].issued.is_set())
    rig.threads.clear()
    rig.fetch((1, 3))
    assert rig.threads == [threading.current_thread()]
    rig.use((1, 3))


def test_a_ram_slot_whose_copy_failed_is_no_trouble_for_another(rig: Rig) -> None:
    rig.read(0, 1)
    rig.fail = RuntimeError("out of memory")
    rig.fetch((0, 2))
    rig.fail = None
    rig.fetch((1, 3))
    rig.use((1, 3))
    with pytest.raises(TransferError, match=r"expert 0 of MoE layer 0.*out of memory"):
        rig.engine.settle()


def test_an_interrupt_leaves_nobody_waiting(rig: Rig) -> None:
    """The third fetch would wait in a reader until the second has been copied, which it never is."""
    rig.read(0, 1)
    rig.fail = KeyboardInterrupt()
    fetches: list[Any] = [Fetch(ExpertKey(0, e), 2 + e, None, host=e, read=False) for e in (0, 1)]
    with pytest.raises(KeyboardInterrupt):
        rig.engine.fetch([*fetches, Fetch(ExpertKey(0, 2), 0, None, host=0)])
    rig.fail = None
    rig.engine.forget()
    rig.read(3)
    rig.fetch((3, 0))
    rig.use((3, 0))
