"""A token whose experts are all hits takes one call of the compute; everything else goes wave by wave."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from offmoe.compute.compute import ExpertCompute, LayerInput, Slotted
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.transfer.engine import TransferEngine
from tests.parts import EXPERTS, HIDDEN, TOP_K, Parts

EVERY = torch.arange(EXPERTS).view(-1, TOP_K)
ROUTED = [3, 9, 0, 12, 5, 7, 1, 15]


class Noted(ExpertCompute):
    """A row is filled with the number of its slot. calls: of either kind, with the slots."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []
        self.has_token = True

    def expert(self, layer: ExpertLayer, slot: int, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, slot)

    def wave(
        self, layer: ExpertLayer, experts: Sequence[Slotted], inputs: LayerInput, transfer: TransferEngine
    ) -> Iterator[tuple[Sequence[Slotted], torch.Tensor]]:
        self.calls.append(("wave", [slot for _, slot in experts]))
        yield from super().wave(layer, experts, inputs, transfer)

    def token(self, layer: ExpertLayer, slots: Sequence[int], hidden: torch.Tensor) -> torch.Tensor | None:
        if not self.has_token:
            return None
        self.calls.append(("token", list(slots)))
        return torch.tensor(slots).to(hidden.dtype)[:, None].expand(-1, hidden.shape[1])

    def slots_moved(self) -> None: ...

    def close(self) -> None: ...


class Rig:
    def __init__(self, folder: Path) -> None:
        self.parts, self.compute = Parts(folder), Noted()
        self.executor = self.parts.executor(self.compute)

    def run(self, ids: list[list[int]]) -> torch.Tensor:
        rows = torch.rand(len(ids), HIDDEN).bfloat16()
        return self.executor.run(self.parts.layers[0], rows, torch.tensor(ids))

    def slots(self, experts: Sequence[int]) -> list[int]:
        slot_of = self.executor.planner.layers[0].residency.slot_of
        return [slot_of[expert] for expert in experts]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.parts.close()


def test_hits_of_a_token_are_one_call_in_router_order(rig: Rig) -> None:
    rig.run(EVERY.tolist())
    rig.compute.calls.clear()
    rows = rig.run([ROUTED])
    assert rig.compute.calls == [("token", rig.slots(ROUTED))]
    assert rows[:, 0].tolist() == rig.slots(ROUTED)
    rig.compute.has_token = False
    assert torch.equal(rig.run([ROUTED]), rows)
    assert rig.compute.calls[1:] == [("wave", rig.slots(sorted(ROUTED)))]
    assert (rig.parts.stats.hits, rig.parts.stats.misses) == (2 * TOP_K, EXPERTS)


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([[*ROUTED[:7], -1]], id="an id of no expert"),
        pytest.param([[*ROUTED[:7], ROUTED[0]]], id="an expert twice"),
        pytest.param([[3], [9]], id="as many hits as ids of two tokens"),
        pytest.param([ROUTED, ROUTED], id="two tokens"),
    ],
)
def test_everything_else_goes_by_waves(rig: Rig, ids: Any) -> None:
    rig.run(EVERY.tolist())
    rig.compute.calls.clear()
    rows = rig.run(ids)
    assert [kind for kind, _ in rig.compute.calls] == ["wave"]
    flat = [expert for row in ids for expert in row]
    assert rows[:, 0].tolist() == [0 if expert < 0 else rig.slots([expert])[0] for expert in flat]


def test_misses_go_by_waves(rig: Rig) -> None:
    rig.run([ROUTED])
    assert [kind for kind, _ in rig.compute.calls] == ["wave"]


def test_a_hit_that_the_background_fill_still_copies_is_waited_for(rig: Rig) -> None:
    """Its access counts it as resident; its slot is not ready."""
    rig.run([ROUTED])
    read, may_read = rig.parts.store.read_planned, threading.Event()

    def held(*arguments: Any) -> None:
        assert may_read.wait(20)
        read(*arguments)

    rig.parts.store.read_planned = held  # type: ignore[assignment, method-assign]
    missing = next(expert for expert in range(EXPERTS) if expert not in ROUTED)
    shape = rig.parts.planner.shape
    rig.executor.fill([shape.expert(missing)])
    rig.compute.calls.clear()
    timer = threading.Timer(0.2, may_read.set)
    timer.start()
    rows = rig.run([[*ROUTED[:7], missing]])
    timer.join()
    assert [kind for kind, _ in rig.compute.calls] == ["wave"]
    assert rows[7, 0].item() == rig.slots([missing])[0]
