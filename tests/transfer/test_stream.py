"""The real engine carries out plans of the real planner for random accesses: every use must see its own expert."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

import offmoe.transfer.staging as staging_module
from offmoe.config import CacheOptions
from offmoe.device.arena import SlotArena
from offmoe.device.backend import CpuBackend
from offmoe.errors import TransferError
from offmoe.policy.planner import build_planner
from offmoe.profile import MissCosts
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import Assembly, Destination, ExpertLayout, ExpertRecord
from offmoe.storage.store import ExpertStore, positional_read
from offmoe.transfer.engine import TransferEngine
from offmoe.transfer.slot_writer import SlotWriter
from offmoe.transfer.waits import WAITS
from offmoe.types import Access, CacheShape, CacheStats, Demand, ExpertKey, Fetch
from tests.doubles import DeferredBackend, Layer, without
from tests.policy.invariants import check_planner

LAYERS, EXPERTS, VALUES = 3, 12, 700
SHAPE = CacheShape((EXPERTS,) * LAYERS, (2,) * LAYERS, (VALUES * 4,) * LAYERS)
LAYOUT = ExpertLayout.of({"weight": (torch.float32, (VALUES,))})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    save_file(
        {f"{k}.{e}": torch.full((VALUES,), 100.0 * k + e) for k in range(LAYERS) for e in range(EXPERTS)},
        folder / "model.safetensors",
    )
    return Checkpoint.open(folder)


class Rig:
    """Planner and engine of three layers. `run` counts the uses that saw another expert than theirs."""

    def __init__(self, checkpoint, backend, options, read_at=None, pins=0, waits=WAITS):
        keys = [ExpertKey(k, e) for k in range(LAYERS) for e in range(EXPERTS)]
        records = {key: ExpertRecord((checkpoint.segment(f"{key.layer}.{key.expert}"),)) for key in keys}
        self.backend = backend
        self.planner = build_planner(options, SHAPE)
        self.store = ExpertStore(checkpoint.shards, records, read_at=read_at)
        scratch = [LAYOUT] * self.planner.num_scratch
        if options.miss_costs is None:
            self.arena = SlotArena(backend.allocate, [LAYOUT] * self.planner.num_slots + scratch)
        else:
            self.arena = SlotArena(backend.allocate, [LAYOUT] * self.planner.num_slots, in_ram=scratch)
        left = [True] * pins
        backend.pin = lambda *_: left.pop() if left else False
        layer = Layer(LAYOUT, Assembly((Destination("weight", 0, 0),)))
        writer = SlotWriter(self.store, self.arena, backend, [layer] * LAYERS)
        self.engine = TransferEngine(writer, host_slots=self.planner.num_host_slots, waits=waits)
        if isinstance(backend, DeferredBackend):
            backend.guard(writer)
        self.stats = CacheStats.for_layers(LAYERS)

    def run(self, access):
        plan = self.planner.plan(access)
        self.stats.add(plan, SHAPE)
        self.engine.demand([slot for _, slot in plan.waves[0].experts])
        self.engine.stream(plan.on_host)
        self.engine.stream(plan.waves)
        self.engine.read_ahead(plan.read_ahead)
        wrong = 0
        for wave in plan.waves[:1] + plan.on_host + plan.waves[1:]:
            for expert, slot in wave.experts:
                self.engine.ready(slot)
                seen = self.arena.views(slot, LAYOUT)["weight"]
                wrong += not bool((seen == 100.0 * access.layer + expert).all())
                self.engine.computed([slot])
        self.engine.prefetch(plan.prefetches)
        return wrong

    def close(self):
        self.engine.close()
        self.store.close()


def random_accesses(seed, steps):
    chance = random.Random(seed)
    for _ in range(steps):
        wide = chance.random() < 0.2
        for layer in range(LAYERS):
            experts = chance.sample(range(EXPERTS), chance.randint(5, EXPERTS) if wide else 2)
            ahead = tuple(chance.sample(range(EXPERTS), 4)) if layer + 1 < LAYERS else ()
            yield Access(layer, tuple(Demand(e, 1, 1) for e in sorted(experts)), 1, ahead)


def slow_at_random(seed):
    """Reads that take up to two milliseconds longer, at random."""
    chance, read = random.Random(seed), positional_read()

    def slow(descriptor, buffer, offset):
        time.sleep(chance.random() * 0.002)
        return read(descriptor, buffer, offset)

    return slow


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """Large experts pass through two staging buffers, of which read-aheads may hold one."""
    if request.param == "large":
        monkeypatch.setattr(staging_module, "FEW_BYTES", 0)


@pytest.mark.parametrize("backend", [DeferredBackend, CpuBackend])
@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("slots", [3, 4, 7])
def test_every_use_sees_its_expert(checkpoint, backend, scope, slots, size):
    rig = Rig(checkpoint, backend(), CacheOptions("lru", scope, slots, prefetch=3), slow_at_random(slots))
    try:
        wrong = sum(rig.run(access) for access in random_accesses(slots, 40))
        check_planner(rig.planner)
        assert wrong == 0
        assert rig.stats.prefetched_used
        assert rig.stats.misses > 100
    finally:
        rig.close()


@pytest.mark.parametrize("host_slots", [0, 5])
@pytest.mark.parametrize("miss_costs", [None, MissCosts(9, 5, 9, 12, 2, 1, 1)], ids=["same memory", "beside"])
@pytest.mark.parametrize("on_miss", ["cpu", "auto"])
def test_every_use_sees_its_expert_without_a_slot(checkpoint, on_miss, miss_costs, host_slots):
    options = CacheOptions("lru", "layer", 3, 2, host_slots=host_slots, on_miss=on_miss, miss_costs=miss_costs)
    rig = Rig(checkpoint, DeferredBackend(), options, slow_at_random(1), pins=99)
    try:
        wrong = sum(rig.run(access) for access in random_accesses(7, 40))
        check_planner(rig.planner)
        assert wrong == 0
        assert rig.stats.host_computed > 20
    finally:
        rig.close()


@pytest.mark.parametrize("pins", [0, 8, 99], ids=["pageable", "some pinned", "pinned"])
@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize(("slots", "host_slots"), [(3, 2), (4, 7), (3, (0, 3, 12))])
def test_every_use_sees_its_expert_through_ram(checkpoint, scope, slots, host_slots, pins, size):
    reads, slow = [], slow_at_random(slots)

    def counted(descriptor, buffer, offset):
        reads.append(offset)
        return slow(descriptor, buffer, offset)

    options = CacheOptions("aged-lfu", scope, slots, prefetch=2, host_slots=host_slots)
    rig = Rig(checkpoint, DeferredBackend(), options, counted, pins)
    try:
        wrong = sum(rig.run(access) for access in random_accesses(7, 50))
        check_planner(rig.planner)
        assert wrong == 0
        wasted = (rig.stats.prefetched - rig.stats.prefetched_used) * SHAPE.expert_bytes[0]
        assert 0 < rig.stats.disk_bytes < rig.stats.h2d_bytes + wasted
        rig.engine.forget()
        assert len(reads) <= rig.stats.disk_bytes // SHAPE.expert_bytes[0], "no more is read than the plans say"
    finally:
        rig.close()


@pytest.mark.parametrize("host_slots", [0, 5])
@pytest.mark.parametrize("miss_costs", [None, MissCosts(9, 5, 9, 12, 2, 1, 1)], ids=["same memory", "beside"])
@pytest.mark.parametrize("on_miss", ["fetch", "cpu", "auto"])
@pytest.mark.parametrize("slots", [(1, 1, 0), (0, 0, 3)])
def test_every_use_sees_its_expert_in_the_smallest_pool(checkpoint, slots, on_miss, miss_costs, host_slots, size):
    """Two or three slots for all layers: every access displaces what the one before it used."""
    options = CacheOptions("aged-lfu", "model", slots, 2, host_slots=host_slots, on_miss=on_miss, miss_costs=miss_costs)
    rig = Rig(checkpoint, DeferredBackend(), options, slow_at_random(2), pins=99)
    try:
        wrong = sum(rig.run(access) for access in random_accesses(3, 25))
        check_planner(rig.planner)
        assert wrong == 0
        assert rig.stats.misses > 100
    finally:
        rig.close()


def test_with_room_for_everything_in_ram_each_expert_is_read_once(checkpoint):
    rig = Rig(checkpoint, DeferredBackend(), CacheOptions("lru", slots_per_layer=3, host_slots=EXPERTS))
    try:
        wrong = sum(rig.run(access) for access in random_accesses(5, 60))
        assert wrong == 0
        assert rig.stats.disk_bytes == sum(SHAPE.expert_bytes) * EXPERTS
    finally:
        rig.close()


def test_a_failed_read_into_ram_is_raised_by_the_fetch_that_needs_it(checkpoint):
    def fails(descriptor, buffer, offset):
        raise OSError(5, "Input/output error")

    rig = Rig(checkpoint, DeferredBackend(), CacheOptions("lru", slots_per_layer=3, host_slots=EXPERTS), fails)
    try:
        rig.engine.prefetch([Fetch(ExpertKey(1, 4), 5, None, 3)])
        rig.engine.prefetch(
            [Fetch(ExpertKey(1, 2), 5, None, 2)]
        )  # supersedes the first fetch, whose error is not raised
        rig.engine.fetch([Fetch(ExpertKey(1, 4), 6, None, 3, read=False)])
        with pytest.raises(TransferError, match="expert 4 of MoE layer 1"):
            rig.engine.ready(6)
    finally:
        rig.close()


class Gate:
    """Reads that block until the test opens the gate."""

    def __init__(self):
        self.open, self.begun, self.read = threading.Event(), threading.Event(), positional_read()

    def __call__(self, *arguments):
        self.begun.set()
        assert self.open.wait(20)
        return self.read(*arguments)


def a_copy_of_what_is_being_read(checkpoint, waits):
    """Expert 4 is being read into RAM for a slot that is given away meanwhile, then copied to another."""
    gate = Gate()
    options = CacheOptions("lru", slots_per_layer=3, host_slots=EXPERTS)
    rig = Rig(checkpoint, CpuBackend(), options, gate, waits=waits)
    try:
        rig.engine.prefetch([Fetch(ExpertKey(0, 4), 0, None, 0)])
        assert gate.begun.wait(20)
        rig.engine._queue.running[0].landing = True  # from here on it cannot be dropped
        rig.engine.fetch([Fetch(ExpertKey(0, 4), 1, None, 0, read=False)])
        rig.engine._tickets[1].issued.wait(0.3)  # without the wait it is issued in this time
        gate.open.set()
        rig.engine.ready(1)
        return bool((rig.arena.views(1, LAYOUT)["weight"] == 4.0).all())
    finally:
        gate.open.set()
        rig.close()


def a_ram_slot_read_into_again(checkpoint, waits):
    """Expert 4 is still being copied out of the RAM slot that expert 11 is read into."""
    options = CacheOptions("lru", slots_per_layer=3, host_slots=EXPERTS)
    rig = Rig(checkpoint, DeferredBackend(), options, waits=waits)
    fetches = [Fetch(ExpertKey(0, 4), 1, None, 0), Fetch(ExpertKey(0, 11), 2, None, 0)]
    try:
        for fetch in fetches:
            rig.engine.fetch([fetch])
            assert rig.engine._tickets[fetch.slot].issued.wait(20)
        for fetch in fetches:
            rig.engine.ready(fetch.slot)
        seen = [rig.arena.views(fetch.slot, LAYOUT)["weight"] for fetch in fetches]
        return all(bool((s == float(f.key.expert)).all()) for s, f in zip(seen, fetches, strict=True))
    finally:
        rig.close()


@pytest.mark.parametrize(
    ("wait", "scene"),
    [("host_slot_issued", a_copy_of_what_is_being_read), ("host_slot_copied", a_ram_slot_read_into_again)],
)
def test_without_the_wait_weights_are_wrong(checkpoint, wait, scene):
    assert scene(checkpoint, WAITS)
    assert not scene(checkpoint, without(wait))


def test_a_read_that_lost_its_slot_still_fills_ram_or_gives_its_ram_slot_up(checkpoint):
    gate = Gate()
    options = CacheOptions("lru", slots_per_layer=3, host_slots=EXPERTS)
    rig = Rig(checkpoint, DeferredBackend(), options, gate)
    views = lambda slot: rig.arena.views(slot, LAYOUT)["weight"]  # noqa: E731
    try:
        rig.engine.prefetch([Fetch(ExpertKey(0, e), e, None, e) for e in range(5)])  # two are being read, three wait
        assert gate.begun.wait(20)
        rig.engine.fetch([Fetch(ExpertKey(0, 7), 3, None, 7), Fetch(ExpertKey(0, 8), 4, None, 8)])  # 3, 4 lose slots
        rig.engine.fetch([Fetch(ExpertKey(0, 3), 5, None, 3, read=False)])  # the plan counts on the expert in RAM
        rig.engine.fetch([Fetch(ExpertKey(0, 9), 6, None, 4)])  # takes over a RAM slot whose read has not begun
        gate.open.set()
        for expert, slot in ((7, 3), (8, 4), (3, 5), (9, 6)):
            rig.engine.ready(slot)
            assert bool((views(slot) == float(expert)).all())
    finally:
        gate.open.set()
        rig.close()
