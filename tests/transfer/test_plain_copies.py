"""The plain copies of an expert: as few as its bytes allow, and into the right places."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef

from offmoe.device.arena import SlotArena
from offmoe.device.backend import CpuBackend
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import Assembly, Destination, ExpertLayout, ExpertRecord
from offmoe.storage.store import ExpertStore
from offmoe.transfer.plain_copies import CopyTable
from offmoe.transfer.slot_writer import SlotWriter
from offmoe.types import ExpertKey, Fetch
from tests.doubles import Layer

ROWS, COLUMNS, EXPERTS = 64, 32, 3
NAMES = ("a.gate", "b.up", "c.down")
"""In the order in which safetensors writes an expert's tensors."""


class Table:
    """A table over slots of 64 x 32 floats per tensor, and the experts' bytes in RAM."""

    def __init__(self, folder: Path, assembly: Assembly, layout: ExpertLayout, names: tuple[str, ...] = NAMES) -> None:
        self.values = {
            f"{e}.{name}": torch.full((ROWS, COLUMNS), float(10 * e + i))
            for e in range(EXPERTS)
            for i, name in enumerate(NAMES)
        }
        save_file(self.values, folder / "model.safetensors")
        checkpoint = Checkpoint.open(folder)
        keys = [ExpertKey(0, e) for e in range(EXPERTS)]
        segments = {key: tuple(checkpoint.segment(f"{key.expert}.{name}") for name in names) for key in keys}
        self.store = ExpertStore(checkpoint.shards, {key: ExpertRecord(segments[key]) for key in keys})
        backend = CpuBackend()
        self.arena, self.layout = SlotArena(backend.allocate, [layout] * 2), layout
        self.table = CopyTable(SlotWriter(self.store, self.arena, backend, [Layer(layout, assembly)]))
        self.ram = [backend.allocate(self.store.buffer_bytes) for _ in range(2)]

    def copy(self, expert: int, slot: int, host: int = 0) -> int:
        """Copy an expert from RAM into a slot; gives the number of copies."""
        key = ExpertKey(0, expert)
        self.store.read_into(key, memoryview(self.ram[host].numpy()))  # type: ignore[arg-type]
        self.arena.bytes(slot).fill_(0xFF)
        pairs = self.table.pairs(Fetch(key, slot, None, host=host, read=False), self.ram[host])
        assert pairs is not None
        count = 0
        for into, data in pairs:
            into.copy_(data)
            count += 1
        return count


def stacked(order: tuple[str, str]) -> tuple[Assembly, ExpertLayout]:
    """Gate and up in one parameter, in this order, and down in another."""
    at = {name: Destination("gate_up", 0, ROWS * i) for i, name in enumerate(order)}
    assembly = Assembly((at["gate"], at["up"], Destination("down", 0, 0)))
    shapes = {"gate_up": (torch.float32, (2 * ROWS, COLUMNS)), "down": (torch.float32, (ROWS, COLUMNS))}
    return assembly, ExpertLayout.of(shapes)


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Table]:
    table = Table(tmp_path, *stacked(("gate", "up")))
    yield table
    table.store.close()


def test_neighbors_in_both_places_are_one_copy(whole: Table) -> None:
    """Gate, up and down follow each other in the file and in the slot: one copy in place of three."""
    for expert, slot in ((0, 0), (1, 1), (2, 0), (0, 0)):
        assert whole.copy(expert, slot) == 1
        views = whole.arena.views(slot, whole.layout)
        wanted = [whole.values[f"{expert}.{name}"] for name in NAMES]
        assert torch.equal(views["gate_up"], torch.cat(wanted[:2]))
        assert torch.equal(views["down"], wanted[2])


def test_neighbors_in_one_place_are_copies_of_their_own(tmp_path: Path) -> None:
    """Up stands before gate in the slot, so only what follows gate there could be joined, and it is not up."""
    table = Table(tmp_path, *stacked(("up", "gate")))
    assert table.copy(1, 0) == 3
    views = table.arena.views(0, table.layout)
    assert torch.equal(views["gate_up"], torch.cat([table.values["1.b.up"], table.values["1.a.gate"]]))
    assert torch.equal(views["down"], table.values["1.c.down"])
    table.store.close()


def test_a_ram_slot_and_a_slot_may_change_their_experts(whole: Table) -> None:
    for expert, slot, host in ((0, 0, 0), (1, 0, 1), (2, 1, 0), (1, 1, 0), (0, 0, 1)):
        whole.copy(expert, slot, host)
        assert torch.equal(whole.arena.views(slot, whole.layout)["down"], whole.values[f"{expert}.c.down"])


def test_values_that_move_apart_need_more_than_plain_copies(tmp_path: Path) -> None:
    """Gate and up take turns in the slot."""
    turns = [Destination("gate_up", 0, i, step=2) for i in range(2)]
    _, layout = stacked(("gate", "up"))
    table = Table(tmp_path, Assembly((*turns, Destination("down", 0, 0))), layout)
    fetch = Fetch(ExpertKey(0, 0), 0, None, host=0, read=False)
    assert table.table.segments(fetch) is None
    assert table.table.pairs(fetch, table.ram[0]) is None
    table.store.close()


def test_segments_are_as_stored(whole: Table) -> None:
    segments = whole.table.segments(Fetch(ExpertKey(0, 1), 1, None))
    assert segments is not None
    nbytes = 4 * ROWS * COLUMNS
    assert [segment.offset for segment in segments] == [0, nbytes, 2 * nbytes]
    assert [segment.place for segment in segments] == [place for place, _ in whole.store.places(ExpertKey(0, 1))]


def test_memory_can_be_given_back(whole: Table) -> None:
    whole.copy(0, 0)
    gone = [StorageWeakRef(whole.ram.pop(0).untyped_storage()), StorageWeakRef(whole.arena.memory.untyped_storage())]
    whole.arena.close()
    assert not any(memory.expired() for memory in gone)
    whole.table.forget_memory()
    whole.table._writer.release()
    assert all(memory.expired() for memory in gone)
