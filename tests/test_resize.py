"""Memory that moves: slots, RAM and context change between generations, and the bits stay."""

from __future__ import annotations

import gc
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

import offmoe
from offmoe.budget.host import HostPlan
from offmoe.device import blocks
from offmoe.errors import CapacityError, ConfigError, OffmoeError
from offmoe.policy.planner import build_planner
from offmoe.simulate.replay import replay
from offmoe.trace.recorder import TraceWriter
from offmoe.trace.trace import Trace, read_trace
from offmoe.types import CacheStats
from tests import native, tiny
from tests.doubles import DeferredBackend, PinningBackend
from tests.policy.invariants import check_planner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("resize") / "model")


@pytest.fixture(scope="module")
def want(folder: Path) -> torch.Tensor:
    return generate(tiny.comparable(AutoModelForCausalLM.from_pretrained(folder, dtype="auto")))


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 5 * 18432)  # five slots


@pytest.fixture
def c_kernels() -> None:
    native.library()


def generate(model: tiny.Model, seed: int = 3) -> torch.Tensor:
    out = model.generate(input_ids=tiny.prompt(seed=seed), max_new_tokens=8, do_sample=False)
    assert isinstance(out, torch.Tensor)
    return out


def residents(model: tiny.Model) -> set[int]:
    """Keys of the experts that have a slot."""
    return {key for cache in model.offload._executor.planner.layers for key in cache.residency.slot_of}


def ram(model: tiny.Model) -> HostPlan:
    """The division of RAM beside a device of its own."""
    plan = model.offload.memory().host
    assert plan is not None
    return plan


def copies(model: tiny.Model) -> set[int]:
    """Keys of the experts that RAM holds."""
    tiers = [cache.host_tier for cache in model.offload._executor.planner.layers]
    return {key for tier in tiers if tier is not None for key in tier._slot_of}


