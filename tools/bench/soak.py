#!/usr/bin/env python3
"""Checks whether memory, descriptors and threads stay flat while the demo model generates for minutes.

The demo runs with four of eight slots and prefetch, on prompts of all lengths with sampled continuations. Now and then
the model is closed and loaded again, since that is where resources leak. Growth is the median of the last quarter of
the samples minus the median of the second quarter; the first quarter fills allocators and caches.

torch keeps what it prepared for each shape that it multiplied on a CPU, in oneDNN's cache and in one in front of it,
1,024 shapes each by default. Prompts of all lengths fill these for an hour, with or without offmoe. The script keeps
them small, so that the growth is offmoe's own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import threading
import time
from typing import Any

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")  # both are read when torch is imported
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")

import checkout  # noqa: F401
import psutil
import torch

import offmoe

SLOTS, LONGEST_PROMPT, NEW_TOKENS, RUNS_PER_MODEL = 4, 200, 48, 20


def sample(process: psutil.Process) -> tuple[int, int, int]:
    """(bytes resident, open descriptors, threads) of this process."""
    return process.memory_info().rss, process.num_fds(), threading.active_count()


def growth(values: list[int]) -> int:
    quarter = max(1, len(values) // 4)
    return round(statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chance = random.Random(0)
    process = psutil.Process()
    samples: list[tuple[int, int, int]] = []
    tokens = 0
    deadline = time.monotonic() + args.minutes * 60
    while time.monotonic() < deadline or len(samples) < 8:
        model: Any = offmoe.from_pretrained("demo", device="cpu", slots_per_layer=SLOTS, prefetch=2)
        vocabulary = model.config.vocab_size
        with model.offload:
            for _ in range(RUNS_PER_MODEL):
                length = chance.randint(1, LONGEST_PROMPT)
                ids = torch.tensor([[chance.randrange(3, vocabulary) for _ in range(length)]])
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=NEW_TOKENS
                )
                tokens += out.shape[1] - length
                samples.append(sample(process))
                if time.monotonic() >= deadline and len(samples) >= 8:
                    break
        del model
        gc.collect()  # models are circles of modules; the collector's own turn comes after some thirty of them
    columns = list(zip(*samples, strict=True))
    found = dict(zip(("rss_growth_bytes", "fd_growth", "thread_growth"), map(growth, map(list, columns)), strict=True))
    found["tokens"] = tokens
    eighths = [columns[0][len(samples) * i // 8 : len(samples) * (i + 1) // 8] for i in range(8)]
    resident = ", ".join(f"{statistics.median(values) / 1e6:.0f}" for values in eighths)
    print(f"{args.minutes:g} minutes, {len(samples)} samples; MB resident in each eighth of them: {resident}")
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
