#!/usr/bin/env python3
"""Compares the decoding speed of this checkout with that of another one, in paired rounds.

    git worktree add /somewhere COMMIT
    tools/bench/versions.py /somewhere --json

Each checkout has a process of its own. Both decode the same random tokens of the same model with random weights (8
layers x 8 experts of 22 MB in bf16, top-2, 1.4 GB, cold reads), in turns, with the same device_memory: room for two,
three and five of a layer's experts. The caches of both go on from round to round.

Prints per budget tokens/s of both, the ratio as a median with its range, hit rates, and whether logits are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import checkout

from offmoe.bench.scratch import ended_by_sigterm, scratch_folder
from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.text import format_size
from tools.bench.synthetic import write_mixtral

LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, VOCABULARY = 8, 8, 2, 1024, 3584, 32000
TINY = (64, 128)
SLOTS = (2, 3, 5)
"""Slots of each layer that the budgets have room for."""
CONTEXT = 512
WORKER = Path(__file__).with_name("decode_worker.py")
RUN = "import json, runpy, sys; runpy.run_path(sys.argv[1])['serve'](*json.loads(sys.argv[2]))"


class Version:
    """A model loaded by one checkout."""

    def __init__(self, root: Path, model: Path, options: dict[str, Any], tokens: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(WORKER), json.dumps([str(model), options, tokens])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
        )
        self.memory = self._answer()["memory"]

    def round(self, seed: int) -> dict[str, Any]:
        """The figures of one round."""
        assert self._process.stdin is not None
        print(seed, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"versions.py: a version ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(other: Path, model: Path, options: dict[str, Any], tokens: int, rounds: int) -> dict[str, Any]:
    """The figures of one budget. The first round fills the caches and does not count."""
    with ExitStack() as stack:
        before, now = (Version(root, model, options, tokens) for root in (other, checkout.ROOT))
        for version in (before, now):
            stack.callback(version.close)
        pairs = []
        for seed in range(rounds + 1):
            turn = (before, now) if seed % 2 else (now, before)
            answers = {version: version.round(seed) for version in turn}
            pairs.append((answers[before], answers[now]))
    pairs = pairs[1:]
    ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
    medians = [statistics.median(tokens / pair[i]["seconds"] for pair in pairs) for i in range(2)]
    return {
        "tokens_per_s_before": medians[0],
        "tokens_per_s": medians[1],
        "times_as_fast": statistics.median(ratios),
        "times_as_fast_range": [min(ratios), max(ratios)],
        "hit_rate_before": statistics.fmean(a["hit_rate"] for a, _ in pairs),
        "hit_rate": statistics.fmean(b["hit_rate"] for _, b in pairs),
        "same_logits": all(a["logits"] == b["logits"] for a, b in pairs),
        "plans": [before.memory, now.memory],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the folder of the other checkout")
    parser.add_argument("--work", type=Path, help="a folder with 2 GB of room for a few minutes (default: temporary)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=16, help="decoded per round")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does everything run?")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    hidden, intermediate = TINY if args.quick else (HIDDEN, INTERMEDIATE)
    found = {}
    with ended_by_sigterm(), scratch_folder("offmoe-versions-", args.work) as scratch:
        model = scratch / "model"
        write_mixtral(model, hidden, intermediate, layers=LAYERS, experts=EXPERTS, top_k=TOP_K, vocabulary=VOCABULARY)
        plan = inspect(model, OffloadConfig(device="cpu", slots_per_layer=1, max_context=CONTEXT)).plan
        for slots in SLOTS:
            budget = plan.used + (slots - 1) * plan.slots
            options = {"device": "cpu", "device_memory": budget, "max_context": CONTEXT}
            found[slots] = compare(args.other.resolve(), model, options, args.tokens, args.rounds) | {"budget": budget}
            row = found[slots]
            low, high = row["times_as_fast_range"]
            print(
                f"{format_size(budget)}, {slots} slots a layer: {row['tokens_per_s_before']:.2f} -> "
                f"{row['tokens_per_s']:.2f} tokens/s, {row['times_as_fast']:.3f} times as fast ({low:.3f} to "
                f"{high:.3f}); hit rate {row['hit_rate_before']:.1%} -> {row['hit_rate']:.1%}; logits equal: "
                f"{row['same_logits']}",
                flush=True,
            )
    if args.json:
        print(json.dumps({"slots": found}))


if __name__ == "__main__":
    main()