OPTIONS: dict[str, dict[str, Any]] = {
    "quotas": {},
    "no prefetch": {"prefetch": 0},
    "pool": {"scope": "model"},
    "pool with scratch": {"scope": "model", "on_miss": "cpu"},
    "lru": {"eviction": "lru"},
    "s3-fifo": {"eviction": "s3-fifo"},
    "sieve": {"eviction": "sieve"},
    "lru-2": {"eviction": "lru-2"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_bits_at_every_size(folder: Path, want: torch.Tensor, options: dict[str, Any]) -> None:
    with (model := offmoe.from_pretrained(folder, device="cpu", slots_per_layer=4, **options)).offload:
        for slots in (4, 2, 3, 8, 5, 2, 7):
            plan = model.offload.resize(slots_per_layer=slots)
            assert plan is model.offload.memory()
            assert plan.slots_per_layer == (slots,) * 3
            assert model.offload.config.slots_per_layer == slots
            arena = model.offload._executor._transfer.writer.arena
            assert arena.nbytes == plan.slots + plan.scratch
            assert torch.equal(generate(model), want)
            check_planner(model.offload._executor.planner)


def test_the_best_stay_and_are_not_read_again(folder: Path, want: torch.Tensor) -> None:
    with (model := offmoe.from_pretrained(folder, device="cpu", slots_per_layer=6, prefetch=0)).offload:
        generate(model)
        expected = set()
        for cache in model.offload._executor.planner.layers:
            scores = sorted(cache.residency.slot_of, key=lambda key: (cache.policy.score(key), key))
            expected |= set(scores[-3:])
        model.offload.resize(slots_per_layer=3)
        assert residents(model) == expected
        before = model.offload.stats()
        model.offload.resize(slots_per_layer=8)
        assert residents(model) == expected
        assert model.offload.stats() == before
        assert torch.equal(generate(model), want)
        first = model.offload.stats() - before
        shape = model.offload._executor.shape
        assert first.disk_bytes <= (sum(shape.experts) - len(expected)) * shape.expert_bytes[0]
        generate(model)
        before = model.offload.stats()
        assert torch.equal(generate(model), want)
        assert (model.offload.stats() - before).misses == 0, "every expert has a slot"


def test_bytes_that_stay_are_the_experts_own(folder: Path, monkeypatch: pytest.MonkeyPatch, want: torch.Tensor) -> None:
    """After growing to all experts nothing is read: a slot with other bytes would change the result."""
    with (model := offmoe.from_pretrained(folder, device="cpu", slots_per_layer=8)).offload:
        generate(model)
        for slots in (5, 8, 3, 8, 8):
            model.offload.resize(slots_per_layer=slots)
        kept = residents(model)
        store = model.offload._executor._transfer.writer.store
        read, original = [], store.read_part

        def counted(key: Any, *how: Any) -> None:
            read.append(key)
            original(key, *how)

        monkeypatch.setattr(store, "read_part", counted)
        assert torch.equal(generate(model), want)
        first_key = model.offload._executor.shape.first_key
        assert kept
        assert not kept & {first_key[key.layer] + key.expert for key in read}


@pytest.mark.usefixtures("c_kernels")
def test_the_c_kernels_follow_the_slots(folder: Path) -> None:
    with (model := offmoe.from_pretrained(folder, device="cpu", experts="int8", slots_per_layer=8)).offload:
        logits = model(tiny.prompt()).logits
        for slots in (3, 8, 2, 5):
            model.offload.resize(slots_per_layer=slots)
            for _ in range(2):
                assert torch.equal(model(tiny.prompt()).logits, logits)


@pytest.mark.parametrize("backend", [DeferredBackend, PinningBackend])
@pytest.mark.parametrize("options", [{"prefetch": 0}, {"prefetch": 2}, {"prefetch": "auto", "scope": "model"}])
def test_a_device_of_its_own_with_its_ram(
    folder: Path, want: torch.Tensor, monkeypatch: pytest.MonkeyPatch, backend: type, options: dict[str, Any]
) -> None:
    """On the strict double: a copy that nobody waited for would be NaN."""
    double = backend()
    monkeypatch.setattr("offmoe.budget.inspect.select_backend", lambda device: double)
    with (model := offmoe.from_pretrained(folder, slots_per_layer=3, **options)).offload:
        writer = model.offload._executor._transfer.writer
        staging = ram(model).staging
        slot = staging // len(model.offload._executor._transfer.host.staging)
        for slots, in_ram in ((3, 9), (2, 4), (4, 4), (2, 12), (5, 0), (3, 6), (8, 6), (2, 15)):
            before = copies(model)
            model.offload.resize(slots_per_layer=slots, host_memory=staging + in_ram * slot)
            double.guard(writer)
            plan = model.offload.memory()
            assert plan.slots_per_layer == (slots,) * 3
            assert sum(ram(model).slots_per_layer) == (in_ram if slots < 8 else 0)
            assert copies(model) <= before
            per_layer = [len([key for key in before if layer * 8 <= key < layer * 8 + 8]) for layer in range(3)]
            assert len(copies(model)) == sum(map(min, per_layer, ram(model).slots_per_layer))
            assert torch.equal(generate(model), want)
            check_planner(model.offload._executor.planner)
    if backend is PinningBackend:
        assert not double.pinned


def test_ram_keeps_its_copies(folder: Path, want: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    double = DeferredBackend()
    monkeypatch.setattr("offmoe.budget.inspect.select_backend", lambda device: double)
    with (model := offmoe.from_pretrained(folder, slots_per_layer=2, prefetch=0)).offload:
        writer = model.offload._executor._transfer.writer
        double.guard(writer)
        assert sum(ram(model).slots_per_layer) == 24
        for seed in range(3, 9):
            generate(model, seed)
        held = copies(model)
        assert len(held) == 24
        before = model.offload.stats()
        model.offload.resize(slots_per_layer=3)
        double.guard(writer)
        assert copies(model) == held
        assert torch.equal(generate(model), want)
        assert (model.offload.stats() - before).disk_bytes == 0
        host = ram(model)
        model.offload.resize(host_memory=host.staging + host.slots // 2)
        double.guard(writer)
        assert len(copies(model)) == 12
        assert copies(model) <= held
        assert torch.equal(generate(model), want)


def count(trace: Trace, planner: Any) -> CacheStats:
    stats = CacheStats.for_layers(trace.shape.layers)
    for access in trace.accesses():
        stats.add(planner.plan(access), trace.shape)
    return stats


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_replay_is_exact_on_either_side(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """A recording ends at a resize. The same planner, resized alike, counts what runs afterwards."""
    paths = [tmp_path / f"{i}.npz" for i in range(4)]
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=4, trace=paths[0], **options)
    with model.offload:
        executor, planner, total = model.offload._executor, None, CacheStats.for_layers(3)
        for number, (path, slots) in enumerate(zip(paths, (2, 5, 3, 8), strict=True)):
            generate(model, seed=number)
            model.offload.resize(slots_per_layer=slots)
            assert model.offload.trace is None
            trace = read_trace(path)
            assert trace.options is not None
            if planner is None:
                planner = build_planner(trace.options, trace.shape)
                assert replay(trace, trace.options).stats == model.offload.stats()
            total += count(trace, planner)
            assert total == model.offload.stats()
            planner.resize(model.offload.config.cache())
            if path is not paths[-1]:
                executor.trace = TraceWriter(paths[number + 1], "m", executor.shape, executor.planner.options)


def test_device_memory_and_context_divide_anew(folder: Path, want: torch.Tensor) -> None:
    start = offmoe.from_pretrained(folder, device="cpu").offload.memory()
    least = start.smallest
    model = offmoe.from_pretrained(folder, device="cpu", device_memory=least + 300_000, max_context=256)
    with model.offload:
        full = model.offload.memory()
        smaller = model.offload.resize(device_memory=least + 80_000)
        assert sum(smaller.slots_per_layer) < sum(full.slots_per_layer)
        assert smaller.used <= smaller.budget == least + 80_000 == model.offload.config.device_memory
        assert torch.equal(generate(model), want)
        shorter = model.offload.resize(max_context=64)
        assert sum(shorter.slots_per_layer) > sum(smaller.slots_per_layer)
        assert (shorter.max_context, model.offload.config.max_context) == (64, 64)
        with pytest.raises(CapacityError, match="max_context=80"):
            model(tiny.prompt(1, 80))
        assert torch.equal(generate(model), want)
        again = model.offload.resize(device_memory=least + 300_000, max_context=256)
        # Dense weights cannot be offloaded any more, and the scope stays.
        assert again == replace(full, smallest=again.smallest, smallest_dense=again.smallest_dense, reason="")
        assert torch.equal(generate(model), want)
        back = model.offload.resize(device_memory="auto")
        assert back.slots_per_layer == (8, 8, 8)
        assert torch.equal(generate(model), want)


def test_what_does_not_fit_is_refused_and_changes_nothing(folder: Path, want: torch.Tensor) -> None:
    least = offmoe.from_pretrained(folder, device="cpu").offload.memory().smallest
    model = offmoe.from_pretrained(folder, device="cpu", device_memory=least + 100_000, max_context=256)
    with model.offload:
        generate(model)
        state = model.offload.memory(), model.offload.config, residents(model)
        for options, error, words in (
            ({"device_memory": 1000}, CapacityError, "smallest device_memory that works for this model is"),
            ({"max_context": 10**6}, CapacityError, "With max_context="),
            ({"device_memory": "9 bananas"}, ConfigError, "device_memory"),
            ({"max_context": 0}, ConfigError, "max_context=0"),
            ({"host_memory": "1GiB"}, ConfigError, "host_memory"),
            ({"slots_per_layer": 8}, CapacityError, "slots_per_layer=8"),
        ):
            with pytest.raises(error, match=words) as refused:
                model.offload.resize(**options)
            assert (model.offload.memory(), model.offload.config, residents(model)) == state
        with pytest.raises(CapacityError) as refused:
            model.offload.resize(max_context=10**6)
        works = int(str(refused.value).rsplit("max_context=", 1)[1].split()[0])
        assert model.offload.resize(max_context=works).max_context == works
        with pytest.raises(CapacityError):
            model.offload.resize(max_context=works + 1)
        assert torch.equal(generate(model), want)


def test_memory_that_the_system_refuses_changes_nothing(folder: Path, want: torch.Tensor) -> None:
    with (model := offmoe.from_pretrained(folder, device="cpu", slots_per_layer=2)).offload:
        generate(model)
        state = model.offload.memory(), model.offload.config, residents(model)
        arena = model.offload._executor._transfer.writer.arena
        allocate, calls = arena._allocate, []

        def fails_second(nbytes: int) -> torch.Tensor:
            calls.append(nbytes)
            if len(calls) == 2:
                raise CapacityError("injected")
            return allocate(nbytes)

        arena._allocate = fails_second
        with pytest.raises(CapacityError, match="injected"):
            model.offload.resize(slots_per_layer=8)
        arena._allocate = allocate
        assert (model.offload.memory(), model.offload.config, residents(model)) == state
        before = model.offload.stats()
        assert torch.equal(generate(model), want)
        assert (model.offload.stats() - before).hits > 0


def test_a_model_that_generates_is_not_resized(folder: Path, want: torch.Tensor) -> None:
    refused = []
    with (model := offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)).offload:

        class Greedy:
            def put(self, value: object) -> None:
                with pytest.raises(OffmoeError, match="between two generations"):
                    model.offload.resize(slots_per_layer=2)
                refused.append(value)

            def end(self) -> None:
                pass

        model.generate(tiny.prompt(1), max_new_tokens=3, streamer=Greedy())
        assert len(refused) >= 3
        model.offload.resize(slots_per_layer=2)
        assert torch.equal(generate(model), want)
    with pytest.raises(OffmoeError, match="closed"):
        model.offload.resize(slots_per_layer=3)


def test_predictions_begin_when_slots_become_few(folder: Path, want: torch.Tensor) -> None:
    with (model := offmoe.from_pretrained(folder, device="cpu", slots_per_layer=8, prefetch=2)).offload:
        generate(model)
        model.offload.resize(slots_per_layer=3)
        for _ in range(2):
            assert torch.equal(generate(model), want)
        assert model.offload.stats().prefetched > 0


def test_after_a_failure_a_resize_starts_from_nothing(folder: Path, want: torch.Tensor) -> None:
    with (model := offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)).offload:
        generate(model)
        model.offload._executor._sound = False
        model.offload.resize(slots_per_layer=4)
        assert not residents(model)
        assert torch.equal(generate(model), want)


@pytest.mark.parametrize("options", [{}, {"scope": "model"}], ids=["quotas", "pool"])
def test_fifty_rounds_leak_nothing(folder: Path, want: torch.Tensor, options: dict[str, Any]) -> None:
    rng = random.Random(7)
    with (model := offmoe.from_pretrained(folder, device="cpu", slots_per_layer=8, **options)).offload:
        counts = []
        for number in range(50):
            model.offload.resize(slots_per_layer=rng.choice((2, 3, 4, 5, 6, 8)))
            if number % 5 == 0:
                assert torch.equal(generate(model), want)
            if number % 24 == 1:
                model.offload.resize(slots_per_layer=4)
                generate(model)
                model.offload.resize(slots_per_layer=3)  # which views of slots are kept depends on the routing
                gc.collect()
                counts.append((sum(type(thing) is torch.Tensor for thing in gc.get_objects()), descriptors()))
        assert counts[0][1] == counts[1][1] == counts[2][1]
        tensors = [tensors for tensors, _ in counts]
        assert max(tensors) - min(tensors) < 6, "24 rounds lie between two counts"


def descriptors() -> int:
    return psutil.Process().num_fds() if hasattr(os, "fork") else 0


def test_memory_goes_back_to_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of 3 MB, 192 MB of them; the rest of the process stays as large as it was."""
    monkeypatch.undo()
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64 << 20)
    stock = tiny.build("mixtral", hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_local_experts=32)
    with (model := offmoe.from_pretrained(tiny.save(stock, tmp_path, max_shard_size="1GB"), device="cpu")).offload:
        del stock
        expert = model.offload.memory().slots // 64
        want, process = generate(model), psutil.Process()
        slots = []
        for number in range(50):
            model.offload.resize(slots_per_layer=(32, 4)[number % 2])
            if number >= 46:
                assert torch.equal(generate(model), want)
                gc.collect()
                slots.append(process.memory_info().rss)
        assert slots[0] - slots[1] > 0.5 * 56 * expert - 2 * (64 << 20)
        assert abs(slots[3] - slots[1]) < 10 * expert
        arena = model.offload._executor._transfer.writer.arena
        gone = [StorageWeakRef(arena.bytes(slot).untyped_storage()) for slot in range(len(arena))]
        model.offload.close()
        assert all(storage.expired() for storage in gone)


@pytest.mark.parametrize("apart", [False, True], ids=["unified", "apart"])
def test_a_background_fill_goes_on_with_the_new_slots(
    folder: Path, want: torch.Tensor, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    if apart:
        double = DeferredBackend()
        monkeypatch.setattr("offmoe.budget.inspect.select_backend", lambda device: double)
    device = None if apart else "cpu"
    with (model := offmoe.from_pretrained(folder, device=device, slots_per_layer=2, prefetch=0, fill=True)).offload:
        for slots in (5, 3, 7, 2, 6):
            model.offload.resize(slots_per_layer=slots)
            assert torch.equal(generate(model), want)
            check_planner(model.offload._executor.planner)
        deadline = time.monotonic() + 20
        while len(residents(model)) < 18 and time.monotonic() < deadline:
            assert torch.equal(generate(model), want)
        assert len(residents(model)) == 18
