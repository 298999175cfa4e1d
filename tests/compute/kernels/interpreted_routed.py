"""Layers that need no host, in Triton's interpreter: against the planner, and against plain Python.

test_triton.py runs this file in a process of its own with TRITON_INTERPRET=1, which has to be set before Triton is
imported.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.routed import NOWHERE, RoutedLayer, RoutingLog, Verdict
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


def log_of(pairs: int, entries: int = 4) -> RoutingLog:
    return RoutingLog(torch.zeros(entries, 3 + pairs, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))


def layer_of(
    experts: int, top_k: int, rows: int = 1, log: RoutingLog | None = None, memory: torch.Tensor | None = None
) -> RoutedLayer:
    memory = torch.zeros(256, dtype=torch.uint8) if memory is None else memory
    layer = RoutedLayer(5, experts, top_k, 2 * top_k, rows, memory, log or log_of(rows * top_k), full_grid=1)
    layer.sources.fill_(IN_RAM)
    return layer


def leave(layer: RoutedLayer, planner: Planner) -> None:
    """As the host leaves it: the slots that the planner names, and who holds them."""
    layer.leave([(p.slot * PARAM_ALIGNMENT, NOWHERE if p.key is None else p.key) for p in planner.next_places(0)])


def snapshot(layer: RoutedLayer) -> list[list[int]]:
    return [layer.places.tolist(), layer.named.tolist()]


def assert_follows(ids: np.ndarray, experts: int, eviction: str, slots: int) -> tuple[int, int]:
    """The device and the planner see the same accesses, and do the same. ids [steps, rows, top_k] of one layer.

    Returns:
        (misses that the device placed, accesses that it left to the host).
    """
    rows, top_k = ids.shape[1:]
    options = CacheOptions(eviction, slots_per_layer=slots, lag=1)
    planner = build_planner(options, CacheShape((experts,), (top_k,), (1,)))
    log = log_of(rows * top_k)
    layer = layer_of(experts, top_k, rows, log)
    placed = refused = 0
    for step in ids:
        leave(layer, planner)
        before = snapshot(layer)
        layer.assign(torch.from_numpy(step))
        named = len(planner.next_places(0))
        plan = planner.plan(Access(0, *count_demands(step, experts)))
        (entry,) = log.read()
        assert (entry.layer, entry.misses) == (5, plan.misses)
        assert entry.ids.tolist() == np.where((step >= 0) & (step < experts), step, -1).ravel().tolist()
        moves = sorted((fetch.key.expert, fetch.slot) for wave in plan.waves for fetch in wave.fetches)
        if entry.verdict is Verdict.ASSIGNED:
            assert layer.moves[: int(layer.count)].tolist() == [list(move) for move in moves]
            placed += plan.misses
        else:
            assert entry.verdict is Verdict.TOO_FEW_VICTIMS
            assert rows > 1
            assert named
            assert snapshot(layer) == before
            assert int(layer.count) == 0
            refused += 1
            slot_of = planner.layers[0].residency.slot_of  # the host has placed them
            layer.places.copy_(torch.tensor([slot_of.get(key, NOWHERE) for key in range(experts)], dtype=torch.int32))
        held = planner.layers[0].residency.slot_of
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
    log = log_of(2)
    layer = layer_of(6, 2, log=log)
    layer.leave([(0, NOWHERE), (256, NOWHERE), (512, NOWHERE), (768, NOWHERE)])
    layer.sources[4] = 0
    before = snapshot(layer)
    layer.assign(torch.tensor([[1, 4]]))
    assert [entry.verdict for entry in log.read()] == [Verdict.NOT_IN_RAM]
    assert snapshot(layer) == before
    assert int(layer.count) == 0
    layer.assign(torch.tensor([[1, 3]]))
    assert [entry.verdict for entry in log.read()] == [Verdict.ASSIGNED]
    assert layer.moves.tolist() == [[1, 0], [3, 1]]


def test_a_log_that_the_host_does_not_read_assigns_nothing() -> None:
    log = log_of(2, entries=2)
    layer = layer_of(6, 2, log=log)
    layer.leave([(256 * i, NOWHERE) for i in range(4)])
    for _ in range(2):
        layer.assign(torch.tensor([[0, 1]]))
    before, ring = snapshot(layer), log.ring.clone()
    layer.assign(torch.tensor([[2, 3]]))
    assert snapshot(layer) == before
    assert torch.equal(log.ring, ring)
    assert int(layer.count) == 0
    assert [entry.ids.tolist() for entry in log.read()] == [[0, 1]] * 2
    layer.leave([(512, NOWHERE), (768, NOWHERE)])
    layer.assign(torch.tensor([[2, 3]]))
    assert [entry.ids.tolist() for entry in log.read()] == [[2, 3]]
    assert layer.places.tolist() == [0, 1, 2, 3, NOWHERE, NOWHERE]


def test_a_damaged_log_is_an_error() -> None:
    log = log_of(2)
    log.progress[0] = 1
    log.ring[0, 1] = 77
    with pytest.raises(OffmoeError, match="log is damaged: verdict 77"):
        list(log.read())


def test_missed_experts_are_copied_piece_by_piece() -> None:
    """Pieces of one word and of more than the programs take at a time; nothing else of a slot changes."""
    words = (1, 40_000, 7)
    chance = random.Random(0)
    stored = [torch.randint(0, 255, (4 * sum(words) + 24,), dtype=torch.uint8) for _ in range(4)]
    step = PARAM_ALIGNMENT * 700
    whole = torch.full((5 * step,), 7, dtype=torch.uint8)
    memory = whole[-whole.data_ptr() % PARAM_ALIGNMENT :]
    layer = layer_of(4, 2, memory=memory)
    layer.sources.copy_(torch.tensor([each.data_ptr() for each in stored]))
    layer.leave([(step, NOWHERE), (3 * step, NOWHERE), (2 * step, NOWHERE), (0, NOWHERE)])
    layer.assign(torch.tensor([[3, 1]]))
    from_, to, pieces = 0, 0, []
    for count in words:
        pieces.append((from_, to, count))
        from_, to = from_ + 4 * count + 4 * chance.randrange(3), to + 4 * count + 256
    layer.gather(torch.tensor(pieces))
    expected = torch.full_like(memory, 7)
    for expert, slot in ((1, 1), (3, 3)):
        for start, at, count in pieces:
            expected[slot * step + at :][: 4 * count] = stored[expert][start:][: 4 * count]
    assert torch.equal(memory, expected)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["bf16", "int4-g32", "mxfp4"])
def test_rows_are_weighted_and_added_up(name: str, rows: int) -> None:
    hidden, inner, top_k = 96, 64, 2
    form = FORMATS[name](hidden, inner)
    slots = fill_slots(form, 4)
    layer = layer_of(6, top_k, rows, memory=slots.memory)
    slot_of = {5: 0, 0: 2, 3: 1, 1: 3}
    for expert, slot in slot_of.items():
        layer.places[expert] = slots.starts[slot] // PARAM_ALIGNMENT
    ids = torch.tensor([[5, 0], [3, 5], [0, 1]])[:rows]
    x, weights = torch.randn(rows, hidden), torch.rand(rows, top_k)
    got = layer.compute(form.operands, Glu(), x, ids, weights)
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
    layer = layer_of(4, 2, rows=4, memory=slots.memory)
    layer.places[1] = slots.starts[0] // PARAM_ALIGNMENT
    x, weights = torch.randn(4, 64), torch.ones(4, 2)
    ids = torch.tensor([[1, 4], [1, -1], [1, 2], [2**40, 4]])
    got = layer.compute(form.operands, Glu(), x, ids, weights)
    right = slots.experts[0](x, Glu())
    assert ((got[:2] - right[:2]).norm() / right[:2].norm()).item() < 1e-5
    assert torch.isnan(got[2]).all()
    assert torch.equal(got[3], torch.zeros(64))
