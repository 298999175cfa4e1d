"""Whole models on the late device: stock's bits wherever experts are, whoever moves them, and whatever is late.

Stock transformers runs on the CPU, whose kernels the late device uses. Replay has to count what the run counted. The
quick suite covers every pair of values of FACTORS; `tools/test --all` runs the product of PLACES for every family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import offmoe
from offmoe.api import load
from offmoe.budget.inspect import inspect
from offmoe.compute.kernels import device as device_kernels
from offmoe.hf.load.options import sort_options
from offmoe.simulate.replay import replay
from offmoe.trace.trace import read_trace
from offmoe.transfer.staging import staging_plan
from offmoe.types import DISK
from tests import tiny
from tests.late_device import extension
from tests.late_device.cases import Case, pairwise, product
from tests.late_device.extension import EARLIEST, EARLY_COPIES, LATEST, LateKind
from tests.late_device.kernels import LateKernels

FACTORS: dict[str, tuple[Any, ...]] = {
    "family": tiny.FAMILIES,
    "mode": ("bitwise", "numeric", "host computes"),
    "ram": ("none", "some", "all"),
    "prefetch": (0, 2, "auto"),
    "dense": ("resident", "in RAM", "on disk"),
    "search": ("greedy", "beams", "batch"),
    "scope": ("layer", "model"),
    "when": (LATEST, EARLIEST, EARLY_COPIES),
    "fill": (False, True),
}
EAGER = sort_options({"attn_implementation": "eager"})
SAME = 2e-5
"""Relative L2 of float32 logits whose sums run in another order."""
PROMPTS = (tiny.prompt(), tiny.prompt(1, 1), tiny.prompt(1, 40, seed=5))


def allowed(case: Case) -> bool:
    """The numeric modes need Triton's names of kernels; dense weights go to the disk where there is no RAM for them."""
    if case["mode"] != "bitwise" and not device_kernels.available():
        return False
    return (case["dense"] == "on disk") <= (case["ram"] == "none")


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Path, dict[str, list[torch.Tensor]]]]:
    """Per family, a checkpoint and what stock makes of it, as far as tests have asked."""
    return {}


def use(model: tiny.Model, device: str, search: str) -> list[torch.Tensor]:
    """Logits of prompts of several lengths, and the tokens of a search."""
    rows = {"batch": 3, "beams": 1}.get(search, 1)
    ids = tiny.prompt(rows, 9, seed=7).to(device)
    with torch.no_grad():
        logits = [model(prompt.to(device)).logits.cpu() for prompt in PROMPTS]
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=2 if search == "beams" else 1,
            max_new_tokens=5,
            min_new_tokens=5,
        )
    return [*logits, tokens.cpu()]


def expected(
    models: dict[str, tuple[Path, dict[str, list[torch.Tensor]]]], case: Case, new: Path
) -> tuple[Path, list[torch.Tensor]]:
    """The checkpoint of the case's family, and what stock gives."""
    family, search = case["family"], case["search"]
    if family not in models:
        sizes: dict[str, Any] = (
            {"intermediate_size": 32} if family == "gpt_oss" else {}
        )  # as in tests/test_parity.py, which says why
        models[family] = tiny.save(tiny.build(family, **sizes), new / family), {}
    folder, found = models[family]
    if search not in found:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", experts_implementation="grouped_mm"
        )
        found[search] = use(tiny.comparable(loaded), "cpu", search)
    return folder, found[search]


def options(case: Case, folder: Path) -> dict[str, Any]:
    """The options of from_pretrained that make the case."""
    chosen: dict[str, Any] = {
        "device": "late",
        "slots_per_layer": 3,
        "prefetch": case["prefetch"],
        "scope": case["scope"],
        "exactness": "bitwise" if case["mode"] == "bitwise" else "numeric",
        "on_miss": "cpu" if case["mode"] == "host computes" else "fetch",
        "fill": case["fill"],
    }
    config = offmoe.OffloadConfig(device="late", slots_per_layer=3, exactness="numeric")
    surveyed = inspect(folder, config, asked=EAGER)
    read = max(expert.read for expert in surveyed.needs.experts)
    if case["ram"] == "some":
        slots = 2 * surveyed.needs.shape.layers
        chosen["host_memory"] = (staging_plan(read).buffers + slots + 8) * (read + 4096)
    elif case["ram"] == "none":
        chosen["host_memory"] = 0
    if case["dense"] != "resident":
        chosen["device_memory"] = surveyed.plan.smallest
        del chosen["slots_per_layer"]
    return chosen


def check(case: Case, models: dict[str, Any], kind: LateKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, want = expected(models, case, tmp_path.parent)
    kind.has_kernels = case["mode"] != "bitwise"
    monkeypatch.setattr("offmoe.compute.gpu_compute.DeviceKernels", LateKernels)
    monkeypatch.setattr("offmoe.transfer.fill_queue.REST", 0.0)  # the background fill races with every access
    path = tmp_path / "run.npz"
    inspected = inspect(folder, offmoe.OffloadConfig(**options(case, folder)), asked=EAGER)
    if case["dense"] == "on disk":
        object.__setattr__(inspected.plan, "offloaded_in", DISK)  # as where the RAM is too small
    model = load(inspected, trace=path)
    extension.schedule(case["when"])
    with model.offload as offload:
        got = use(model, "late", case["search"])
        stats, plan = offload.stats(), offload.memory()
    assert (plan.offloaded_layers > 0) == (case["dense"] != "resident")
    assert stats.misses > 0
    assert stats.filled <= (offload.fill_progress().experts if case["fill"] else 0) * 2
    assert (stats.host_computed > 0) == (case["mode"] == "host computes")
    if case["mode"] == "bitwise":
        assert [torch.equal(a, b) for a, b in zip(got, want, strict=True)] == [True] * len(want)
    else:
        assert all((a - b).norm() <= SAME * b.norm() for a, b in zip(got[:-1], want[:-1], strict=True))
        assert torch.equal(got[-1], want[-1])
    trace = read_trace(path)
    assert trace.options is not None
    assert replay(trace, trace.options).stats == stats
    assert not kind.held


def named(case: Case) -> str:
    return "-".join(str(value).replace(" ", "_") for value in case.values())


@pytest.mark.parametrize("case", pairwise(FACTORS, allowed), ids=named)
def test_every_pair(
    case: Case, models: dict[str, Any], kind: LateKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, models, kind, tmp_path, monkeypatch)


PLACES = {name: FACTORS[name] for name in ("mode", "ram", "prefetch", "dense", "scope")}
"""Where experts and dense weights are, and who moves and computes them. Searches and timings take turns."""


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_product(
    family: str, models: dict[str, Any], kind: LateKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """126 cases per family, one after the other."""
    for number, case in enumerate(product({"family": (family,), **PLACES}, allowed)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, step in (("search", 1), ("when", 3), ("fill", 9)):
            case[name] = FACTORS[name][number // step % len(FACTORS[name])]
        check(case, models, kind, folder, monkeypatch)
        assert not extension.races(), case


def test_pairs_are_covered() -> None:
    factors = {"a": (1, 2, 3), "b": "xy", "c": (True, False)}
    cases = pairwise(factors, lambda case: not (case["a"] == 3 and case["c"]))
    assert len(cases) < len(product(factors, lambda case: True))
    covered = {(case["a"], case["b"]) for case in cases}
    assert covered == {(a, b) for a in (1, 2, 3) for b in "xy"}
    assert not any(case["a"] == 3 and case["c"] for case in cases)
