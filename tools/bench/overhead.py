#!/usr/bin/env python3
"""What offmoe costs when nothing has to move: decode time per token against stock transformers, and time per plan.

What moves: nothing; every expert of the demo model has a slot. The rounds interleave stock (eager and grouped_mm) and
offmoe on the same prompt, so that drift of the machine cancels: the figure is the median over rounds of offmoe's time
divided by the faster stock's time in the same round. Plans are timed by replaying the accesses of a recorded run
through the runtime's planner, at 4 of 8 slots, after the cache has filled."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel

import offmoe
from offmoe.config import CacheOptions
from offmoe.hf.load import resolve_folder
from offmoe.policy.planner import build_planner
from offmoe.trace import read_trace

PROMPT = "In the beginning God created the heaven and the earth. And the earth was without form, and"


def seconds_per_token(model: PreTrainedModel, inputs: dict[str, torch.Tensor], tokens: int) -> float:
    began = time.perf_counter()
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return (time.perf_counter() - began) / tokens


def plan_seconds(trace_path: Path, slots: int, repeats: int) -> list[float]:
    """Seconds of each plan of the second half of a recorded run, the fastest of some repeats."""
    trace = read_trace(trace_path)
    accesses = [a for a in trace.accesses() if a.tail == 1]
    best: list[float] = []
    for _ in range(repeats):
        planner = build_planner(CacheOptions(slots_per_layer=slots, prefetch=0), trace.shape)
        times = []
        for access in accesses:
            began = time.perf_counter()
            planner.plan(access)
            times.append(time.perf_counter() - began)
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

    folder = resolve_folder("demo")
    inputs = dict(AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt"))
    with tempfile.TemporaryDirectory() as scratch:
        recording = Path(scratch) / "run.npz"
        recorded = offmoe.from_pretrained("demo", device="cpu", slots_per_layer=4, trace=recording)
        recorded.generate(**inputs, max_new_tokens=256, min_new_tokens=256, do_sample=True)
        recorded.offload.close()
        plans = plan_seconds(recording, slots=4, repeats=5)
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
    ratio, plan_us = statistics.median(ratios), statistics.median(plans) * 1e6
    p99 = sorted(plans)[int(len(plans) * 0.99)] * 1e6

    print(f"decode of the demo model, every expert resident, {args.threads} thread(s), median of {args.rounds} rounds")
    for name, found in times.items():
        print(f"  {name:10} {statistics.median(found) * 1e3:7.2f} ms/token")
    print(f"  offmoe / faster stock, per round: {ratio:.3f}  (from {min(ratios):.3f} to {max(ratios):.3f})")
    print(
        f"plans at 4 of 8 slots, {len(plans)} layers of decoding: median {plan_us:.1f} us, 99th percentile {p99:.1f} us"
    )
    if args.json:
        print(json.dumps({"ratio_vs_stock": round(ratio, 4), "plan_us": round(plan_us, 2)}))


if __name__ == "__main__":
    main()
