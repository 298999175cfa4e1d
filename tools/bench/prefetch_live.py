#!/usr/bin/env python3
"""Measures what prefetch="auto" gains or costs in a running model, paired with prefetch=0 in one process.

Two models are loaded that differ in prefetch only. Experts are read from disk with O_DIRECT, so reads are always cold.
A round decodes the same tokens with both, a few in turn each; the model that begins changes with every turn. The gain
is time off / time on - 1 of a round, with the interval of the median. Both first decode tokens that are not timed,
which fills the caches and lets "auto" see how good predictions are.

There are four routings: the demo model on a text, with its own routers; a model of Mixtral's shape with random weights
on random tokens, with its own routers; the same model with the demo's recorded routing and predictions; and a model of
32 experts, top-4, with gpt-oss-20b's routing, predicted by the transition counts of other requests. The tokens of
random weights with a recorded routing are meaningless.

read_s is the time that the bytes read without prefetch take at the disk's rate, which is measured in every round.
hidden is the share of it that nothing waited for, without and with prefetch (below 0 if waiting took longer than that).
With --json, one last line {"worst": least median gain, "rows": [...]}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

from offmoe.api import load
from offmoe.bench.scratch import ended_by_sigterm, scratch_folder
from offmoe.budget.inspect import Inspected, inspect
from offmoe.config import OffloadConfig
from offmoe.hf.adapters.find import find_experts
from offmoe.hf.hub.locate import locate
from offmoe.hf.replay import ReplayedRouting
from offmoe.measure.probes import DiskProbe, drop_page_cache
from offmoe.simulate.predictions import transition_predictions
from offmoe.storage.store import ExpertStore
from offmoe.trace.trace import Trace, read_trace
from offmoe.types import CacheStats
from tools.bench.prefetch import FIXTURE, TEXT, record_demo
from tools.bench.synthetic import write_mixtral
from tools.bench.transfer import interval

TRAINED_REQUESTS = 2
"""Requests of the test data that transitions are counted on."""
PROBE_S = 0.3
TURN = 4
"""Tokens per turn. With fewer, both models see the same machine more closely."""


@dataclass(frozen=True)
class Case:
    """One routing. size: hidden, intermediate, layers, experts and top_k of the model to write; None: the demo."""

    name: str
    slots: int
    size: tuple[int, int, int, int, int] | None
    routing: Callable[[], Trace] | None = None


def of_fixture() -> Trace:
    """Requests of gpt-oss-20b, predicted by the transition counts of earlier requests."""
    trace = read_trace(FIXTURE)
    tested = trace.request >= TRAINED_REQUESTS
    predicted = transition_predictions(trace, frozenset(np.unique(trace.request[tested]).tolist()))
    return replace(trace, predicted=predicted).select(tested)


class Side:
    """One of the two models."""

    def __init__(self, inspected: Inspected, routing: Trace | None):
        self.model: Any = load(inspected)
        self._replayed: ReplayedRouting | None = None
        if routing is not None:
            self._replayed = ReplayedRouting(routing, inspected.catalog.shape)
            self._replayed.attach(list(find_experts(self.model).values()))
            if inspected.config.prefetch != 0:
                self.model.offload.predict_with(self._replayed)

    def begin(self, row: int) -> None:
        """Begin a sequence. row: row of the replayed routing."""
        self._cache: Any = None
        self._seconds, self._before = 0.0, self.model.offload.stats()
        if self._replayed is not None:
            self._replayed.seek(row)

    @torch.no_grad()
    def decode(self, tokens: list[int]) -> None:
        """Decode these tokens, one at a time."""
        began = time.perf_counter()
        for token in tokens:
            out = self.model(input_ids=torch.tensor([[token]]), past_key_values=self._cache, use_cache=True)
            self._cache = out.past_key_values
        self._seconds += time.perf_counter() - began

    def end(self) -> tuple[float, CacheStats]:
        """The seconds of the sequence, and its counts."""
        return self._seconds, self.model.offload.stats() - self._before


def token_source(case: Case) -> Iterator[int]:
    """Tokens of a text for the demo, random tokens for an untrained model."""
    if case.size is None:
        tokenizer = AutoTokenizer.from_pretrained(locate("demo").folder)
        while True:
            yield from tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    chance = np.random.default_rng(0)
    while True:
        yield int(chance.integers(1000))


@contextmanager
def probe_of(inspected: Inspected) -> Iterator[Callable[[], float]]:
    """A function that measures GB/s of reading the model's experts, cold."""
    checkpoint, catalog = inspected.checkpoint, inspected.catalog
    store = ExpertStore(checkpoint.shards, catalog.records)
    try:
        with closing(DiskProbe(store, catalog.records, checkpoint.shards)) as disk:

            def rate() -> float:
                found = disk.gb_s(PROBE_S)
                drop_page_cache(checkpoint.shards)
                return found

            yield rate
    finally:
        store.close()


