"""Whole models on a GPU, for tools/gpu_check: are results the same, and how fast are a 12 GiB budget and a prompt.

Results are compared by `offmoe verify`'s own code. Speeds are measured on a model of Qwen3-30B's shape, whose experts
are holes in files: they read as zeros, take no time to write, and cross the link like any other bytes. Routers and
embeddings are random, so their routing is not that of a trained model, and its hit rates mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

import offmoe
from offmoe.api import fetch
from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.hf.hub.locate import locate
from offmoe.hf.load.options import ModelOptions
from offmoe.measure.set_ups import NAMES
from offmoe.measure.verify import STOCK, Outcome, broken
from offmoe.measure.verify import verify as set_ups_compared
from tests import tiny
from tools.bench.gpu_section import Section, copy_gb_s
from tools.bench.synthetic import Qwen3Shape, write_sparse_qwen3

IMPLEMENTATIONS = ("eager", "grouped_mm")
"""Implementations of experts in stock transformers."""
TINY_FAMILIES = ("gpt_oss",)
"""Families of a dry run; tests/late_device/test_parity.py has all of them."""
QWEN3 = Qwen3Shape(hidden=2048, intermediate=768, layers=48, experts=128, top_k=8, vocabulary=8192)
TINY = Qwen3Shape(hidden=64, intermediate=32, layers=3, experts=8, top_k=2, vocabulary=97)
BUDGET = "12GiB"
SOAK_S, SETTLED = 30.0, 1
"""Seconds of the soak, and rounds after which the device's peak memory should not grow."""
RAM_SHARE = 0.4
"""Of the free RAM, what experts may take. As much again goes to the page cache, since the files are read."""


def parity(section: Section) -> None:
    """Eight families in fp32: offmoe's set-ups against each other, and against stock on this device."""
    families: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for family in TINY_FAMILIES if section.tiny else tiny.FAMILIES:
        if section.left() < 5:
            section.skip(f"{family}: out of time")
            continue
        sizes: dict[str, Any] = {"intermediate_size": 32} if family == "gpt_oss" else {}  # tests/test_parity.py
        folder = tiny.save(tiny.build(family, **sizes), section.work / family)
        own = [name for name in NAMES if name != STOCK]
        outcomes = compared(section, folder, own)
        problems += [f"{family}: {problem}" for problem in broken(outcomes)]
        families[family] = {outcome.name: outcome.status for outcome in outcomes}
        for implementation in IMPLEMENTATIONS:
            outcomes = compared(section, folder, (STOCK, "resident"), implementation)
            families[family][implementation] = stock_in_words(outcomes)
        section.note(families=families)
        print(f"  {family:12s} " + ", ".join(f"{name} {status}" for name, status in families[family].items()))
    assert not problems, "; ".join(problems)


def verify(section: Section) -> None:
    """`offmoe verify demo`: the demo in bf16, in every set-up."""
    tokens = 3 if section.tiny else 16  # graphs are captured in the second step of one token
    outcomes = compared(section, locate("demo").folder, NAMES, tokens=tokens)
    section.note(
        set_ups={outcome.name: outcome.status for outcome in outcomes},
        reasons={outcome.name: outcome.reason for outcome in outcomes if outcome.reason},
        numeric_kl={o.name: o.difference.divergence for o in outcomes if o.difference is not None},
    )
    for outcome in outcomes:
        print(f"  {outcome.name:18s} {outcome.status} {outcome.reason}")
    problems = broken(outcomes)
    assert not problems, "; ".join(problems)


def compared(
    section: Section, folder: Path, only: Sequence[str], implementation: str | None = None, tokens: int = 3
) -> list[Outcome]:
    """What `offmoe verify` finds. implementation: of experts in stock transformers."""
    config = OffloadConfig(device=section.device, exactness="bitwise")
    fetched = fetch(inspect(folder, config, asked=ModelOptions(plain=True)))
    outcomes = []
    for outcome in set_ups_compared(fetched, tokens=tokens, only=only, implementation=implementation):
        outcomes.append(outcome)
        if section.left() < 3:
            section.skip(f"set-ups of {folder.name} after {outcome.name}: out of time")
            break
    return outcomes


