#!/usr/bin/env python3
"""Compares victims chosen when they are needed (lag 0) with victims named one step before (lag 1) on recorded routing.

Hit rates are counted by replay, so they are exact; the ratio of the replays' CPU times is what naming costs the host.

    tools/bench/lag.py tests/data/gptoss20b_6req.npz --slots 8,16
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import checkout  # noqa: F401

from offmoe.config import EVICTIONS, CacheOptions
from offmoe.simulate.replay import Recording, replay
from offmoe.simulate.sweep import popularity
from offmoe.trace.trace import read_trace
from offmoe.types import CacheStats


def timed(recording: Recording, options: CacheOptions) -> tuple[CacheStats, float]:
    """The counts of a replay, and its CPU seconds."""
    began = time.process_time()
    stats = replay(recording, options).stats
    return stats, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--slots", default="8,16", help="slots per layer, separated by commas")
    parser.add_argument("--evictions", default=",".join(EVICTIONS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for path in args.traces:
        recording = Recording(read_trace(path))
        for slots in map(int, args.slots.split(",")):
            for eviction in args.evictions.split(","):
                popular = popularity(recording.trace) if eviction == "static" else None
                options = [CacheOptions(eviction, slots_per_layer=slots, popularity=popular, lag=lag) for lag in (0, 1)]
                (at_once, seconds), (ahead, seconds_ahead) = (timed(recording, each) for each in options)
                rows.append(
                    {
                        "trace": path.name,
                        "slots": slots,
                        "eviction": eviction,
                        "lag_0": at_once.hit_rate,
                        "lag_1": ahead.hit_rate,
                        "misses_differ": abs(at_once.misses - ahead.misses),
                        "cpu_ratio": seconds_ahead / seconds,
                    }
                )
                if not args.json:
                    print(*(f"{v:.4f}" if isinstance(v, float) else v for v in rows[-1].values()), flush=True)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