def compare(case: Case, folder: Path, rounds: int, tokens: int, warm: int) -> dict[str, Any]:
    """Paired rounds of one routing."""
    source = token_source(case)
    routing = None if case.routing is None else case.routing()
    took: dict[str, list[float]] = {"off": [], "on": []}
    counted: dict[str, list[CacheStats]] = {"off": [], "on": []}
    read_s, row = [], 0
    with ExitStack() as stack:
        sides = {}
        for name, prefetch in (("off", 0), ("on", "auto")):
            config = OffloadConfig(device="cpu", slots_per_layer=case.slots, prefetch=prefetch, max_context=1024)
            inspected = inspect(folder, config)
            sides[name] = Side(inspected, routing)
            stack.enter_context(sides[name].model.offload)
        probe = stack.enter_context(probe_of(inspected))
        for number in range(rounds + 1):
            ids = [next(source) for _ in range(tokens if number else warm)]
            rate = probe()
            for side in sides.values():
                side.begin(row)
            for turn, start in enumerate(range(0, len(ids), TURN)):
                for name in ("off", "on") if (number + turn) % 2 else ("on", "off"):
                    sides[name].decode(ids[start : start + TURN])
            for name, side in sides.items():
                seconds, stats = side.end()
                if number:
                    took[name].append(seconds)
                    counted[name].append(stats)
            if number:
                read_s.append(counted["off"][-1].disk_bytes / (rate * 1e9))
            row += len(ids)
    gains = [off / on - 1 for off, on in zip(took["off"], took["on"], strict=True)]
    hidden = {
        name: [1 - stats.stall_s / read if read else 0.0 for stats, read in zip(counted[name], read_s, strict=True)]
        for name in counted
    }
    saved = [(a.stall_s - b.stall_s) / r if r else 0.0 for a, b, r in zip(*counted.values(), read_s, strict=True)]
    everything = {name: sum(found[1:], found[0]) for name, found in counted.items()}
    on = everything["on"]
    return {
        "routing": case.name,
        "slots": case.slots,
        "rounds": rounds,
        "tokens": tokens,
        "gain": round(statistics.median(gains), 4),
        "interval": [round(end, 4) for end in interval(gains)],
        "ms_per_token": round(statistics.median(took["off"]) * 1e3 / tokens, 3),
        "hit_rate": round(everything["off"].hit_rate, 4),
        "misses": everything["off"].misses,
        "prefetched": on.prefetched,
        "prefetched_used": on.prefetched_used,
        "read_s": round(sum(read_s), 3),
        "stall_s": round(everything["off"].stall_s, 3),
        "stall_s_on": round(on.stall_s, 3),
        "hidden": round(statistics.median(hidden["off"]), 4),
        "hidden_on": round(statistics.median(hidden["on"]), 4),
        "stall_saved": round(statistics.median(saved), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=24, help="of each side in a round")
    parser.add_argument("--warm", type=int, default=192, help="tokens before the first round")
    parser.add_argument("--slots", type=int, help="per layer (default: 4 of 8 experts, 8 of 32)")
    parser.add_argument("--only", metavar="WORD", help="routings with this word in their name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--work", type=Path, help="a folder on the disk to read from, 2 GB of room (default: temporary)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny experts, few tokens: does everything run?")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.quick:
        args.rounds, args.tokens, args.warm = 3, 6, 40
    few = (128, 176) if args.quick else (1024, 2816)  # 17 MB an expert
    many = (128, 176) if args.quick else (512, 1408)  # 4 MB an expert

    def of_demo() -> Trace:
        return record_demo(*((2, 30) if args.quick else ()))

    cases = [
        Case("demo", args.slots or 4, None),
        Case("synthetic", args.slots or 4, (*few, 7, 8, 2)),
        Case("synthetic, the demo's routing", args.slots or 4, (*few, 7, 8, 2), of_demo),
        Case("synthetic, gpt-oss-20b's routing", args.slots or 8, (*many, 6, 32, 4), of_fixture),
    ]
    cases = [case for case in cases if args.only is None or args.only in case.name]
    if not cases:
        sys.exit(f"prefetch_live.py: no routing has {args.only!r} in its name")
    rows = []
    with ended_by_sigterm(), scratch_folder("offmoe-prefetch-", args.work) as scratch:
        for case in cases:
            folder = locate("demo").folder
            if case.size is not None:
                hidden, intermediate, layers, experts, top_k = case.size
                folder = scratch / "-".join(map(str, case.size))
                if not folder.exists():
                    write_mixtral(
                        folder, hidden, intermediate, layers=layers, experts=experts, top_k=top_k, vocabulary=1000
                    )
            found = compare(case, folder, args.rounds, args.tokens, args.warm)
            rows.append(found)
            low, high = found["interval"]
            print(
                f"{case.name}, {case.slots} slots: gain {100 * found['gain']:+.1f} % (95 % interval {100 * low:+.1f} "
                f"to {100 * high:+.1f}), {found['ms_per_token']:.1f} ms/token without; hit rate "
                f"{100 * found['hit_rate']:.1f} %, {found['prefetched']} prefetched beside {found['misses']} misses, "
                f"{found['prefetched_used']} used; of {found['read_s']:.2f} s of reading hidden "
                f"{100 * found['hidden']:.0f} % without, {100 * found['hidden_on']:.0f} % with",
                flush=True,
            )
    if args.json:
        print(json.dumps({"worst": min(row["gain"] for row in rows), "rows": rows}))


if __name__ == "__main__":
    main()
