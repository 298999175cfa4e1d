#!/usr/bin/env python3
"""Hit rates of one pool of slots for all layers, from a thirty-second of all experts up: is there a cliff?

Recordings are replayed (gpt-oss-20b, and the demo model, which is recorded first), or those that are named. A pool of n
slots is compared under LRU, aged LFU and aged LFU with bypass (on_miss="auto": what is not worth a slot is computed
without one), with as many slots of each layer's own, and with the optimum. Prints a table per recording.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkout  # noqa: F401

from offmoe.bench.scratch import ended_by_sigterm, scratch_folder
from offmoe.config import CacheOptions
from offmoe.simulate.replay import Recording, belady_with_bypass, replay
from offmoe.trace.trace import read_trace

GPT_OSS = Path(__file__).parents[2] / "tests" / "data" / "gptoss20b_6req.npz"
SHARES = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
"""Of all experts; of Mixtral's 256, 8 to 128 slots."""


def rates(recording: Recording, slots: int) -> dict[str, float | None]:
    """Hit rates with `slots` slots in all; None for slots of layers' own where a layer would have none."""
    quotas = recording.shape.spread(slots)

    def rate(eviction: str, scope: str, on_miss: str) -> float:
        return replay(recording, CacheOptions(eviction, scope, quotas, on_miss=on_miss)).stats.hit_rate

    own = 0 not in quotas
    return {
        "lru": rate("lru", "model", "fetch"),
        "aged_lfu": rate("aged-lfu", "model", "fetch"),
        "bypass": rate("aged-lfu", "model", "auto"),
        "layers": rate("aged-lfu", "layer", "fetch") if own else None,
        "layers_bypass": rate("aged-lfu", "layer", "auto") if own else None,
        "optimum": belady_with_bypass(recording, CacheOptions("lru", "model", quotas)),
    }


def measure(name: str, recording: Recording) -> dict[str, Any]:
    """The curves of one recording."""
    total = recording.shape.num_keys
    pools = sorted({max(2, round(share * total)) for share in SHARES})
    return {"trace": name, "experts": total, "top_k": max(recording.shape.top_k), "layers": recording.shape.layers} | {
        "pools": {slots: rates(recording, slots) for slots in pools}
    }


def table(found: dict[str, Any]) -> None:
    print(f"{found['trace']}: {found['experts']} experts in {found['layers']} layers, top-{found['top_k']}")
    columns: dict[str, Callable[[dict[str, float | None]], float | None]] = {
        "LRU": lambda row: row["lru"],
        "aged LFU": lambda row: row["aged_lfu"],
        "bypass": lambda row: row["bypass"],
        "layers' own": lambda row: row["layers"],
        "own, bypass": lambda row: row["layers_bypass"],
        "optimum": lambda row: row["optimum"],
    }
    print(f"{'slots':>8}" + "".join(f"{name:>13}" for name in columns))
    for slots, row in found["pools"].items():
        cells = (of(row) for of in columns.values())
        print(f"{slots:>8}" + "".join(f"{'' if value is None else f'{value:.3f}':>13}" for value in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, help="recordings (default: gpt-oss-20b and the demo)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    found = []
    with ended_by_sigterm(), scratch_folder("offmoe-small-pool-") as scratch:
        traces: list[Path] = args.traces
        if not traces:
            from tools.bench.tiers import record_demo

            record_demo(scratch / "demo.npz")
            traces = [GPT_OSS, scratch / "demo.npz"]
        for path in traces:
            found.append(measure(path.stem, Recording(read_trace(path))))
            table(found[-1])
    if args.json:
        print(json.dumps({"recordings": found}))


if __name__ == "__main__":
    main()
