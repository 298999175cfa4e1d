"""Plans of the real planner carried out by the real engine, at random: every use must see its own expert."""

from __future__ import annotations

import random
import time

import pytest
import torch
from safetensors.torch import save_file

from offmoe.config import CacheOptions
from offmoe.policy.planner import build_planner
from offmoe.runtime.arena import SlotArena
from offmoe.runtime.backend import CpuBackend
from offmoe.runtime.checkpoint import Checkpoint
from offmoe.runtime.formats import Assembly, ExpertLayout, ExpertRecord, Part
from offmoe.runtime.store import ExpertStore, positional_read
from offmoe.runtime.transfer import TransferEngine
from offmoe.types import Access, CacheShape, CacheStats, Demand, ExpertKey
from tests.doubles import DeferredBackend

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
    """Planner and engine of three layers; `run` says how many uses saw another expert than theirs."""

    def __init__(self, checkpoint, backend, options, read_at=None):
        keys = [ExpertKey(k, e) for k in range(LAYERS) for e in range(EXPERTS)]
        records = {key: ExpertRecord((checkpoint.segment(f"{key.layer}.{key.expert}"),)) for key in keys}
        self.backend = backend
        self.planner = build_planner(options, SHAPE)
        self.store = ExpertStore(checkpoint.shards, records, read_at=read_at)
        self.arena = SlotArena(backend.allocate, [LAYOUT] * self.planner.num_slots)
        self.engine = TransferEngine(
            self.store, self.arena, backend, [LAYOUT] * LAYERS, [Assembly((Part("weight", 0, 0),))] * LAYERS
        )
        if isinstance(backend, DeferredBackend):
            for slot in range(self.planner.num_slots):
                backend.guard(self.arena.bytes(slot), self.engine._last_read[slot])
        self.stats = CacheStats.for_layers(LAYERS)

    def run(self, access):
        plan = self.planner.plan(access)
        self.stats.add(plan, SHAPE)
        self.engine.stream(plan.waves)
        wrong = 0
        for wave in plan.waves:
            for expert, slot in wave.experts:
                self.engine.ready(slot)
                seen = self.arena.views(slot, LAYOUT)["weight"]
                wrong += not bool((seen == 100.0 * access.layer + expert).all())
                self.engine.computed([slot])
        self.engine.fetch(plan.prefetches, ahead=True)
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
    """Reads that take up to two milliseconds longer, in an order of their own."""
    chance, read = random.Random(seed), positional_read()

    def slow(descriptor, buffer, offset):
        time.sleep(chance.random() * 0.002)
        return read(descriptor, buffer, offset)

    return slow


@pytest.mark.parametrize("backend", [DeferredBackend, CpuBackend])
@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("slots", [3, 4, 7])
def test_every_use_sees_its_expert(checkpoint, backend, scope, slots):
    rig = Rig(checkpoint, backend(), CacheOptions("lru", scope, slots, prefetch=3), slow_at_random(slots))
    try:
        wrong = sum(rig.run(access) for access in random_accesses(slots, 40))
        rig.planner.check()
        assert wrong == 0
        assert rig.stats.prefetched_used
        assert rig.stats.misses > 100
    finally:
        rig.close()
