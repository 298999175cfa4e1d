#!/usr/bin/env python3
"""Compares offmoe with accelerate's disk offload on a model larger than memory, under one cap that counts page cache.

A checkpoint of Mixtral's shape with random weights (7 layers x 8 experts of 69 MB, 3.9 GB) is written once. `offmoe
bench` measures each contender in a memory cgroup of its own, in paired rounds: on random tokens with the routers' own
routing, and on a routing with a trained model's locality, recorded from the demo model (or --routing). Both must give
the same tokens, bit for bit. A third run packs the experts as int4 with `offmoe pack`, against accelerate with the bf16
model; the weights differ then, so tokens are not compared.

Prints a table; with --json one last line: the figures on random tokens, and under "replayed" and "int4" the others.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkout  # noqa: F401

import offmoe
from offmoe.bench.scratch import ended_by_sigterm, scratch_folder
from offmoe.cli.bench import LIBRARIES_BYTES, TEXTS
from offmoe.pack.pack import pack, weight_format
from offmoe.text import parse_size
from tools.bench.synthetic import write_mixtral

LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, VOCABULARY = 7, 8, 2, 2048, 5632, 32000
TINY = (256, 384)
SPARE_BYTES = 2 * 10**9
RECORDED_TOKENS = 96


def bench(model: Path, arguments: list[str]) -> dict[str, Any]:
    """Run `offmoe bench` once. Its table goes to stderr."""
    command = [sys.executable, "-m", "offmoe", "bench", str(model), "--device", "cpu", "--json", *arguments]
    root = Path(offmoe.__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            said = process.communicate()[0]
        except BaseException:  # of us; it has contenders and a cgroup of each to end
            process.terminate()
            raise
    if process.returncode:
        sys.exit(f"tiers.py: offmoe bench ended with status {process.returncode}")
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def record_demo(path: Path, tokens: int = RECORDED_TOKENS) -> None:
    """Record the demo model's routing on some texts, with predictions; "auto" makes none for small experts.

    tokens: to generate for each text.
    """
    import torch
    from transformers import AutoTokenizer

    from offmoe.hf.hub.locate import locate

    tokenizer = AutoTokenizer.from_pretrained(locate("demo").folder)
    model: Any = offmoe.from_pretrained("demo", device="cpu", slots_per_layer=4, prefetch=2, trace=path)
    torch.manual_seed(0)
    with model.offload:
        for text in TEXTS:
            inputs = tokenizer(text, return_tensors="pt")
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True)


def figures(against: dict[str, Any], cap: int) -> dict[str, Any]:
    """The figures that are reported for one kind of work."""
    ours, baseline = against["ours"], against["baseline"]
    return {
        "tokens_per_s": round(ours["tokens_per_s"], 3),
        "accelerate_tokens_per_s": round(baseline["tokens_per_s"], 3),
        "vs_accelerate": round(against["ratio"]["median"], 3),
        "vs_bound": round(1 / against["roofline"]["share"], 3),
        "hit_rate": round(ours["hit_rate"], 4),
        "foretold_rate": round(ours["foretold_rate"], 4),
        "peak_bytes": ours["peak"]["cgroup"],
        "accelerate_peak_bytes": baseline["peak"]["cgroup"],
        "cap_bytes": cap,
        "same": against["same"],
        "disk_gb_s": round(against["roofline"]["disk_gb_s"], 3),
        "compute_ms": round(against["roofline"]["compute_ms"], 2),
    }


def gain(prefetch: dict[str, Any]) -> dict[str, Any]:
    """The gain of prefetching."""
    ratio = prefetch["ratio"]
    return {
        "prefetch_gain": round(ratio["median"] - 1, 4),
        "prefetch_gain_range": [round(ratio[end] - 1, 4) for end in ("least", "most")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder with 10 GB of room for a few minutes (default: temporary)")
    parser.add_argument("--cap", default="2.5GB", help="memory of each contender, page cache included")
    parser.add_argument("--routing", type=Path, help="replay this trace (8 experts, top-2) instead of the demo's")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8, help="new ones per round")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="that both compute with (default: torch's own choice)")
    parser.add_argument("--quick", action="store_true", help="tiny experts and no cap: does everything run?")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    hidden, intermediate = TINY if args.quick else (HIDDEN, INTERMEDIATE)
    nbytes = LAYERS * EXPERTS * 6 * hidden * intermediate
    cap = parse_size(args.cap, "--cap")
    with ended_by_sigterm(), scratch_folder("offmoe-tiers-", args.work) as scratch:
        free = shutil.disk_usage(scratch).free
        needed = 2.5 * nbytes + SPARE_BYTES  # accelerate writes the experts once more, pack a quarter of them
        if free < needed:
            sys.exit(f"tiers.py: {scratch} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} are needed: --work")
        model, routing = Path(scratch, "model"), args.routing or Path(scratch, "demo.npz")
        write_mixtral(model, hidden, intermediate, layers=LAYERS, experts=EXPERTS, top_k=TOP_K, vocabulary=VOCABULARY)
        if args.routing is None:
            record_demo(routing)
        threads = ["--threads", str(args.threads)] if args.threads else []
        common = ["--rounds", str(args.rounds), "--new-tokens", str(args.tokens), *threads]
        common += ["--prompt-tokens", str(args.prompt_tokens), "--scratch", str(scratch), "--max-context", "512"]
        if not args.quick:
            common += ["--memory-cap", str(cap), "--device-memory", str(cap - LIBRARIES_BYTES)]
        found = {}
        for name, work in (
            ("random", ["--random-tokens"]),
            ("replayed", ["--random-tokens", "--replay-routing", str(routing.resolve())]),
        ):
            print(f"--- {name} routing", file=sys.stderr, flush=True)
            against = bench(model, [*common, *work, "--against", "accelerate"])
            prefetch = bench(model, [*common, *work, "--against", "no-prefetch"])
            found[name] = figures(against, cap) | gain(prefetch)
        print("--- int4 experts", file=sys.stderr, flush=True)
        packed = Path(scratch, "packed")
        pack(model, packed, weight_format("int4"))
        for name, more in (("int4", []), ("int4_a8", ["--activations", "int8"])):
            as_int4 = ["--random-tokens", "--experts", "int4", "--against-model", str(model), *more]
            found[name] = figures(bench(packed, [*common, *as_int4, "--against", "accelerate"]), cap)
    print(f"{LAYERS} layers x {EXPERTS} experts of {nbytes / LAYERS / EXPERTS / 1e6:.0f} MB, {args.cap} of memory each")
    for name, values in found.items():
        print(f"{name:9} " + ", ".join(f"{key} {value}" for key, value in values.items()))
    if args.json:
        print(json.dumps({**found.pop("random"), **found}))


if __name__ == "__main__":
    main()
