"""Steps of one token that the device computes without the host: the host's tokens, exact replay, nothing is waited for.

The device runs by itself here, in a thread: the host does not wait for it, so nothing else would make it run.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import offmoe
from offmoe.compute.kernels import device as device_kernels
from offmoe.compute.kernels.routing_log import Entry, RoutingLog, Verdict
from offmoe.device.accelerator import DeviceEvent
from offmoe.device.backend import Stream
from offmoe.errors import CheckpointError, OffmoeError
from offmoe.policy.planner import build_planner
from offmoe.runtime.device_decode import DeviceDecode
from offmoe.simulate.replay import replay
from offmoe.storage.store import ExpertStore
from offmoe.trace.trace import read_trace
from offmoe.types import Access, CacheStats, single_demands
from tests import tiny
from tests.doubles import count_verdicts
from tests.late_device import extension
from tests.late_device.extension import LateKind
from tests.late_device.kernels import LOOKS, LateRoutedLayer
from tests.late_device.test_sync import SyncLint
from tests.test_families import stock_model

pytestmark = pytest.mark.skipif(not device_kernels.available(), reason="no Triton")

GREEDY: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
PROMPTS = (tiny.prompt(1, 12), tiny.prompt(1, 5, seed=3), tiny.prompt(2, 4, seed=4))
LAYERS, EXPERTS = 3, 8
SAME = 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("decode") / "model")


@pytest.fixture(scope="module")
def texts(folder: Path) -> list[torch.Tensor]:
    model = offmoe.from_pretrained(folder, device="cpu")
    with model.offload:
        return [model.generate(prompt, **GREEDY) for prompt in PROMPTS]


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Counter[Verdict]:
    """What the device made of the accesses of its steps."""
    return count_verdicts(monkeypatch)


def parts(model: Any) -> tuple[Any, Any]:
    """The executor, and the first MoE layer."""
    attached = next(module._offmoe for module in model.modules() if hasattr(module, "_offmoe"))
    return attached._executor, attached.layer


def load(folder: Path, **options: Any) -> tiny.Model:
    chosen = {"slots_per_layer": 5, "exactness": "numeric", "lag": 1, "host_memory": "64MiB", **options}
    return offmoe.from_pretrained(folder, device="late", **chosen)


@pytest.mark.parametrize("ram", ["all", "some", "none"])
def test_the_hosts_tokens_and_an_exact_replay(
    folder: Path, texts: list[torch.Tensor], alone: LateKind, tmp_path: Path, ram: str, verdicts: Counter[Verdict]
) -> None:
    """Misses are gathered from RAM, or the stream waits until the host has read them."""
    places: dict[str, dict[str, Any]] = {"all": {}, "some": {"host_slots": 3}, "none": {"host_memory": 0}}
    model = load(folder, trace=tmp_path / "run.npz", **places[ram])
    with model.offload as offload:
        for prompt, text in zip(PROMPTS, texts, strict=True):
            assert torch.equal(model.generate(prompt.to("late"), **GREEDY).cpu(), text)
        stats = offload.stats()
    assert stats.misses > 20
    assert verdicts.total() == 2 * 15 * LAYERS  # every step of one token
    assert verdicts.keys() == {Verdict.ASSIGNED, Verdict.NOT_IN_RAM}
    assert (verdicts[Verdict.NOT_IN_RAM] < 5) == (ram == "all")  # experts that no step has read before
    recorded = read_trace(tmp_path / "run.npz")
    assert recorded.options is not None
    assert replay(recorded, recorded.options).stats == stats


def test_steps_of_hits_wait_for_nothing(
    folder: Path, alone: LateKind, monkeypatch: pytest.MonkeyPatch, verdicts: Counter[Verdict]
) -> None:
    """No operator for which the host waits, no copy to the device, no event: launches alone."""
    recorded: list[DeviceEvent] = []
    record = DeviceEvent.record

    def counted(event: DeviceEvent, stream: Stream) -> None:
        recorded.append(event)
        record(event, stream)

    model = load(folder, slots_per_layer=8)
    with model.offload as offload, torch.no_grad():
        for seed in range(3):
            model(tiny.prompt(1, 60, seed=seed).to("late"))
        cache = DynamicCache(config=model.config)
        model(tiny.prompt(1, 8).to("late"), past_key_values=cache)
        tokens = [torch.tensor([[5 + i]]).to("late") for i in range(7)]
        model(tokens[0], past_key_values=cache)  # its first layer gives the slots to the device
        torch.accelerator.synchronize()
        monkeypatch.setattr(DeviceEvent, "record", counted)
        stats, before, lint = offload.stats(), extension.counts(), SyncLint()
        with lint:
            for token in tokens[1:]:
                model(token, past_key_values=cache)
        counts, found = extension.since(before), lint.found
        assert (offload.stats() - stats).misses == 0
        monkeypatch.setattr(DeviceEvent, "record", record)
    assert {wait for wait in found if wait.where != "transformers"} == set()
    assert (counts.host_waits, counts.async_copies, recorded) == (0, 0, [])
    assert verdicts == {Verdict.ASSIGNED: 7 * LAYERS}


def one_by_one(model: tiny.Model, text: torch.Tensor, length: int) -> list[torch.Tensor]:
    """The logits of a prompt, and of each token behind it; text: [1, n], the first `length` are the prompt."""
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, end in ((0, length), *((i, i + 1) for i in range(length, text.shape[1]))):
            logits.append(model(text[:, start:end].to("late"), past_key_values=cache).logits[:, -1].cpu())
    return logits


def assert_right(folder: Path, texts: list[torch.Tensor], model: tiny.Model) -> None:
    """The model generates the host's tokens."""
    assert torch.equal(model.generate(PROMPTS[0].to("late"), **GREEDY).cpu(), texts[0])


