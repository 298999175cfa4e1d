"""Layers that need no host, in Triton's interpreter: against the planner, and against plain Python.

test_triton.py runs this file in a process of its own with TRITON_INTERPRET=1, which has to be set before Triton is
imported.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.operands import GatedOperands
from offmoe.compute.kernels.routed import NOWHERE, LayerSizes, RoutedLayer, RoutedState
from offmoe.compute.kernels.routing_log import Verdict
from offmoe.config import CacheOptions
from offmoe.errors import OffmoeError
from offmoe.policy.planner import Planner, build_planner
from offmoe.storage.layout import PARAM_ALIGNMENT
from offmoe.trace.trace import read_trace
from offmoe.types import Access, CacheShape, count_demands
from tests.device_cases import FORMATS, fill_slots, interpret_quickly

DATA = Path(__file__).parents[2] / "data" / "gptoss20b_6req.npz"
IN_RAM = 8
"""An address, where nothing is read from it."""


@pytest.fixture(scope="module", autouse=True)
def _quickly() -> None:
    interpret_quickly()


def mapped(nbytes: int) -> torch.Tensor:
    """Memory that this device and the host share."""
    return torch.empty(nbytes, dtype=torch.uint8)


def layer_of(
    experts: int,
    top_k: int,
    rows: int = 1,
    memory: torch.Tensor | None = None,
    operands: GatedOperands | None = None,
    pieces: int = 1,
    entries: int = 4,
    spins: int = 3,
) -> RoutedLayer:
    """Layer 0 of a model, without a slot, with all experts in RAM."""
    memory = torch.zeros(256, dtype=torch.uint8) if memory is None else memory
    operands = operands or FORMATS["bf16"](64, 64).operands
    state = RoutedState([LayerSizes(experts, top_k, 2 * top_k, pieces)], rows, memory.device, mapped, entries)
    layer = RoutedLayer(0, state, memory, operands, Glu(), full_grid=1, spins=spins)
    layer.reset({})
    for expert in range(experts):
        layer.hold(expert, [(IN_RAM, 0, 1)] * pieces)
    return layer


def leave(layer: RoutedLayer, planner: Planner) -> None:
    """As the host leaves it: the slots that the planner names, and who holds them."""
    layer.leave([(place.slot, NOWHERE if place.key is None else place.key) for place in planner.next_places(0)])


def snapshot(layer: RoutedLayer) -> list[list[int]]:
    return [layer.places.tolist(), layer.named.tolist()]


def answer(layer: RoutedLayer, places: dict[int, int]) -> None:
    """Answer the next access before it asks: the interpreter runs a kernel to its end."""
    layer.settle(places)


def assert_follows(ids: np.ndarray, experts: int, eviction: str, slots: int) -> tuple[int, int]:
    """The device and the planner see the same accesses, and do the same. ids [steps, rows, top_k] of one layer.

    Returns:
        (misses that the device placed, accesses that it left to the host).
    """
    rows, top_k = ids.shape[1:]
    options = CacheOptions(eviction, slots_per_layer=slots, lag=1)
    planner = build_planner(options, CacheShape((experts,), (top_k,), (1,)))
    layer = layer_of(experts, top_k, rows)
    placed = refused = 0
    for step in ids:
        leave(layer, planner)
        named = len(planner.next_places(0))
        plan = planner.plan(Access(0, *count_demands(step, experts)))
        held = planner.layers[0].residency.slot_of
        answer(layer, held)
        layer.assign(torch.from_numpy(step))
        (entry,) = layer.log.read()
        layer.number += 1
        assert (entry.layer, entry.misses) == (0, plan.misses)
        assert entry.ids == np.where((step >= 0) & (step < experts), step, -1).ravel().tolist()
        moves = sorted((fetch.key.expert, fetch.slot) for wave in plan.waves for fetch in wave.fetches)
        if entry.verdict is Verdict.ASSIGNED:
            assert layer.moves[: int(layer.count)].tolist() == [list(move) for move in moves]
            placed += plan.misses
        else:
            assert entry.verdict is Verdict.TOO_FEW_VICTIMS
            assert rows > 1
            assert named
            assert int(layer.count) == 0
            refused += 1
        assert layer.places.tolist() == [held.get(key, NOWHERE) for key in range(experts)]
    return placed, refused


def random_ids(steps: int, rows: int, top_k: int, experts: int, padded: bool = False) -> np.ndarray:
    chance = np.random.default_rng(0)
    ids = chance.permuted(np.tile(np.arange(experts), (steps, rows, 1)), axis=2)[..., :top_k].astype(np.int64)
    if padded:
        strange = chance.choice([-1, -7, experts, 2**40 + 3], size=ids.shape)
        ids = np.where(chance.random(ids.shape) < 0.2, strange, ids)
    return ids


@pytest.mark.parametrize("eviction", ["aged-lfu", "lru", "s3-fifo", "sieve"])
def test_recorded_routing_is_placed_as_the_planner_places_it(eviction: str) -> None:
    ids = read_trace(DATA).experts[:40, 3, None].astype(np.int64)  # [40, 1, 4]
    placed, refused = assert_follows(ids, 32, eviction, slots=10)
    assert placed > 40
    assert refused == 0


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_random_routing_is_placed_as_the_planner_places_it(rows: int, padded: bool) -> None:
    placed, refused = assert_follows(random_ids(25, rows, 3, 23, padded), 23, "lru", slots=9)
    assert placed > 30
    assert (refused > 0) == (rows > 1)


def test_what_is_not_in_ram_is_left_to_the_host() -> None:
    layer = layer_of(6, 2)
    layer.leave([(0, NOWHERE), (1, NOWHERE), (2, NOWHERE), (3, NOWHERE)])
    layer.hold(4, ())
    answer(layer, {1: 2, 4: 0})
    layer.assign(torch.tensor([[1, 4]]))
    assert [entry.verdict for entry in layer.log.read()] == [Verdict.NOT_IN_RAM]
    assert layer.places.tolist() == [NOWHERE, 2, NOWHERE, NOWHERE, 0, NOWHERE]
    assert int(layer.count) == 0
    layer.number = 1
    layer.leave([(3, NOWHERE), (0, 4)])
    layer.assign(torch.tensor([[1, 3]]))
    assert [entry.verdict for entry in layer.log.read()] == [Verdict.ASSIGNED]
    assert layer.moves[:1].tolist() == [[3, 3]]


def aborted(layer: RoutedLayer, ids: list[int]) -> tuple[int, int]:
    """(whether the device has given up, experts that it moved) of an access that nobody answers."""
    before = snapshot(layer)
    layer.assign(torch.tensor([ids]))
    assert snapshot(layer) == before
    return int(layer.aborted), int(layer.count)


def test_a_host_that_does_not_answer_is_aborted() -> None:
    """The expert is not in RAM."""
    layer = layer_of(6, 2)
    layer.leave([(i, NOWHERE) for i in range(4)])
    layer.hold(4, ())
    assert aborted(layer, [1, 4]) == (1, 0)


def test_a_list_that_is_late_is_aborted() -> None:
    """Not if there are only hits, which need no list."""
    layer = layer_of(6, 2)
    layer.leave([(i, NOWHERE) for i in range(4)])
    layer.assign(torch.tensor([[0, 1]]))
    layer.assign(torch.tensor([[0, 1]]))
    assert [entry.verdict for entry in layer.log.read()] == [Verdict.ASSIGNED] * 2
    assert aborted(layer, [0, 2]) == (1, 0)
    assert not list(layer.log.read())


def test_a_log_that_the_host_does_not_read_is_aborted() -> None:
    layer = layer_of(6, 2, entries=2)
    layer.leave([(i, NOWHERE) for i in range(4)])
    for _ in range(2):
        layer.assign(torch.tensor([[0, 1]]))
    ring = layer.log.ring.clone()
    assert aborted(layer, [0, 1]) == (1, 0)
    assert torch.equal(layer.log.ring, ring)
    assert [entry.ids for entry in layer.log.read()] == [[0, 1]] * 2


@pytest.mark.parametrize("late", ["list", "answer", "room"])
def test_the_device_waits_for_the_host(late: str) -> None:
    """Another thread brings what the kernel waits for."""
    layer = layer_of(6, 2, entries=2, spins=1 << 20)
    names = [(i, NOWHERE) for i in range(4)]
    layer.leave(names)
    if late == "room":
        for _ in range(2):
            layer.assign(torch.tensor([[0, 1]]))
        layer.number = 2
        layer.leave(names)
        host = threading.Timer(0.2, lambda: next(layer.log.read()))
    elif late == "list":
        layer.assign(torch.tensor([[0, 1]]))
        layer.number = 1
        host = threading.Timer(0.2, layer.leave, (names[2:],))
    else:
        layer.hold(4, ())
        host = threading.Timer(0.2, layer.settle, ({4: 1, 3: 0},))
    host.start()
    layer.assign(torch.tensor([[3, 4]]))
    assert host.finished.is_set()
    host.join()
    assert not int(layer.aborted)
    assert [layer.places[expert] >= 0 for expert in (3, 4)] == [True, True]


def test_a_damaged_log_is_an_error() -> None:
    layer = layer_of(4, 2)
    layer.log.progress[0] = 1
    layer.log.ring[0, 1] = 77
    with pytest.raises(OffmoeError, match="log is damaged: layer 0, verdict 77"):
        list(layer.log.read())


def test_missed_experts_are_copied_piece_by_piece() -> None:
    """Pieces of one word and of more than the programs take at a time; nothing else of a slot changes."""
    words = (1, 40_000, 7)
    chance = random.Random(0)
    stored = [torch.randint(0, 255, (4 * sum(words) + 24,), dtype=torch.uint8) for _ in range(4)]
    step = PARAM_ALIGNMENT * 700
    whole = torch.full((5 * step,), 7, dtype=torch.uint8)
    memory = whole[-whole.data_ptr() % PARAM_ALIGNMENT :]
    layer = layer_of(4, 2, memory=memory, pieces=len(words))
    pieces: dict[int, list[tuple[int, int, int]]] = {expert: [] for expert in range(4)}
    for expert in pieces:  # experts stand differently in RAM
        from_ = to = 0
        for count in words:
            pieces[expert].append((from_, to, count))
            from_, to = from_ + 4 * count + 4 * chance.randrange(3), to + 4 * count + 256
        layer.hold(expert, [(stored[expert].data_ptr() + start, at, count) for start, at, count in pieces[expert]])
    places = [slot * step // PARAM_ALIGNMENT for slot in (1, 3, 2, 0)]
    layer.leave([(place, NOWHERE) for place in places])
    layer.assign(torch.tensor([[3, 1]]))
    layer.gather()
    expected = torch.full_like(memory, 7)
    for expert, slot in ((1, 1), (3, 3)):
        for start, at, count in pieces[expert]:
            expected[slot * step + at :][: 4 * count] = stored[expert][start:][: 4 * count]
    assert torch.equal(memory, expected)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["bf16", "int4-g32", "mxfp4"])
def test_rows_are_weighted_and_added_up(name: str, rows: int) -> None:
    hidden, inner, top_k = 96, 64, 2
    form = FORMATS[name](hidden, inner)
    slots = fill_slots(form, 4)
    layer = layer_of(6, top_k, rows, memory=slots.memory, operands=form.operands)
    slot_of = {5: 0, 0: 2, 3: 1, 1: 3}
    for expert, slot in slot_of.items():
        layer.places[expert] = slots.starts[slot] // PARAM_ALIGNMENT
    ids = torch.tensor([[5, 0], [3, 5], [0, 1]])[:rows]
    x, weights = torch.randn(rows, hidden), torch.rand(rows, top_k)
    got = layer.compute(x, ids, weights)
    for token in range(rows):
        parts = [
            weights[token, i] * slots.experts[slot_of[int(expert)]](x[token : token + 1], Glu())[0]
            for i, expert in enumerate(ids[token])
        ]
        right = torch.stack(parts).sum(0)
        assert ((got[token] - right).norm() / right.norm()).item() < 1e-5


def test_no_experts_add_nothing_and_experts_without_a_slot_are_no_number() -> None:
    form = FORMATS["bf16"](64, 64)
    slots = fill_slots(form, 2)
    layer = layer_of(4, 2, rows=4, memory=slots.memory, operands=form.operands)
    layer.places[1] = slots.starts[0] // PARAM_ALIGNMENT
    x, weights = torch.randn(4, 64), torch.ones(4, 2)
    ids = torch.tensor([[1, 4], [1, -1], [1, 2], [2**40, 4]])
    got = layer.compute(x, ids, weights)
    right = slots.experts[0](x, Glu())
    assert ((got[:2] - right[:2]).norm() / right[:2].norm()).item() < 1e-5
    assert torch.isnan(got[2]).all()
    assert torch.equal(got[3], torch.zeros(64))
