#!/usr/bin/env python3
"""Measures what recording the routing costs: time per token of the demo model with and without a trace, in pairs.

Both runs decode the same tokens with every expert resident, in turn and in changing order, so that drift of the machine
affects both. The figure is the ratio within a round, as a median over rounds. Writing the file happens once and is
timed separately. `--null` compares two models without a trace; its spread is the smallest difference that this machine
can show. If the effect is smaller, use the other figure: the time of the writer's calls for one token, measured alone,
divided by the time of a token.
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
from offmoe.budget.inspect import inspect
from offmoe.config import CacheOptions
from offmoe.hf.hub.locate import locate
from offmoe.trace.recorder import TraceWriter
from offmoe.types import CacheShape

PROMPT = "In the beginning God created the heaven and the earth. And the earth was without form, and"


def seconds_per_token(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> float:
    """CPU time of the process, not wall time, so that other work on the machine does not count."""
    began = time.process_time()
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return (time.process_time() - began) / tokens


def writer_seconds(shape: CacheShape, path: Path, tokens: int = 2000) -> float:
    """Seconds of the writer per decoded token: a step, and a record per layer; the fastest of some repeats."""
    ids, one = np.zeros((1, max(shape.top_k)), np.int64), np.zeros(1, np.int32)
    best = float("inf")
    for _ in range(5):
        writer = TraceWriter(path, "demo", shape, CacheOptions())
        began = time.process_time()
        for _ in range(tokens):
            writer.begin_step(1, one, one)
            for layer in range(shape.layers):
                writer.record(layer, ids, None)
        best = min(best, (time.process_time() - began) / tokens)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--null", action="store_true", help="record in neither model")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    inputs = dict(AutoTokenizer.from_pretrained(locate("demo").folder)(PROMPT, return_tensors="pt"))
    with tempfile.TemporaryDirectory() as scratch:
        recording = None if args.null else Path(scratch) / "run.npz"
        options = {"device": "cpu", "slots_per_layer": args.slots, "prefetch": 0}
        models = {
            "plain": offmoe.from_pretrained("demo", **options),
            "recording": offmoe.from_pretrained("demo", trace=recording, **options),
        }
        for model in models.values():
            seconds_per_token(model, inputs, args.tokens)
        times: dict[str, list[float]] = {name: [] for name in models}
        for i in range(args.rounds):
            for name in sorted(models, reverse=bool(i % 2)):
                times[name].append(seconds_per_token(models[name], inputs, args.tokens))
        models["plain"].offload.close()
        began = time.perf_counter()
        models["recording"].offload.close()
        write_s = time.perf_counter() - began
        shape = inspect("demo", offmoe.OffloadConfig(device="cpu", slots_per_layer=args.slots)).catalog.shape
        writer_s = writer_seconds(shape, Path(scratch) / "alone.npz")
        file_bytes = recording.stat().st_size if recording is not None else 0
    ratios = [b / a for a, b in zip(times["plain"], times["recording"], strict=True)]
    ratio = statistics.median(ratios)
    share = writer_s / min(times["plain"])
    low, _, high = statistics.quantiles(ratios, n=4)

    print(f"decode of the demo model, {args.slots} slots per layer, {args.threads} thread(s), {args.rounds} rounds")
    for name, found in times.items():
        print(f"  {name:10} {statistics.median(found) * 1e3:7.3f} ms of CPU per token")
    print(f"  recording / plain, median of rounds: {ratio:.4f}  (quartiles {low:.4f} and {high:.4f})")
    print(f"  the writer alone: {writer_s * 1e6:.1f} us per token, {100 * share:.2f} % of the fastest plain round")
    print(f"  writing the file once: {write_s * 1e3:.1f} ms, {file_bytes} bytes")
    if args.json:
        print(
            json.dumps(
                {
                    "ratio": round(ratio, 4),
                    "quartiles": [round(low, 4), round(high, 4)],
                    "writer_share": round(share, 5),
                    "write_s": round(write_s, 4),
                }
            )
        )


if __name__ == "__main__":
    main()
