"""Contenders, in this process: both runtimes do the same work, and say truly what it was."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import offmoe
from offmoe.bench import contender
from offmoe.bench.contender import Contender
from offmoe.bench.messages import ACCELERATE, Costs, Pass, Task
from offmoe.measure import calibrate
from offmoe.trace.trace import write_trace
from tests import families, tiny
from tests.hf.test_replay import routing

ADAPTED = ("dbrx", "jetmoe", "llama4_text", "longcat_flash", "nllb-moe", "step3p7", "switch_transformers")
PROMPT = tuple(tiny.prompt(1, 5)[0].tolist())


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(contender, "COMPUTE_SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "LEAST_ROUNDS", 1)


def stock(task: Task, scratch: Path, **changes: Any) -> Task:
    return replace(task, runtime=ACCELERATE, options={}, scratch=str(scratch), **changes)


def test_both_do_the_same_work(task: Task, tmp_path: Path) -> None:
    works = [Pass(PROMPT, 4), Pass(PROMPT, 4, forced=(7, 8, 9, 10))]
    with closing(Contender(task)) as ours, closing(Contender(stock(task, tmp_path))) as theirs:
        pairs = [(ours.run(work), theirs.run(work)) for work in works]
        assert theirs.costs() == Costs(None, None)
        assert (ours.peak()["rss"] or 0) > 50 << 20
        assert ours.peak()["device"] is None
    for a, b in pairs:
        assert (a.tokens, a.digest) == (b.tokens, b.digest)
        assert len(a.token_s) == 3
        assert b.stats is None
        assert a.stats is not None
        assert a.stats["hits"] + a.stats["pending"] + a.stats["misses"] == 3 * 3 * 2  # of decoding alone
    assert pairs[0][0].digest != pairs[1][0].digest  # what is forced is what comes next
    model = offmoe.from_pretrained(task.model, device="cpu", slots_per_layer=8, prefetch=0)
    with model.offload:
        out = model.generate(input_ids=torch.tensor([PROMPT]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert pairs[0][0].tokens == tuple(out[0, 5:].tolist())


def test_most_on_disk_gives_the_same(task: Task, tmp_path: Path) -> None:
    """With less memory than the model, accelerate leaves layers in its folder."""
    work = Pass(PROMPT, 3)
    with closing(Contender(stock(task, tmp_path, device_memory=200_000))) as theirs:
        assert "disk" in theirs.model.hf_device_map.values()
        there = theirs.run(work)
    with closing(Contender(task)) as ours:
        assert ours.run(work).digest == there.digest


def test_a_replayed_routing_drives_both(task: Task, tmp_path: Path) -> None:
    write_trace(tmp_path / "r.npz", routing())
    work = Pass(PROMPT, 4, row=2)
    replayed = str(tmp_path / "r.npz")
    with (
        closing(Contender(replace(task, routing=replayed))) as ours,
        closing(Contender(stock(task, tmp_path, routing=replayed))) as theirs,
        closing(Contender(task)) as plain,
    ):
        digest = ours.run(work).digest
        assert theirs.run(work).digest == digest
        assert plain.run(work).digest != digest
        compute_s = ours.costs().compute_s
        assert compute_s is not None
        assert compute_s > 0
        assert ours.run(work).digest == digest  # the replay goes on after the costs


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated"
)  # diffusion_gemma imports torch's compiler
@pytest.mark.parametrize("family", [*ADAPTED, "diffusion_gemma"])
def test_families_outside_the_registry(task: Task, family: str, tmp_path: Path) -> None:
    tiny_model = families.build(family, torch.bfloat16)
    if family == "diffusion_gemma":
        tiny_model.generation_config.max_denoising_steps = 4
    folder = tiny.save(tiny_model, tmp_path / "model")
    ours = replace(task, model=str(folder))
    recording = str(tmp_path / "r.npz")
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, trace=recording)
    with model.offload:
        model.generate(input_ids=torch.tensor([PROMPT[::-1]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    work, digests = Pass(PROMPT, 4, row=2), []
    for routed_by in ("", recording):
        one, other = replace(ours, routing=routed_by), stock(ours, tmp_path, routing=routed_by)
        with closing(Contender(one)) as a, closing(Contender(other)) as b:
            found, there = a.run(work), b.run(work)
            assert (found.tokens, found.digest) == (there.tokens, there.digest)
            assert all(second > 0 for second in (*found.token_s, *there.token_s))
            assert (a.costs().compute_s is None) == (family == "diffusion_gemma")
            assert a.run(work).digest == found.digest
        digests.append(found.digest)
    assert (digests[0] == digests[1]) == (family == "nllb-moe")  # whose tokens have the same two experts always
