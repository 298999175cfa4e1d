"""Measures attention of one new token on the CPU: torch's operator with grouped heads against heads as rows.

Shapes are Qwen3-30B-A3B's (32 heads in 4 groups) and Mixtral's (32 in 8), with keys of 128 in bf16. Both ways run in
turns. Prints microseconds per layer by threads and tokens in the cache, and their ratio; --json prints one object as
the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import checkout  # noqa: F401
import torch
import torch.nn.functional as F
from torch import nn

from offmoe.device.cores import usable_cores
from offmoe.hf.load.grouped_attention import grouped_attention

HEADS, WIDTH = 32, 128
GROUPS = {"qwen3": 4, "mixtral": 8}
CONTEXTS = (128, 1024, 4096)


def microseconds(run: Callable[[], object]) -> float:
    """Time of one call."""
    began = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - began)


def compare(groups: int, context: int, rounds: int) -> dict[str, float]:
    """Medians of both ways, and of their ratio by round."""
    query = torch.randn(1, HEADS, 1, WIDTH).bfloat16()
    key, value = torch.randn(2, 1, groups, context, WIDTH).bfloat16()
    ways: dict[str, Callable[[], object]] = {
        "torch_us": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
        "rows_us": lambda: grouped_attention(nn.Identity(), query, key, value, None),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):  # the first two warm up
        for name, run in ways.items() if number % 2 else reversed(ways.items()):
            times[name].append(microseconds(run))
    kept = {name: values[2:] for name, values in times.items()}
    ratios = [a / b for a, b in zip(kept["torch_us"], kept["rows_us"], strict=True)]
    return {**{name: statistics.median(values) for name, values in kept.items()}, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    print(f"{'':24} torch us  as rows us  ratio")
    with torch.inference_mode():
        for threads in sorted({1, usable_cores()}):
            torch.set_num_threads(threads)
            for shape, groups in GROUPS.items():
                for context in CONTEXTS:
                    name = f"{shape}, {context}, {threads} thr."
                    found[name] = values = compare(groups, context, args.rounds)
                    print(f"{name:24} {values['torch_us']:8.0f}  {values['rows_us']:10.0f}  {values['ratio']:5.1f}")
    if args.json:
        print(json.dumps({name: {key: round(v, 2) for key, v in values.items()} for name, values in found.items()}))


if __name__ == "__main__":
    main()
