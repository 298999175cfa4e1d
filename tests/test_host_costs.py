"""What the host does for one layer of one token, counted in calls: a loaded machine counts like an idle one.

Bounds lie a fifth above what was counted with Python 3.11. tools/bench/host_decode.py measures the times.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from offmoe.compute.kernels.device import available
from offmoe.types import ExpertKey, Fetch
from tests.doubles import wait_until
from tests.parts import EXPERTS, HIDDEN, TOP_K, Parts


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Callable[..., Parts]]:
    built: list[Parts] = []

    def build(**numbers: int) -> Parts:
        folder = tmp_path / str(len(built))
        folder.mkdir()
        built.append(Parts(folder, **numbers))
        return built[-1]

    yield build
    for each in built:
        each.close()


def calls(do: Callable[[], object]) -> int:
    """Calls of Python and C functions that the calling thread makes in do()."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # what is collected meanwhile is none of do's
    sys.setprofile(note)
    try:
        do()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.skipif(not available(), reason="no Triton")
def test_a_layer_whose_experts_are_resident(parts: Callable[..., Parts]) -> None:
    rig = parts()
    executor, layer = rig.executor(), rig.layers[0]
    every = torch.arange(EXPERTS).view(-1, TOP_K)
    hidden, ids = torch.rand(1, HIDDEN).bfloat16(), torch.tensor([[3, 9, 0, 12, 5, 7, 1, 15]])
    executor.run(layer, torch.rand(len(every), HIDDEN).bfloat16(), every)
    executor.run(layer, hidden, ids)
    assert calls(lambda: executor.run(layer, hidden, ids)) <= 100
    assert (rig.stats.misses, rig.stats.hits) == (EXPERTS, 2 * TOP_K)


@pytest.mark.parametrize(("experts", "most"), [(1, 50), (8, 360)])
def test_asking_for_experts_in_pinned_ram(parts: Callable[..., Parts], experts: int, most: int) -> None:
    rig = parts(host_slots=EXPERTS)
    wait_until(lambda: not rig.engine.host.pin_progress.running)
    asked = range(experts)

    def fetch(read: bool) -> None:
        rig.engine.fetch([Fetch(ExpertKey(0, e), e, None, host=e, read=read) for e in asked])

    for read in (True, False):
        fetch(read)
        rig.engine.ready(*asked)
        rig.engine.computed(asked)
    assert calls(lambda: fetch(False)) <= most
    rig.engine.ready(*asked)


def test_planning_many_slots(parts: Callable[..., Parts]) -> None:
    """14 calls per slot took 0.13 s for 24,576 slots, most of it for a tensor, two events and a key of each."""
    few, many = calls(lambda: parts(layers=4)), calls(lambda: parts(layers=36))
    assert (many - few) / (32 * EXPERTS) <= 10