def test_an_expert_that_cannot_be_read_is_an_error(
    folder: Path, texts: list[torch.Tensor], alone: LateKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device waits for the host, which cannot answer. Afterwards the model is right again."""
    model = load(folder, host_memory=0)
    read, take, broken = ExpertStore.read_part, DeviceDecode._take, list[int]()

    def fails(store: ExpertStore, *given: Any) -> None:
        if broken:
            raise CheckpointError("the disk is gone")
        read(store, *given)

    def taken(decode: DeviceDecode, entry: Entry) -> None:
        if entry.verdict is Verdict.NOT_IN_RAM:
            broken.append(1)
        take(decode, entry)

    with model.offload:
        with monkeypatch.context() as patched:  # the locks of threads stay watched behind it
            patched.setattr(ExpertStore, "read_part", fails)
            patched.setattr(DeviceDecode, "_take", taken)
            with pytest.raises(CheckpointError, match=r"expert \d of MoE layer \d: the disk is gone"):
                one_by_one(model, texts[0], 12)
        assert_right(folder, texts, model)


def test_a_host_that_does_not_answer_is_aborted(
    folder: Path, texts: list[torch.Tensor], alone: LateKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes longer than the device waits: the step fails, and nothing of it is taken for right."""
    model = load(folder, host_memory=0)
    answer, slow = DeviceDecode._answer, [True]

    def sleeps(decode: DeviceDecode, *given: Any) -> None:
        while slow and not decode._aborted[0]:
            time.sleep(0.001)
        answer(decode, *given)

    with model.offload:
        monkeypatch.setattr("tests.late_device.kernels.LOOKS", 50)
        monkeypatch.setattr(DeviceDecode, "_answer", sleeps)
        with pytest.raises(OffmoeError, match="waited too long for the host"):
            model.generate(PROMPTS[0].to("late"), **GREEDY)
        slow.clear()
        monkeypatch.setattr("tests.late_device.kernels.LOOKS", LOOKS)
        assert_right(folder, texts, model)


def test_a_device_that_says_nothing_is_an_error(
    folder: Path, texts: list[torch.Tensor], alone: LateKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a kernel has failed: there is nothing to wait for."""
    model = load(folder)
    with model.offload:
        with monkeypatch.context() as patch:
            patch.setattr(RoutingLog, "read", lambda *_: iter(()))
            with pytest.raises(OffmoeError, match="without saying what each layer did"):
                model.generate(PROMPTS[0].to("late"), **GREEDY)
        assert_right(folder, texts, model)


@pytest.mark.parametrize("access", [0, 1, 17, 40])
def test_ctrl_c_in_a_step(
    folder: Path, texts: list[torch.Tensor], alone: LateKind, monkeypatch: pytest.MonkeyPatch, access: int
) -> None:
    """Wherever it comes, the device is idle afterwards and the model right."""
    model, launches = load(folder, host_slots=4), [0]
    gather = LateRoutedLayer.gather

    def interrupted(layer: LateRoutedLayer) -> None:
        launches[0] += 1
        if launches[0] == access + 1:
            raise KeyboardInterrupt
        gather(layer)

    with model.offload:
        monkeypatch.setattr(LateRoutedLayer, "gather", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.generate(PROMPTS[0].to("late"), **GREEDY)
        assert_right(folder, texts, model)


def test_ids_of_no_expert_add_nothing(folder: Path, alone: LateKind) -> None:
    model = load(folder)
    hidden, weights = torch.randn(1, 32), torch.tensor([[0.25, 0.75]])
    with model.offload:
        executor, layer = parts(model)
        for ids in ([[3, 8]], [[-1, 2**40]], [[3, -5]]):
            rows = executor.run(layer, hidden.to("late"), torch.tensor(ids).to("late")).cpu()
            want = (rows * weights.view(-1, 1)).sum(0, keepdim=True)
            got = executor.run_summed(layer, hidden.to("late"), torch.tensor(ids).to("late"), weights.to("late"))
            assert got is not None
            assert (got.cpu() - want).norm() <= 1e-5 * max(1.0, float(want.norm()))
            executor.end_step()


def test_other_steps_take_the_slots_back(folder: Path, texts: list[torch.Tensor], alone: LateKind) -> None:
    """A background fill, and many prompts at once."""
    model = load(folder, slots_per_layer=6)
    with model.offload as offload:
        assert_right(folder, texts, model)
        offload.fill()
        assert_right(folder, texts, model)
        many = offload.generate_many([prompt[0] for prompt in PROMPTS[:2]], **GREEDY)
        assert [torch.equal(got.cpu(), text) for got, text in zip(many, texts, strict=False)] == [True, True]
        assert_right(folder, texts, model)


def test_a_model_that_nothing_refers_to_ends_its_thread(
    folder: Path, texts: list[torch.Tensor], alone: LateKind
) -> None:
    def watching() -> bool:
        return any(thread.name == "offmoe-device-log" for thread in threading.enumerate())

    model = load(folder, prefetch=0)
    assert_right(folder, texts, model)
    assert watching()
    del model
    gc.collect()
    assert not watching()


def test_where_the_host_stays_in_the_way(
    folder: Path, texts: list[torch.Tensor], alone: LateKind, caplog: pytest.LogCaptureFixture
) -> None:
    for options, reason in (
        ({"exactness": "bitwise"}, "exactness='bitwise' takes torch's operators"),
        ({"slots_per_layer": 3}, "a MoE layer has fewer than 2 slots per expert of a token"),
    ):
        model = load(folder, **options)
        with model.offload:
            assert f"every MoE layer waits for the host all the same: {reason}" in caplog.text
            assert_right(folder, texts, model)


class Steps:
    """Random accesses of all layers, and what their rows should be."""

    def __init__(self, model: tiny.Model, folder: Path, seed: int) -> None:
        self.chance = torch.Generator().manual_seed(seed)
        self.executor, _ = parts(model)
        self.layers = [module._offmoe.layer for module in model.modules() if hasattr(module, "_offmoe")]
        self.hidden = torch.randn(4, 32, generator=self.chance)
        self.on_device = self.hidden.to("late")
        stock = stock_model(folder, torch.float32)
        experts = [module for module in stock.modules() if hasattr(module, "gate_up_proj")]
        every = torch.arange(EXPERTS)[:, None]
        with torch.no_grad():
            self.rows = [
                torch.stack([m(x.expand(EXPERTS, -1), every, torch.ones(EXPERTS, 1)) for x in self.hidden])
                for m in experts
            ]
        """Per layer [inputs, experts, H]."""

    def run(self) -> None:
        """One step of one token."""
        outs = []
        for layer, rows in zip(self.layers, self.rows, strict=True):
            x = int(torch.randint(4, (), generator=self.chance))
            ids = torch.randperm(EXPERTS, generator=self.chance)[None, :2]
            weights = torch.rand(1, 2, generator=self.chance)
            out = self.executor.run_summed(layer, self.on_device[x : x + 1], ids.to("late"), weights.to("late"))
            outs.append((out, (weights.T * rows[x, ids[0]]).sum(0)))
        self.executor.end_step()
        for out, want in outs:
            assert out is not None
            assert (out[0].cpu() - want).norm() <= SAME * want.norm()


@pytest.mark.parametrize("steps", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_steps_lose_nothing(folder: Path, alone: LateKind, steps: int, verdicts: Counter[Verdict]) -> None:
    """Some experts in RAM, the others on disk; the host answers in time, and counts what a planner alone counts."""
    model = load(folder, host_slots=2)
    with model.offload as offload:
        routed = Steps(model, folder, seed=0)
        plan, accesses = routed.executor.plan_access, []

        def noted(layer: int, ids: Any) -> Any:
            accesses.append((layer, ids))
            return plan(layer, ids)

        routed.executor.plan_access = noted
        for _ in range(steps):
            routed.run()
        del routed.executor.plan_access
        planner, stats = build_planner(offload.config.cache(), offload.shape), CacheStats.for_layers(LAYERS)
        for layer, ids in accesses:
            stats.add(planner.plan(Access(layer, single_demands(ids, EXPERTS), 1)), offload.shape)
        assert [layer for layer, _ in accesses] == [*range(LAYERS)] * steps
        assert offload.stats() == stats
    assert verdicts[Verdict.ASSIGNED] > steps
    assert verdicts[Verdict.NOT_IN_RAM] > steps // 10


@pytest.mark.parametrize("steps", [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_steps_with_faults(folder: Path, alone: LateKind, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that fail and interrupts: each is an error of its step, and every other step is right."""
    model, chance = load(folder, host_slots=2), random.Random(1)
    with model.offload:
        routed = Steps(model, folder, seed=1)
        read, plan, failed = ExpertStore.read_part, routed.executor.plan_access, 0

        def reads(store: ExpertStore, *given: Any) -> None:
            if chance.random() < 0.05:
                raise CheckpointError("the disk is gone")
            read(store, *given)

        def interrupted(layer: int, ids: Any) -> Any:
            if chance.random() < 0.02:
                raise KeyboardInterrupt
            return plan(layer, ids)

        monkeypatch.setattr(ExpertStore, "read_part", reads)
        routed.executor.plan_access = interrupted
        for _ in range(steps):
            try:
                routed.run()
            except (CheckpointError, KeyboardInterrupt):
                failed += 1
        del routed.executor.plan_access
    assert 0 < failed < steps