def stock_in_words(outcomes: Sequence[Outcome]) -> str:
    """How far stock transformers is from offmoe, which is measured and not asserted: its kernels are its own."""
    last = outcomes[-1]
    if outcomes[0].status == "left out":
        return f"left out: {outcomes[0].reason}"
    return "equal" if last.difference is None else f"logits differ by up to {last.difference.largest:.1e}"


def budget(section: Section) -> None:
    """Decoding in a budget of 12 GiB, with experts in pinned RAM behind it: tokens/s, bytes, share of the link."""
    folder = synthetic(section)
    link = link_gb_s(section)
    rows = []
    for prefetch in (0, "auto"):
        model: Any = offmoe.from_pretrained(folder, prefetch=prefetch, **options(section, folder, 512))
        with model.offload:
            filled_s = wait_for_fill(section, model)
            pinned = model.offload.pin_progress()
            began_with = model.offload.fill_progress()
            per_token = decode_s(section, model, 4, seed=1) / 4
            tokens = 4 if section.tiny else int(max(4, min(64, section.left() / 4 / per_token)))
            model.offload.reset_stats()
            wall, stats = decode_s(section, model, tokens, seed=2), model.offload.stats()
            slots = model.offload.memory().slots_per_layer
        rows.append(
            {
                "prefetch": prefetch,
                "slots": sum(slots),
                "filled_experts": began_with.experts,
                "filled_s": round(filled_s, 2),
                "pinned_slots": pinned.pinned,
                "pinnable_slots": pinned.total,
                "tokens_per_s": round(tokens / wall, 3),
                "hit_rate": round(stats.hit_rate, 4),
                "h2d_gb_s": round(stats.h2d_bytes / wall / 1e9, 3),
                "share_of_link": round(stats.h2d_bytes / wall / 1e9 / link, 3),
                "disk_mb_per_token": round(stats.disk_bytes / tokens / 1e6, 2),
                "stall_ms_per_token": round(stats.stall_s / tokens * 1e3, 3),
            }
        )
        section.note(rows=rows, link_gb_s=round(link, 2), experts_gb=round(expert_gb(section), 1))
        print("  " + ", ".join(f"{key} {value}" for key, value in rows[-1].items()))


def prefill(section: Section) -> None:
    """Prompts in the same budget: tokens/s by their length. Each uses nearly every expert once."""
    folder, lengths = synthetic(section), (16, 70) if section.tiny else (128, 512, 2048)
    model: Any = offmoe.from_pretrained(folder, prefetch=0, **options(section, folder, lengths[-1] + 1))
    rows: list[dict[str, Any]] = []
    with model.offload, torch.no_grad():
        wait_for_fill(section, model)
        for length in lengths:
            if rows and section.left() < 3 * rows[-1]["s"] * length / rows[-1]["tokens"]:
                section.skip(f"prompts of {length} tokens and more: out of time")
                break
            ids = torch.randint(0, shape(section).vocabulary, (1, length)).to(section.device)
            model.offload.reset_stats()
            section.wait()
            began = time.perf_counter()
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
            section.wait()
            seconds, stats = time.perf_counter() - began, model.offload.stats()
            rows.append(
                {
                    "tokens": length,
                    "s": round(seconds, 3),
                    "tokens_per_s": round(length / seconds, 1),
                    "h2d_gb_s": round(stats.h2d_bytes / seconds / 1e9, 3),
                    "h2d_gb": round(stats.h2d_bytes / 1e9, 2),
                }
            )
            section.note(rows=rows)
            print("  " + ", ".join(f"{key} {value}" for key, value in rows[-1].items()))


