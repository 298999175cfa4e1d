"""The background fill races with random accesses: every use sees its own expert, and a replay counts the same."""

from __future__ import annotations

import errno
import os
import random
import threading
import time

import pytest

import offmoe.transfer.fill_queue as fill_queue
import offmoe.transfer.staging as staging_module
from offmoe.config import CacheOptions
from offmoe.device.backend import CpuBackend
from offmoe.errors import TransferError
from offmoe.policy.fill import plan_fills
from offmoe.policy.planner import build_planner
from offmoe.runtime.fill import BackgroundFill
from offmoe.simulate.fills import fill as fill_again
from offmoe.trace.fills import Fills
from offmoe.transfer.waits import Waits
from offmoe.types import Access, CacheStats, Demand, ExpertKey, Fetch, Fill
from tests.doubles import DeferredBackend
from tests.policy.invariants import check_planner
from tests.transfer.test_stream import EXPERTS, LAYERS, LAYOUT, SHAPE, Rig, checkpoint, random_accesses, slow_at_random

__all__ = ["checkpoint"]
ORDER = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
PATIENCE_S = 20


class FillingRig(Rig):
    """A rig whose free slots are filled in the background. It notes every fill that took effect."""

    def __init__(self, checkpoint, backend, options, *, order=ORDER, **kwargs):
        super().__init__(checkpoint, backend, options, **kwargs)
        self.fill = BackgroundFill(self.engine, order, self.stats)
        self.accesses = []
        self.rows = [], []
        self.fill.start(self.planner)

    def run(self, access):
        if not self.fill.is_over:
            settled = self.fill.settle(access.layer, access.demands)
            for rows, experts in zip(self.rows, settled, strict=True):
                rows += [(len(self.accesses), *expert) for expert in experts]
        self.accesses.append(access)
        wrong = super().run(access)
        check_planner(self.planner)
        return wrong

    def replayed(self):
        """The statistics of the same accesses and fills without any engine."""
        planner, stats = build_planner(self.planner.options, SHAPE), CacheStats.for_layers(LAYERS)
        fills = Fills.of(*self.rows)
        by_access = {} if fills is None else fills.by_access
        for i, access in enumerate(self.accesses):
            if i in by_access:
                fill_again(planner, by_access[i], stats)
            stats.add(planner.plan(access), SHAPE)
        return stats

    def filled_one(self):
        """Wait until an expert has landed, which the next access makes take effect."""
        return self._filled(lambda progress: progress.experts)

    def filled_all(self):
        """Wait until nothing is left to read."""
        return self._filled(lambda progress: not progress.running)

    def _filled(self, enough):
        until(lambda: enough(self.engine.fill_progress))
        return self.engine.fill_progress


def until(holds):
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def at_once(monkeypatch):
    """The fill reads as if the model were idle, so that it races with every access."""
    monkeypatch.setattr(fill_queue, "IDLE_AFTER_S", -1.0)


def single(layer, *experts):
    return Access(layer, tuple(Demand(e, 1, 1) for e in sorted(experts)), 1)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("size", ["windows", "one by one", "two buffers"])
@pytest.mark.parametrize(
    ("backend", "options", "pins"),
    [
        (CpuBackend, {"slots_per_layer": 6}, 0),
        (CpuBackend, {"slots_per_layer": 9, "scope": "model", "on_miss": "auto", "prefetch": 2}, 0),
        (CpuBackend, {"slots_per_layer": (3, 12, 7), "on_miss": "cpu"}, 0),
        (DeferredBackend, {"slots_per_layer": 8, "prefetch": 2}, 0),
        (DeferredBackend, {"slots_per_layer": 4, "host_slots": 5, "prefetch": 2}, 1000),
        (DeferredBackend, {"slots_per_layer": 5, "host_slots": 12, "prefetch": "auto"}, 1000),
        (DeferredBackend, {"slots_per_layer": 4, "host_slots": (0, 6, 12), "scope": "model"}, 14),
        (DeferredBackend, {"slots_per_layer": 5, "host_slots": 7, "eviction": "s3-fifo"}, 0),
    ],
)
def test_random_accesses_race_with_the_fill(checkpoint, backend, options, pins, size, monkeypatch):
    if size == "two buffers":
        monkeypatch.setattr(staging_module, "FEW_BYTES", 0)
    if size != "windows":
        monkeypatch.setattr(fill_queue, "window_bytes", lambda nbytes: 0)
    for seed in range(2):
        order = random.Random(seed).sample(ORDER, len(ORDER))
        rig = FillingRig(
            checkpoint, backend(), CacheOptions(**options), order=order, read_at=slow_at_random(seed), pins=pins
        )
        try:
            rig.filled_one()  # on a busy machine all accesses may be over before
            wrong = sum(rig.run(access) for access in random_accesses(seed, 20))
            progress = rig.filled_all()
        finally:
            rig.close()
        assert wrong == 0
        assert rig.replayed() == rig.stats
        assert rig.stats.filled == sum(map(len, rig.rows)) > 0
        assert progress.error is None
        assert progress.experts == progress.total_experts


