#!/usr/bin/env python3
"""Measures what prefetch="auto" gains and costs, by the time of a read relative to computing. Nothing is timed.

The routing is replayed and priced. The demo model's routing is recorded with its own predictions. gpt-oss-20b's comes
from the test data: two requests, predicted by the transition counts of the first. Two adversaries predict at random,
and right and at random in turn, 100 tokens each. A cost is the time of one read divided by the time that a layer
computes for one token, half of it in the experts. At 100, hardly anything can be hidden and each wasted read is lost
time; at 0.1, reading is almost hidden by itself. Gains are time off / time - 1. The figures are the same on every
machine where the demo model samples the same text.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

import offmoe
from offmoe.config import CacheOptions
from offmoe.hf.hub.locate import locate
from offmoe.policy.planner import build_planner
from offmoe.profile import CostModel
from offmoe.simulate.clock import Clock
from offmoe.simulate.predictions import transition_predictions
from offmoe.simulate.replay import Recording
from offmoe.trace.trace import NONE, Trace, read_trace
from offmoe.types import CacheShape, CacheStats

TEXT = Path(__file__).parent / "quality.txt"
FIXTURE = Path(__file__).parents[2] / "tests" / "data" / "gptoss20b_6req.npz"
READ_S, EXPERT_BYTES = 1e-3, 1 << 20  # of as many bytes as "auto" cares about
COSTS = (100.0, 10.0, 3.0, 1.0, 0.3, 0.1)


def record_demo(prompts: int = 8, tokens: int = 150) -> Trace:
    """The demo model continues lines of a text, sampled, with the predictions of its own routers."""
    folder = locate("demo").folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [line[:120] for line in TEXT.read_text(encoding="utf-8").splitlines() if len(line) > 80]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "run.npz"
        model = offmoe.from_pretrained("demo", device="cpu", slots_per_layer=4, prefetch=2, trace=path)
        torch.manual_seed(0)
        for line in lines[:: len(lines) // prompts][:prompts]:
            inputs = tokenizer(line, return_tensors="pt")
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True)
        model.offload.close()
        return read_trace(path)


def real_routing(requests: int = 2) -> Trace:
    """Requests of the test data, predicted by the transition counts of the first request, which flatters that one."""
    trace = read_trace(FIXTURE)
    trace = trace.select(trace.request < requests)
    return replace(trace, predicted=transition_predictions(trace, frozenset(range(1, requests))))


def at_random(trace: Trace, seed: int = 0) -> Trace:
    """Random predictions."""
    chance = np.random.default_rng(seed)
    predicted = np.full((trace.tokens, trace.shape.layers, max(trace.shape.top_k)), NONE, np.int16)
    for layer, experts in enumerate(trace.shape.experts[1:], start=1):
        order = np.argsort(chance.random((trace.tokens, experts)), axis=1)  # [T, E]
        predicted[:, layer] = order[:, : predicted.shape[2]]
    return replace(trace, predicted=predicted)


def in_turn(trace: Trace, tokens: int = 100) -> Trace:
    """Predictions that are right for some tokens, then random for as many."""
    right = (np.arange(trace.tokens) // tokens % 2 == 0)[:, None, None]
    otherwise = at_random(trace).predicted
    assert otherwise is not None
    return replace(trace, predicted=np.where(right, trace.experts, otherwise))


def costs(shape: CacheShape, cost: float) -> CostModel:
    """A machine on which one read takes `cost` times as long as a layer computes for one token."""
    layer_us = READ_S / cost * 1e6
    return CostModel(
        disk_gb_s=shape.expert_bytes[0] / READ_S / 1e9,
        expert_us_device=layer_us / 2 / shape.top_k[0],
        dense_us_per_token=layer_us / 2 * shape.layers,
    )


def run(recording: Recording, options: CacheOptions) -> tuple[CacheStats, list[float]]:
    """The counts of one configuration, and its seconds at each cost."""
    shape = replace(recording.shape, expert_bytes=(EXPERT_BYTES,) * recording.shape.layers)
    planner, stats = build_planner(options, shape), CacheStats.for_layers(shape.layers)
    clocks = [Clock(costs(shape, cost), shape) for cost in COSTS]
    for step in recording.steps:
        for access in step.accesses:
            plan = planner.plan(access)
            stats.add(plan, shape)
            for clock in clocks:
                clock.add(access, plan, step.rows)
    return stats, [clock.now_s for clock in clocks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there too, gains in percent")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    demo, real = record_demo(), real_routing()
    routings = {
        "demo": (demo, (2, 3, 4, 6)),
        "demo, perfect": (replace(demo, predicted=demo.experts), (2, 4)),
        "demo, in turn": (in_turn(demo), (2, 4)),
        "demo, random": (at_random(demo), (2, 4)),
        "gpt-oss-20b": (real, (4, 8, 16)),
        "gpt-oss-20b, in turn": (in_turn(real), (8,)),
        "gpt-oss-20b, random": (at_random(real), (8,)),
    }
    print(f"gain over prefetch=0, by the time of a read / of computing a layer\n{'':44}" + "read for    needed")
    print(f"{'routing':22}{'slots':>6} {'prefetch':8}" + f"{'issued':>8}" + " nothing     reads" + _row(COSTS, "7g"))
    found: list[dict[str, Any]] = []
    counts = []
    for name, (trace, capacities) in routings.items():
        recording = Recording(trace)
        for slots in capacities:
            _, off = run(recording, CacheOptions(slots_per_layer=slots, prefetch=0))
            for prefetch in (1, "auto"):
                stats, times = run(recording, CacheOptions(slots_per_layer=slots, prefetch=prefetch))
                gains = [base / seconds - 1 for base, seconds in zip(off, times, strict=True)]
                wasted, needed = stats.prefetched - stats.prefetched_used, stats.misses + stats.prefetched_used
                print(
                    f"{name:22}{slots:6} {prefetch!s:8}{stats.prefetched:8}{wasted:8}{needed:10}"
                    + _row([100 * gain for gain in gains], "+6.1f", "%")
                )
                found.append({"routing": name, "slots": slots, "prefetch": prefetch, "gains": gains})
                counts.append((stats.prefetched, wasted, needed))
    worst = min(min(row["gains"]) for row in found if row["prefetch"] == "auto")
    print(f"auto at worst {100 * worst:+.1f} %")
    if args.csv is not None:
        with args.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            gains_at = [f"gain_{cost:g}" for cost in COSTS]
            writer.writerow(("routing", "slots", "prefetch", "issued", "wasted", "needed", *gains_at))
            for row, issued in zip(found, counts, strict=True):
                texts = [f"{100 * gain:.1f}" for gain in row["gains"]]
                writer.writerow((row["routing"], row["slots"], row["prefetch"], *issued, *texts))
    if args.json:
        print(json.dumps({"worst": worst, "costs": COSTS, "rows": found}))


def _row(values: tuple[float, ...] | list[float], form: str, unit: str = "") -> str:
    return "".join(f" {value:{form}}{unit}" for value in values)


if __name__ == "__main__":
    main()