def soak(section: Section) -> None:
    """A token, a batch and a prompt on the demo in turns, with other numbers of slots, for 30 s: always the same."""
    generator = torch.Generator().manual_seed(7)
    requests = [torch.randint(3, 900, size, generator=generator) for size in ((1, 1), (3, 5), (1, 60))]
    same: dict[str, Any] = {"device": section.device, "dtype": torch.bfloat16, "max_context": 512}
    want = answers(offmoe.from_pretrained("demo", slots_per_layer=8, prefetch=0, **same), requests, close=True)
    model: Any = offmoe.from_pretrained("demo", slots_per_layer=2, prefetch=2, host_memory="64MiB", **same)
    began, rounds, first_peak = time.monotonic(), 0, 0
    seconds = min(SOAK_S, section.left() - 4)
    with model.offload:
        while rounds < 2 if section.tiny else time.monotonic() - began < seconds:
            slots = 2 + rounds % 3
            if rounds:
                model.offload.resize(slots_per_layer=slots)
            got = answers(model, requests)
            section.wait()
            if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
                raise AssertionError(f"round {rounds + 1}, with {slots} slots per layer, gave other logits")
            rounds += 1
            if rounds == SETTLED:
                first_peak = torch.accelerator.max_memory_reserved()
        stats = model.offload.stats()
    peak = torch.accelerator.max_memory_reserved()
    section.note(rounds=rounds, seconds=round(time.monotonic() - began, 1), misses=stats.misses, peak_bytes=peak)
    section.note(grown_bytes=peak - first_peak)
    print(f"  {rounds} rounds, {stats.misses} misses, always the same logits")


def answers(model: Any, requests: Sequence[torch.Tensor], close: bool = False) -> list[torch.Tensor]:
    """Logits of each request, on the host."""
    with torch.no_grad():
        logits = [model(ids.to(model.device)).logits.cpu() for ids in requests]
    if close:
        model.offload.close()
    return logits


def shape(section: Section) -> Qwen3Shape:
    """The synthetic model, with as many layers as the RAM holds experts of."""
    if section.tiny:
        return TINY
    layer = QWEN3.experts * QWEN3.expert_bytes
    return QWEN3._replace(layers=max(2, min(QWEN3.layers, int(psutil.virtual_memory().available * RAM_SHARE / layer))))


def expert_gb(section: Section) -> float:
    """GB of all experts of the synthetic model."""
    sizes = shape(section)
    return sizes.layers * sizes.experts * sizes.expert_bytes / 1e9


def synthetic(section: Section) -> Path:
    """The synthetic model's folder."""
    folder = section.work / f"synthetic-{section.name}"
    write_sparse_qwen3(folder, shape(section))
    return folder


def options(section: Section, folder: Path, max_context: int) -> dict[str, Any]:
    """Options of a model in the budget; in a dry run, one that holds a part of the experts too."""
    chosen: dict[str, Any] = {"device": section.device, "max_context": max_context, "fill": True}
    if not section.tiny:
        return {**chosen, "device_memory": BUDGET}
    smallest = inspect(folder, OffloadConfig(device=section.device, max_context=max_context)).plan.smallest_dense
    return {**chosen, "device_memory": smallest + TINY.experts * TINY.expert_bytes}


def wait_for_fill(section: Section, model: Any) -> float:
    """Seconds until the background fill has ended and RAM is pinned, at most a third of what is left."""
    began, limit = time.monotonic(), section.left() / 3
    while (progress := model.offload.fill_progress()).running or model.offload.pin_progress().running:
        if time.monotonic() - began > limit:
            section.skip(f"filling RAM: {progress.experts} of {progress.total_experts} experts in {limit:.0f} s")
            break
        time.sleep(0.05)
    return time.monotonic() - began


def decode_s(section: Section, model: Any, tokens: int, seed: int) -> float:
    """Seconds of sampled decoding from one token on."""
    torch.manual_seed(seed)
    ids = torch.tensor([[5]]).to(section.device)
    section.wait()
    began = time.perf_counter()
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=tokens, min_new_tokens=tokens
    )
    section.wait()
    return time.perf_counter() - began


def link_gb_s(section: Section) -> float:
    """GB/s of copies of one expert from pinned memory."""
    nbytes = shape(section).expert_bytes
    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
    return copy_gb_s(section, source, torch.empty(nbytes, dtype=torch.uint8, device=section.device))