@pytest.mark.usefixtures("at_once")
def test_without_a_demand_everything_is_filled_and_hit(checkpoint):
    rig = FillingRig(checkpoint, DeferredBackend(), CacheOptions(slots_per_layer=8, host_slots=EXPERTS), pins=1000)
    try:
        progress = rig.filled_all()
        assert progress.experts == progress.total_experts == LAYERS * EXPERTS
        assert progress.nbytes == progress.total_bytes == EXPERTS * sum(SHAPE.expert_bytes)
        wrong = sum(rig.run(single(layer, 0, 7)) for layer in range(LAYERS))
        assert wrong == 0
        assert rig.fill.is_over
        assert (rig.stats.hits, rig.stats.misses, rig.stats.disk_bytes) == (2 * LAYERS, 0, 0)
        assert rig.stats.filled == LAYERS * (8 + EXPERTS)
        rig.run(single(0, 8, 11))
        assert (rig.stats.misses, rig.stats.disk_bytes) == (2, 0), "RAM has the others"
    finally:
        rig.close()


class HeldReads:
    """Reads of expert (0, 0) block until `gate` is set; `begun` tells that one has begun."""

    def __init__(self, held=1):
        self.begun, self.gate, self._held = threading.Event(), threading.Event(), held

    def __call__(self, descriptor, buffer, offset):
        if self._held:
            self._held -= 1
            self.begun.set()
            assert self.gate.wait(PATIENCE_S)
        return os.preadv(descriptor, [buffer], offset)


@pytest.mark.parametrize("host_slots", [0, EXPERTS])
def test_a_demanded_expert_under_way_is_waited_for_and_not_read_twice(checkpoint, host_slots, monkeypatch):
    monkeypatch.setattr(fill_queue, "window_bytes", lambda nbytes: 0)
    reads = HeldReads()
    options = CacheOptions(slots_per_layer=2, host_slots=host_slots)
    rig = FillingRig(checkpoint, DeferredBackend(), options, order=ORDER[:1], read_at=reads, pins=1000)
    try:
        assert reads.begun.wait(PATIENCE_S)
        threading.Timer(0.05, reads.gate.set).start()
        assert rig.run(single(0, 0, 1)) == 0
        assert (rig.stats.hits, rig.stats.misses) == (1, 1)
        assert rig.rows == ([(0, 0, 0)], [(0, 0, 0)] if host_slots else [])
        assert rig.replayed() == rig.stats
    finally:
        reads.gate.set()
        rig.close()


def test_a_demand_takes_the_place_of_a_fill_under_way(checkpoint, monkeypatch):
    monkeypatch.setattr(fill_queue, "window_bytes", lambda nbytes: 0)
    reads = HeldReads()
    rig = FillingRig(
        checkpoint, DeferredBackend(), CacheOptions(slots_per_layer=2), order=[ExpertKey(0, 5)], read_at=reads
    )
    try:
        assert reads.begun.wait(PATIENCE_S)
        threading.Timer(0.05, reads.gate.set).start()
        assert rig.run(single(0, 0, 1)) == 0
        assert rig.run(single(0, 0, 1)) == 0
        assert (rig.stats.filled, rig.rows) == (0, ([], []))
    finally:
        reads.gate.set()
        rig.close()


