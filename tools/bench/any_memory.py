#!/usr/bin/env python3
"""Runs one model in ever less memory, each time in a cgroup of the budget plus 0.6 GiB that counts the page cache.

The model has Mixtral 8x7B's shape and int4 experts of random weights (26 GB; --layers for fewer), written once in the
layout of `offmoe pack`. Experts follow a recorded routing: the demo's, or --routing (8 experts, top-2). For each budget
a table says how memory was divided, tokens/s, hit rate and peak. --compare BUDGET runs two divisions of one budget in
paired rounds: dense weights first, as planned, against top_k slots in every layer with dense layers moved out for them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401

from offmoe.bench import rounds
from offmoe.bench.messages import OFFMOE, Pass, Task
from offmoe.bench.scratch import ended_by_sigterm, scratch_folder
from offmoe.budget.inspect import Inspected, inspect
from offmoe.compute.kernels.library import status
from offmoe.config import OffloadConfig
from offmoe.measure.probes import drop_page_cache
from offmoe.pack.pack import weight_format
from offmoe.text import format_size, parse_size
from tools.bench.synthetic import mixtral_config, write_packed
from tools.bench.tiers import RECORDED_TOKENS, record_demo

HIDDEN, INTERMEDIATE, LAYERS, EXPERTS, TOP_K, VOCABULARY = 4096, 14336, 32, 8, 2, 32000
LIBRARIES_BYTES = int(0.6 * 2**30)
"""Memory of the cgroup beyond the budget: Python, torch and transformers."""
SPARE_BYTES = 2 * 10**9
MAX_CONTEXT = 512


@dataclass(frozen=True)
class Work:
    """What every run does: the model, the routing to replay, and the passes."""

    model: Path
    routing: Path
    passes: Sequence[Pass]
    threads: int

    def task(self, budget: int, options: dict[str, Any]) -> Task:
        all_options = {"max_context": MAX_CONTEXT, "experts": "int4", **options}
        return Task(
            OFFMOE,
            str(self.model),
            "cpu",
            "bfloat16",
            budget,
            options=all_options,
            routing=str(self.routing.resolve()),
            threads=self.threads,
        )

    def inspected(self, budget: int, options: dict[str, Any]) -> Inspected:
        every = {"device": "cpu", "max_context": MAX_CONTEXT, "experts": "int4", **options}
        return inspect(self.model, OffloadConfig(device_memory=budget, **every))

    def run(self, budget: int, ways: dict[str, dict[str, Any]], capped: bool) -> list[rounds.Record]:
        """Every way in a process of its own, in paired rounds. ways: by name, options beside the budget."""
        shards = self.inspected(budget, {}).checkpoint.shards
        cap = budget + LIBRARIES_BYTES if capped else None

        def forget_files() -> None:
            drop_page_cache(shards)  # else a process reads pages that another cgroup is charged for

        with ExitStack() as stack:
            forget_files()
            contenders = [
                stack.enter_context(rounds.ContenderProcess(name, self.task(budget, options), cap))
                for name, options in ways.items()
            ]
            return rounds.paired(contenders, self.passes, forget_files)


def passes(args: argparse.Namespace) -> list[Pass]:
    """One pass to warm up and one per round, of random tokens."""
    rng = random.Random(0)
    found, row = [], 0
    for _ in range(args.rounds + 1):
        prompt = tuple(rng.choices(range(VOCABULARY), k=args.prompt_tokens))
        forced = tuple(rng.choices(range(VOCABULARY), k=args.tokens))
        found.append(Pass(prompt, args.tokens, forced, row))
        row += args.prompt_tokens + args.tokens - 1
    return found


def at_budget(work: Work, budget: int, capped: bool) -> dict[str, Any]:
    """The figures of one budget."""
    plan = work.inspected(budget, {}).plan
    figures = work.run(budget, {"offmoe": {}}, capped)[0].to_dict()
    return {
        "budget": budget,
        "scope": plan.scope,
        "slots": sum(plan.slots_per_layer),
        "offloaded_layers": plan.offloaded_layers,
        "tokens_per_s": figures["tokens_per_s"],
        "ttft_s": figures["ttft_s"],
        "hit_rate": figures["hit_rate"],
        "disk_bytes_per_token": figures["disk_bytes_per_token"],
        "peak_bytes": figures["peak"]["cgroup"] or figures["peak"]["rss"],
        "cap_bytes": budget + LIBRARIES_BYTES if capped else None,
        "used_bytes": plan.used,
        "plan": plan.describe(),
    }


def compare(work: Work, budget: int, capped: bool) -> dict[str, Any]:
    """Dense weights first against top_k slots in every layer, in paired rounds."""
    other = {"scope": "layer", "slots_per_layer": TOP_K}
    plans = {"dense_first": work.inspected(budget, {}).plan, "dense_moved_out": work.inspected(budget, other).plan}
    if not plans["dense_moved_out"].offloaded_layers:
        sys.exit(f"any_memory.py: {format_size(budget)} holds top_k slots in every layer beside all dense weights")
    first, second = work.run(budget, {"dense_first": {}, "dense_moved_out": other}, capped)
    figures = {"dense_first": first.to_dict(), "dense_moved_out": second.to_dict()}
    return {
        "budget": budget,
        "times_as_fast": rounds.ratio(second, first),
        "tokens_per_s": {name: values["tokens_per_s"] for name, values in figures.items()},
        "hit_rate": {name: values["hit_rate"] for name, values in figures.items()},
        "same": rounds.same(first, second),
        "plans": {name: plan.describe() for name, plan in plans.items()},
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "budget": lambda row: format_size(row["budget"]),
    "slots": lambda row: f"{row['slots']} ({row['scope']})",
    "layers out": lambda row: str(row["offloaded_layers"]),
    "tokens/s": lambda row: f"{row['tokens_per_s']:.3f}",
    "first token": lambda row: f"{row['ttft_s']:.1f} s",
    "hit rate": lambda row: f"{100 * row['hit_rate']:.1f} %",
    "read/token": lambda row: format_size(row["disk_bytes_per_token"]),
    "peak": lambda row: format_size(row["peak_bytes"]),
    "cap": lambda row: "-" if row["cap_bytes"] is None else format_size(row["cap_bytes"]),
}


def table(found: Sequence[dict[str, Any]]) -> None:
    print("".join(f"{name:>14}" for name in COLUMNS))
    for row in found:
        print("".join(f"{cell(row):>14}" for cell in COLUMNS.values()))
    for row in found:
        print(row["plan"])


def prepared(args: argparse.Namespace, scratch: Path) -> Work:
    """The model, written unless --model names one, and the routing, recorded unless --routing does."""
    model: Path | None = args.model
    hidden, intermediate = (256, 512) if args.quick else (HIDDEN, INTERMEDIATE)
    config = mixtral_config(hidden, intermediate, args.layers, EXPERTS, TOP_K, VOCABULARY)
    if model is None or not (model / "config.json").is_file():
        model = model or scratch / "model"
        nbytes = args.layers * EXPERTS * 3 * hidden * intermediate * 17 // 32 + 2 * VOCABULARY * hidden * 2
        free = shutil.disk_usage(scratch if args.model is None else model.parent).free
        if free < nbytes + SPARE_BYTES:
            sys.exit(f"any_memory.py: {format_size(free)} free, {format_size(nbytes + SPARE_BYTES)} are needed: --work")
        print(f"writing {format_size(nbytes)} to {model}", file=sys.stderr, flush=True)
        write_packed(model, config, weight_format("int4"), scratch)
    routing = args.routing
    if routing is None:
        routing = scratch / "demo.npz"
        record_demo(routing, tokens=8 if args.quick else RECORDED_TOKENS)
    return Work(model, routing, passes(args), args.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="4GiB,8GiB,12GiB,16GiB", help="values of device_memory")
    parser.add_argument("--compare", metavar="BUDGET", help="only compare the two divisions of this budget")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--model", type=Path, help="a folder to write the model to and keep it, or that has it")
    parser.add_argument("--routing", type=Path, help="replay this trace (8 experts, top-2) instead of the demo's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="new ones per round")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="to compute with (default: torch's own choice)")
    parser.add_argument("--work", type=Path, help="a folder with 28 GB of room (default: temporary)")
    parser.add_argument("--no-cap", action="store_true", help="no memory cgroups")
    parser.add_argument("--quick", action="store_true", help="tiny experts: does everything run?")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if status().library is None:
        sys.exit(f"any_memory.py: {status().message}")
    found: dict[str, Any] = {}
    with ended_by_sigterm(), scratch_folder("offmoe-any-memory-", args.work) as scratch:
        work = prepared(args, scratch)
        if args.compare is not None:
            found["compare"] = compare(work, parse_size(args.compare, "--compare"), not args.no_cap)
            ratio = found["compare"]["times_as_fast"]
            print(f"dense first is {ratio['median']:.2f} times as fast ({ratio['least']:.2f} to {ratio['most']:.2f})")
            for name, plan in found["compare"]["plans"].items():
                speed, hits = found["compare"]["tokens_per_s"][name], found["compare"]["hit_rate"][name]
                print(f"{name}: {speed:.3f} tokens/s, hit rate {100 * hits:.1f} %; {plan}")
        else:
            found["budgets"] = []
            for budget in [parse_size(text, "--budgets") for text in args.budgets.split(",")]:
                found["budgets"].append(at_budget(work, budget, not args.no_cap))
                print(json.dumps(found["budgets"][-1]), file=sys.stderr, flush=True)
            table(found["budgets"])
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
