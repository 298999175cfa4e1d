#!/usr/bin/env python3
"""Measures the background fill and the warm start: how fast it reads, what it costs a running model, what it saves.

A checkpoint of Qwen3's names with random weights is written once; the routing is gpt-oss-20b's, replayed. Reads are
cold: unbuffered, and the page cache is dropped before each run. All runs are on the CPU, in this process, in rounds.

fill       GB/s of the fill while the model is idle, over GB/s of reading the same files from end to end with as many
           threads (control, fill, fill, control in each round). Target: at least 0.85.
fresh      the same with slots in memory that this machine has not used for some seconds. The host of a virtual machine
           takes such memory back and gives it anew at 0.5 to 2 GB/s, which no fill can mend. So `fill` and `hot` are
           taken with slots that have been written to before, as a machine of its own has memory.
hot        ms per token while the fill reads the experts that are not demanded, over ms per token of the same tokens
           just before, when every demand is a hit. What is left is what the fill takes from computing. Target: at most
           1.10.
cold       ms per token of the first tokens while the fill runs, over ms per token of the same tokens without a fill.
           Demands have the disk, and the fill what they leave of it. Target: at most 1.10.
first      seconds of the first tokens and their hit rate: cold; with a fill in file order; after a restart with the
           state of the cold run, at once and when the fill has ended; and warm, once more in the same process.

Prints a table; with --json one last line with the same figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np
import torch

from offmoe.api import load
from offmoe.bench.scratch import ended_by_sigterm, scratch_folder
from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.device.host_buffers import HostBuffers
from offmoe.hf.adapters.find import find_experts
from offmoe.hf.quiet import hide_bars
from offmoe.hf.replay import ReplayedRouting
from offmoe.storage.checkpoint import Checkpoint
from offmoe.trace.trace import Trace, read_trace
from tools.bench.prefetch import FIXTURE
from tools.bench.read import REQUEST_BYTES, THREADS, drop_cache, files_in_order
from tools.bench.synthetic import write_qwen3

SPARE_BYTES = 10**9
FIRST_TOKENS = 64
POLL_S = 0.001


@dataclass(frozen=True)
class Setup:
    """The checkpoint, its routing, and the options of all runs."""

    folder: Path
    routing: Trace
    slots: int | None
    tokens: tuple[int, ...]

    def load(self, **options: Any) -> Run:
        """Load the model with a cold disk."""
        drop_cache(Checkpoint.open(self.folder))
        config = OffloadConfig(
            device="cpu", slots_per_layer=self.slots, max_context=512, prefetch=0, on_miss="fetch", **options
        )
        inspected = inspect(self.folder, config)
        return Run(load(inspected), ReplayedRouting(self.routing, inspected.catalog.shape), self.tokens)


class Run:
    """One loaded model that decodes the tokens of the setup, one at a time."""

    def __init__(self, model: Any, routing: ReplayedRouting, tokens: Sequence[int]) -> None:
        self.model, self.offload = model, model.offload
        self._routing, self._tokens = routing, tokens
        routing.attach(list(find_experts(model).values()))

    @torch.no_grad()
    def decode(self) -> list[tuple[float, bool]]:
        """Decode all tokens: per token its seconds, and whether the fill was running throughout."""
        self._routing.seek(0)
        times, cache = [], None
        for token in self._tokens:
            began = time.perf_counter()
            out = self.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            times.append((time.perf_counter() - began, self.offload.fill_progress().running))
        return times

    def first(self) -> dict[str, float]:
        """Seconds and hit rate of the tokens."""
        before = self.offload.stats()
        times = self.decode()
        stats = self.offload.stats() - before
        return {
            "seconds": sum(seconds for seconds, _ in times),
            "first_s": times[0][0],
            "hit_rate": stats.hit_rate,
            "disk_bytes": stats.disk_bytes,
        }

    def filled(self) -> tuple[float, int]:
        """Wait for the end of the fill: (seconds from now, bytes that it has brought)."""
        began = time.perf_counter()
        while self.offload.fill_progress().running:
            time.sleep(POLL_S)
        return time.perf_counter() - began, self.offload.fill_progress().nbytes

    def use_free_slots(self) -> None:
        """Write to the slots that hold nothing, so that they are in memory that the machine has."""
        executor = self.offload._executor
        arena = executor._transfer.writer.arena
        for residency in {id(cache.residency): cache.residency for cache in executor.planner.layers}.values():
            for slot in residency.free_slots:
                arena.bytes(slot).zero_()

    def close(self) -> None:
        self.offload.close()


def fill_rate(setup: Setup, *, fresh: bool = False) -> float:
    """GB/s of the fill, the model being idle. fresh: into memory that has not been used for some seconds."""
    run = setup.load()
    if not fresh:
        run.use_free_slots()
    began = time.perf_counter()
    run.offload.fill()
    run.filled()
    seconds = time.perf_counter() - began
    nbytes = run.offload.fill_progress().nbytes
    run.close()
    return nbytes / 1e9 / seconds


def control_rate(setup: Setup) -> float:
    """GB/s of reading all files from end to end."""
    checkpoint = Checkpoint.open(setup.folder)
    drop_cache(checkpoint)
    buffers = HostBuffers(THREADS, REQUEST_BYTES)
    try:
        return files_in_order(checkpoint, buffers).rate
    finally:
        buffers.close()


def hot(setup: Setup) -> tuple[float, float, int]:
    """(seconds per token without the fill, seconds per token while it runs, number of the latter)."""
    run = setup.load()
    run.decode()  # brings every expert that the tokens demand, but for those that a smaller cache has evicted
    run.use_free_slots()
    base = run.decode()
    run.offload.fill()
    during = [seconds for seconds, running in run.decode() if running]
    run.close()
    # The same tokens: the cost of a token grows with its position.
    same = [seconds for seconds, _ in base[: len(during)]]
    return statistics.fmean(same or [0.0]), statistics.fmean(during or [0.0]), len(during)


def cold(setup: Setup) -> tuple[float, float, int]:
    """As `hot`, for the first tokens of a model that has just been loaded."""
    run = setup.load()
    base = run.decode()
    run.close()
    run = setup.load(fill=True)
    during = [seconds for seconds, running in run.decode() if running]
    run.close()
    same = [seconds for seconds, _ in base[: len(during)]]
    return statistics.fmean(same or [0.0]), statistics.fmean(during or [0.0]), len(during)


def first_tokens(setup: Setup, state: Path) -> dict[str, dict[str, float]]:
    """The first tokens of five beginnings."""
    figures = {}
    run = setup.load()
    figures["cold"] = run.first()
    run.offload.save_state(state)
    figures["warm, same process"] = run.first()
    run.close()
    for name, options, waits in (
        ("cold, fill in file order", {"fill": True}, False),
        ("restart with state, at once", {"state": state}, False),
        ("restart with state, filled", {"state": state}, True),
    ):
        run = setup.load(**options)
        if waits:
            run.filled()
        figures[name] = run.first()
        run.close()
    return figures


def ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Median and range of b / a."""
    ratios = [b / a for a, b in pairs if a]
    if not ratios:
        return {"median": float("nan"), "least": float("nan"), "most": float("nan")}
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def measure(setup: Setup, rounds: int, state: Path) -> dict[str, Any]:
    rates: list[tuple[float, float]] = []
    fresh: list[tuple[float, float]] = []
    running: dict[str, list[tuple[float, float, int]]] = {"hot": [], "cold": []}
    firsts: list[dict[str, dict[str, float]]] = []
    for i in range(rounds):
        measured: dict[str, list[float]] = {"control": [], "fill": []}
        for which in ("control", "fill", "fill", "control"):
            measured[which].append((control_rate if which == "control" else fill_rate)(setup))
        rates.append((statistics.fmean(measured["control"]), statistics.fmean(measured["fill"])))
        fresh.append((rates[-1][0], fill_rate(setup, fresh=True)))
        running["hot"].append(hot(setup))
        running["cold"].append(cold(setup))
        firsts.append(first_tokens(setup, state))
        print(
            f"round {i + 1}: control {rates[-1][0]:.2f} GB/s, fill {rates[-1][1]:.2f} GB/s, "
            f"fresh {fresh[-1][1]:.2f} GB/s; "
            + "; ".join(
                f"{name} {1e3 * a:.1f} -> {1e3 * b:.1f} ms per token ({n} tokens)"
                for name, values in running.items()
                for a, b, n in values[-1:]
            ),
            flush=True,
        )
    first = {
        name: {key: statistics.median(f[name][key] for f in firsts) for key in firsts[0][name]} for name in firsts[0]
    }
    return {
        "control_gb_s": statistics.median(a for a, _ in rates),
        "fill_gb_s": statistics.median(b for _, b in rates),
        "fill": ratio(rates),
        "fresh": ratio(fresh),
        **{name: ratio([(a, b) for a, b, _ in values]) for name, values in running.items()},
        **{f"{name}_tokens": sum(n for _, _, n in values) for name, values in running.items()},
        "first": first,
    }


