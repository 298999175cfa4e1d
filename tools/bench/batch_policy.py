#!/usr/bin/env python3
"""Which policy keeps the best experts when many rows are decoded in step, by replay.

The requests of a recording become the rows of a batch: each step holds the next token of as many requests as there are
rows, and a request that ends makes room for the next. Prompts are left out. For each number of rows, slots per layer
and policy: experts read per token, and with --json the hit rates. "none" is what a cache without slots that last would
read: each step's union of experts. Without a trace, the demo model is recorded first.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np

from offmoe.config import CacheOptions
from offmoe.simulate.replay import Recording, belady, replay
from offmoe.trace.trace import Trace, read_trace

POLICIES = ("lru", "aged-lfu", "lru-2", "s3-fifo", "sieve")


def interleaved(trace: Trace, width: int) -> Trace:
    """The decoded tokens of a trace as `width` rows in step."""
    decoded = ~trace.prefill
    waiting = deque(np.flatnonzero(decoded & (trace.request == request)) for request in np.unique(trace.request))
    active: list[deque[int]] = []
    rows: list[int] = []
    step: list[int] = []
    while waiting or active:
        while waiting and len(active) < width:
            active.append(deque(waiting.popleft().tolist()))
        active = [row for row in active if row]
        for row in active:
            rows.append(row.popleft())
            step.append(len(rows) if row is active[0] else step[-1])
    numbers = np.unique(np.array(step), return_inverse=True)[1]
    return replace(trace.select(np.array(rows), numbers), predicted=None)


def record_demo(path: Path, requests: int, tokens: int) -> None:
    """Record requests of the demo model."""
    from transformers import AutoTokenizer

    import offmoe
    from offmoe.cli.bench import TEXTS
    from offmoe.hf.hub.locate import locate

    tokenizer: Any = AutoTokenizer.from_pretrained(locate("demo").folder)
    words = " ".join(TEXTS).split()
    starts = [i * (len(words) - 6) // requests for i in range(requests)]
    ids = tokenizer([" ".join(words[start : start + 6]) for start in starts])["input_ids"]
    model: Any = offmoe.from_pretrained("demo", device="cpu", trace=path)
    with model.offload as offload:
        offload.generate_many(ids, max_new_tokens=tokens, do_sample=True, seed=0, eos_token_id=None)


def measure(
    trace: Trace, widths: list[int], capacities: list[int], policies: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Experts read per token by rows, slots per layer and policy."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for width in widths:
        recording = Recording(interleaved(trace, width))
        tokens = recording.trace.tokens
        for slots in capacities:
            options = CacheOptions(slots_per_layer=slots, prefetch=0)
            counts = {policy: replay(recording, replace(options, eviction=policy)).stats.misses for policy in policies}
            counts["belady"] = belady(recording, options).misses
            counts["none"] = sum(len(access.demands) for access in recording.accesses())
            found.setdefault(str(width), {})[str(slots)] = {name: count / tokens for name, count in counts.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a recording (default: of the demo model, made now)")
    parser.add_argument("--widths", default="1,4,16,64", help="rows at the same time")
    parser.add_argument("--policies", default=",".join(POLICIES), help="eviction policies to compare")
    parser.add_argument("--slots", default="", help="slots per layer (default: a quarter, a half, three quarters)")
    parser.add_argument("--requests", type=int, default=128, help="of the demo model")
    parser.add_argument("--tokens", type=int, default=24, help="of each request of the demo model")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.trace or Path(folder, "demo.npz")
        if args.trace is None:
            record_demo(path, args.requests, args.tokens)
        trace = read_trace(path)
    experts = max(trace.shape.experts)
    capacities = [int(n) for n in args.slots.split(",") if n] or [experts // 4, experts // 2, 3 * experts // 4]
    widths = [int(width) for width in args.widths.split(",")]
    policies = args.policies.split(",")
    found = measure(trace, widths, capacities, policies)
    names = [*policies, "belady", "none"]
    print(
        f"experts read per token, of {max(trace.shape.expert_bytes)} bytes\nrows slots "
        + "".join(f"{name:>10}" for name in names)
    )
    for width, by_slots in found.items():
        for slots, counts in by_slots.items():
            print(f"{width:>4} {slots:>5} " + "".join(f"{counts[name]:10.3f}" for name in names))
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
