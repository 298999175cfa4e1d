#!/usr/bin/env python3
"""Measures what offmoe costs when nothing has to move: time per token against stock transformers, and time per plan.

Every expert of the demo model has a slot. The rounds interleave stock (eager and grouped_mm) and offmoe on the same
prompt, so that drift of the machine cancels. The figure is offmoe's time divided by the faster stock's time in the same
round, as a median over rounds. Plans are timed by replaying the accesses of a recorded run through the runtime's
planner after the cache has filled, at 4 of 8 slots; and on random skewed routing of 128 experts, top-8, with 32 slots
and 64 in RAM. Plans are timed in CPU time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
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
from offmoe.trace.trace import read_trace
from offmoe.types import Access, CacheShape, single_demands

PROMPT = "In the beginning God created the heaven and the earth. And the earth was without form, and"


def seconds_per_token(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> float:
    began = time.perf_counter()
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return (time.perf_counter() - began) / tokens


def skewed(steps: int, experts: int, top_k: int) -> list[Access]:
    """Random routing of one layer: some experts are popular throughout, others for a while."""
    chance = np.random.default_rng(0)
    popular, lately = chance.standard_normal(experts), np.zeros(experts)
    accesses = []
    for _ in range(steps):
        lately = 0.9 * lately + 0.5 * chance.standard_normal(experts)
        score = popular + lately + 0.7 * chance.gumbel(size=experts)
        accesses.append(Access(0, single_demands(np.argpartition(-score, top_k)[:top_k].tolist(), experts), 1))
    return accesses


def plan_seconds(accesses: list[Access], shape: CacheShape, options: CacheOptions, repeats: int) -> list[float]:
    """CPU seconds of each plan in the second half of a run; the least of some repeats."""
    best: list[float] = []
    for _ in range(repeats):
        planner = build_planner(options, shape)
        times = []
        for access in accesses:
            began = time.thread_time()
            planner.plan(access)
            times.append(time.thread_time() - began)
        best = times if not best else [min(a, b) for a, b in zip(best, times, strict=True)]
    return best[len(best) // 2 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    folder = locate("demo").folder
    inputs = dict(AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt"))
    with tempfile.TemporaryDirectory() as scratch:
        recording = Path(scratch) / "run.npz"
        recorded = offmoe.from_pretrained("demo", device="cpu", slots_per_layer=4, trace=recording)
        recorded.generate(**inputs, max_new_tokens=256, min_new_tokens=256, do_sample=True)
        recorded.offload.close()
        trace = read_trace(recording)
        single = [access for access in trace.accesses() if access.tail == 1]
        plans = plan_seconds(single, trace.shape, CacheOptions(slots_per_layer=4), repeats=5)
    with_ram = CacheOptions(slots_per_layer=32, host_slots=64)
    three_tiers = plan_seconds(skewed(3000, 128, 8), CacheShape((128,), (8,), (1,)), with_ram, repeats=5)
    models = {
        name: transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", experts_implementation=name
        ).eval()
        for name in ("eager", "grouped_mm")
    }
    models["offmoe"] = offmoe.from_pretrained("demo", device="cpu", slots_per_layer=8)
    for model in models.values():
        seconds_per_token(model, inputs, args.tokens)
    times: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for i in range(args.rounds):
        for name in names[i % 3 :] + names[: i % 3]:
            times[name].append(seconds_per_token(models[name], inputs, args.tokens))
    models["offmoe"].offload.close()
    ratios = [ours / min(a, b) for a, b, ours in zip(times["eager"], times["grouped_mm"], times["offmoe"], strict=True)]
    ratio = statistics.median(ratios)
    (plan_us, plan_p99), (ram_us, ram_p99) = _median_and_p99(plans), _median_and_p99(three_tiers)

    print(f"decode of the demo model, every expert resident, {args.threads} thread(s), median of {args.rounds} rounds")
    for name, found in times.items():
        print(f"  {name:10} {statistics.median(found) * 1e3:7.2f} ms/token")
    print(f"  offmoe / faster stock, per round: {ratio:.3f}  (from {min(ratios):.3f} to {max(ratios):.3f})")
    print(f"plans at 4 of 8 slots, {len(plans)} layers of decoding: median {plan_us:.1f} us, p99 {plan_p99:.1f} us")
    print(f"plans of 128 experts, top-8, at 32 slots and 64 in RAM: median {ram_us:.1f} us, p99 {ram_p99:.1f} us")
    if args.json:
        print(json.dumps({"ratio_vs_stock": round(ratio, 4), "plan_us": round(plan_us, 2), "ram_us": round(ram_us, 2)}))


def _median_and_p99(seconds: list[float]) -> tuple[float, float]:
    """Median and 99th percentile in microseconds."""
    return statistics.median(seconds) * 1e6, sorted(seconds)[int(len(seconds) * 0.99)] * 1e6


if __name__ == "__main__":
    main()