def report(found: dict[str, Any], tokens: int) -> None:
    targets = {"fill": ", target at least 0.85", "fresh": "", "hot": ", target at most 1.10"}
    targets["cold"] = targets["hot"]
    for name, target in targets.items():
        figures = found[name]
        print(f"{name:5} {figures['median']:.3f} ({figures['least']:.3f} to {figures['most']:.3f}){target}")
    print(f"first {tokens} tokens           seconds   first s   hit rate   read from disk")
    for name, values in found["first"].items():
        print(
            f"  {name:28} {values['seconds']:7.2f}   {values['first_s']:7.3f}   {100 * values['hit_rate']:6.1f} %   "
            f"{values['disk_bytes'] / 1e9:.2f} GB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder with room for the checkpoint (default: temporary)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--slots", type=int, help="slots per layer (default: one for every expert)")
    parser.add_argument("--routing", type=Path, default=FIXTURE, help="a trace with as many experts and top-k")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=FIRST_TOKENS)
    parser.add_argument("--threads", type=int, default=0, help="that compute (default: torch's own choice)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    hide_bars()
    if args.threads:
        torch.set_num_threads(args.threads)
    expert = 6 * args.hidden * args.intermediate
    nbytes = args.layers * args.experts * expert
    with ended_by_sigterm(), scratch_folder("offmoe-warm-start-", args.work) as scratch:
        free = shutil.disk_usage(scratch).free
        if free < nbytes + SPARE_BYTES:
            sys.exit(f"warm_start.py: {scratch} has {free / 1e9:.1f} GB free, {nbytes / 1e9:.1f} are needed: --work")
        folder = Path(scratch, "model")
        write_qwen3(
            folder,
            args.hidden,
            args.intermediate,
            layers=args.layers,
            experts=args.experts,
            top_k=args.top_k,
            vocabulary=32000,
        )
        chance = np.random.default_rng(0)
        tokens = tuple(chance.integers(3, 32000, args.tokens).tolist())
        setup = Setup(folder, read_trace(args.routing), args.slots or args.experts, tokens)
        print(f"{args.layers} layers x {args.experts} experts of {expert / 1e6:.2f} MB, {nbytes / 1e9:.2f} GB")
        found = measure(setup, args.rounds, Path(scratch, "state.json"))
    report(found, args.tokens)
    if args.json:
        print(json.dumps({**found, "expert_bytes": expert, "checkpoint_bytes": nbytes}))


if __name__ == "__main__":
    main()
