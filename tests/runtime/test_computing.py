"""What computes from slots waits for each slot before it reads it, and gives every expert its own tokens."""

from __future__ import annotations

import torch

from offmoe.runtime.arena import SlotArena
from offmoe.runtime.backend import CpuBackend
from offmoe.runtime.computing import TorchCompute, Work
from offmoe.runtime.formats import ExpertLayout

LAYOUT = ExpertLayout.of({"w": (torch.float32, (1,))})


def scaled(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return x * weights["w"]


def test_an_expert_is_read_once_its_slot_is_ready() -> None:
    arena = SlotArena(CpuBackend().allocate, [LAYOUT] * 3)
    compute = TorchCompute(arena, [LAYOUT], [None])

    def ready(slot: int) -> None:
        arena.views(slot, LAYOUT)["w"].fill_(slot + 1.0)

    hidden = torch.tensor([[1.0], [10.0], [100.0]])
    pairs = {4: torch.tensor([0, 5]), 2: torch.tensor([3])}  # of [3 * 2]
    made = list(compute.wave(0, scaled, [(4, 2), (2, 0)], Work(hidden, pairs, 2), ready))
    assert made[0].tolist() == [[3.0], [300.0]]
    assert made[1].tolist() == [[10.0]]
    alone = list(compute.wave(0, scaled, [(4, 1)], Work(hidden[:1], None, 2), ready))
    assert alone[0].tolist() == [[2.0]]