def test_a_fill_whose_expert_goes_elsewhere_keeps_its_ram_slot_while_it_is_read(checkpoint, monkeypatch):
    """The read under way ends in the RAM slot. The next expert there must wait for it."""
    monkeypatch.setattr(fill_queue, "window_bytes", lambda nbytes: 0)
    reads = HeldReads()
    rig = Rig(checkpoint, DeferredBackend(), CacheOptions(slots_per_layer=5, host_slots=EXPERTS), reads, pins=1000)
    engine, key, other = rig.engine, ExpertKey(0, 0), ExpertKey(0, 1)
    try:
        engine.fill([Fill(key, 3, 2)])
        assert reads.begun.wait(PATIENCE_S)
        engine.prefetch([Fetch(key, 0, None, 0)])
        threading.Timer(0.05, reads.gate.set).start()
        engine.fetch([Fetch(other, 3, None, 2)])
        engine.ready(3)
        until(lambda: not engine.fill_progress.running)
        engine.fetch([Fetch(other, 4, None, 2, read=False)])
        engine.ready(4)
        assert [slot for slot in (3, 4) if not (rig.arena.views(slot, LAYOUT)["weight"] == 1.0).all()] == []
    finally:
        reads.gate.set()
        rig.close()


class HeldCopies(Waits):
    """The first copy into a slot blocks until `gate` is set; `begun` tells that it has begun."""

    def __init__(self):
        self.begun, self.gate = threading.Event(), threading.Event()

    def slot_last_read(self, copies, last_read):
        if not self.begun.is_set():
            self.begun.set()
            assert self.gate.wait(PATIENCE_S)
        super().slot_last_read(copies, last_read)


def test_a_fill_whose_expert_goes_elsewhere_keeps_its_slot_while_it_is_copied(checkpoint, monkeypatch):
    monkeypatch.setattr(fill_queue, "window_bytes", lambda nbytes: 0)
    waits = HeldCopies()
    rig = Rig(checkpoint, CpuBackend(), CacheOptions(slots_per_layer=5), waits=waits)
    engine, key, other = rig.engine, ExpertKey(0, 0), ExpertKey(0, 1)
    try:
        engine.fill([Fill(key, 3, None)])
        assert waits.begun.wait(PATIENCE_S)
        engine.prefetch([Fetch(key, 0, None)])
        threading.Timer(0.05, waits.gate.set).start()
        engine.fetch([Fetch(other, 3, None)])
        engine.ready(3)
        until(lambda: not engine.fill_progress.running)
        assert (rig.arena.views(3, LAYOUT)["weight"] == 1.0).all()
    finally:
        waits.gate.set()
        rig.close()


