#!/usr/bin/env python3
"""Measures how fast traces are replayed through the runtime's planner, which is the cost of a sweep over caches.

The accesses of the trace are computed once and then planned and counted, with five policies at eight capacities.
`accesses_per_s` is (token, layer) accesses per second of one core's CPU time over all of them, computing the accesses
included. `sweep_s` is the wall time of the same sweep over all cores, starting the processes included; other work on
the machine affects it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import checkout  # noqa: F401

from offmoe.simulate.replay import Recording
from offmoe.simulate.sweep import Settings, evaluate, grid, split_requests, sweep
from offmoe.trace.trace import read_trace

TRACE = Path(__file__).parents[2] / "tests" / "data" / "gptoss20b_6req.npz"
POLICIES = ("aged-lfu", "lru", "lru-2", "s3-fifo", "sieve")
CAPACITIES = (4, 6, 8, 12, 16, 20, 24, 28)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    trace = read_trace(args.trace)
    settings = Settings(test_requests=split_requests(trace))
    candidates = grid(trace, CAPACITIES, POLICIES)

    began = time.perf_counter()
    sweep(trace, candidates, settings=settings, jobs=args.jobs)
    sweep_s = time.perf_counter() - began

    began = time.process_time()
    recording = Recording(trace)
    making_s = time.process_time() - began
    accesses = sum(len(step.accesses) for step in recording.steps)
    print(f"{trace.model}: {trace.tokens} tokens, {accesses} accesses; made in {making_s:.2f} s")
    print("thousand accesses per second, by slots per layer:")
    print(f"{'':10}" + "".join(f"{n:>7}" for n in CAPACITIES))
    total_s = making_s
    for policy in POLICIES:
        speeds = []
        for options in candidates:
            if options.eviction == policy:
                began = time.process_time()
                evaluate(recording, options, settings)
                seconds = time.process_time() - began
                total_s += seconds
                speeds.append(accesses / seconds)
        print(f"{policy:10}" + "".join(f"{speed / 1e3:>7.1f}" for speed in speeds))
    found = {"accesses_per_s": len(candidates) * accesses / total_s, "sweep_s": sweep_s}
    print(f"together {found['accesses_per_s']:.0f} accesses/s; {len(candidates)} caches in {sweep_s:.1f} s")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