def test_no_read_of_the_fill_begins_while_a_demand_is_read(checkpoint, monkeypatch):
    monkeypatch.setattr(fill_queue, "window_bytes", lambda nbytes: 0)
    monkeypatch.setattr(fill_queue, "IDLE_AFTER_S", -1.0)
    wanted = checkpoint.segment("2.11").offset // 4096
    spans = []

    def read(descriptor, buffer, offset):
        began = time.monotonic()
        time.sleep(0.1 if offset // 4096 == wanted else 0.002)
        spans.append((offset // 4096 == wanted, began, time.monotonic()))
        return os.preadv(descriptor, [buffer], offset)

    rig = FillingRig(checkpoint, CpuBackend(), CacheOptions(slots_per_layer=12), order=ORDER[:24], read_at=read)
    try:
        assert rig.run(single(2, 11)) == 0
        rig.filled_all()
    finally:
        rig.close()
    ((_, begin, end),) = [span for span in spans if span[0]]
    begun = [began for is_demand, began, _ in spans if not is_demand]
    meanwhile = [began for began in begun if begin < began < end]
    assert len(meanwhile) <= len(rig.engine._readers), "one per reader that had been let go before"
    assert [began for began in begun if began >= end], "the fill goes on afterwards"


def test_a_read_that_fails_ends_the_fill_and_says_so(checkpoint, caplog):
    def broken(descriptor, buffer, offset):
        raise OSError(errno.EIO, "Input/output error")

    rig = FillingRig(checkpoint, CpuBackend(), CacheOptions(slots_per_layer=6), read_at=broken)
    try:
        progress = rig.filled_all()
        assert "reading failed (Input/output error)" in progress.error
        assert progress.experts == 0
        assert caplog.text.count("the background fill ends early: expert") == 1
        with pytest.raises(TransferError, match=r"expert 3 of MoE layer 0: .*reading failed"):
            rig.run(single(0, 3))
        rig.engine.forget()
        rig.fill.start(rig.planner)
        assert rig.fill.is_over, "it does not begin again"
    finally:
        rig.close()


def test_a_read_that_fails_under_a_demand_is_the_demands_error(checkpoint, monkeypatch):
    monkeypatch.setattr(fill_queue, "window_bytes", lambda nbytes: 0)
    begun, gate = threading.Event(), threading.Event()

    def broken(descriptor, buffer, offset):
        begun.set()
        assert gate.wait(PATIENCE_S)
        raise OSError(errno.EIO, "Input/output error")

    rig = FillingRig(checkpoint, CpuBackend(), CacheOptions(slots_per_layer=6), order=ORDER[:1], read_at=broken)
    try:
        assert begun.wait(PATIENCE_S)
        threading.Timer(0.05, gate.set).start()
        with pytest.raises(TransferError, match=r"expert 0 of MoE layer 0: .*reading failed"):
            rig.run(single(0, 0))
    finally:
        gate.set()
        rig.close()


@pytest.mark.usefixtures("at_once")
def test_close_and_forget_while_it_fills(checkpoint):
    before = threading.active_count()
    for end in ("close", "forget"):
        rig = FillingRig(
            checkpoint, DeferredBackend(), CacheOptions(slots_per_layer=8, host_slots=9), read_at=slow_at_random(1)
        )
        rig.run(single(0, 1, 2))
        if end == "forget":
            rig.engine.forget()
            assert not rig.engine.filling
            rig.planner = build_planner(rig.planner.options, SHAPE)
            rig.fill.start(rig.planner)
            assert sum(rig.run(access) for access in random_accesses(3, 5)) == 0
            rig.filled_all()
        rig.close()
        assert threading.active_count() == before


@pytest.mark.usefixtures("at_once")
def test_windows_are_released_when_it_ends(checkpoint):
    rig = FillingRig(checkpoint, CpuBackend(), CacheOptions(slots_per_layer=12))
    try:
        rig.filled_all()
        assert rig.engine.host.windows is None
    finally:
        rig.close()


def test_while_the_model_computes_it_rests(monkeypatch):
    now = [100.0]
    queue = fill_queue.FillQueue(clock=lambda: now[0])
    batch = fill_queue.FillBatch([], None, direct=False, windowed=False)
    queue.step_begins(batch)
    now[0] += 0.002
    queue.step_ended(batch)
    assert queue.rest_s() == 0, "no access so far"
    queue.settle(())
    assert queue.rest_s() == pytest.approx(0.002 * fill_queue.REST)
    now[0] += fill_queue.IDLE_AFTER_S + 0.01
    assert queue.is_idle
    assert queue.rest_s() == 0


@pytest.mark.parametrize(("scope", "host_slots"), [("layer", 0), ("layer", 4), ("model", 12)])
def test_popular_experts_get_the_slots_that_demands_take_last(scope, host_slots):
    planner = build_planner(CacheOptions(slots_per_layer=3, scope=scope, host_slots=host_slots), SHAPE)
    fills = plan_fills(planner, ORDER)
    slots = [fill.slot for fill in fills if fill.slot is not None]
    assert len(set(slots)) == len(slots) == 3 * LAYERS
    in_ram = [fill.host for fill in fills if fill.host is not None]
    assert len(set(in_ram)) == len(in_ram) == LAYERS * host_slots
    if scope == "model":
        assert [fill.key for fill in fills if fill.slot is not None] == ORDER[: 3 * LAYERS]
        assert slots == sorted(slots, reverse=True)
        assert all(fill.host is not None for fill in fills), "RAM holds all, so each is read once"
    else:
        assert [fill.slot for fill in fills if fill.key.layer == 1 and fill.slot is not None] == [5, 4, 3]
    assert not planner.layers[0].residency.slot_of, "planning fills changes nothing"
