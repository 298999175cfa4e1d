#!/usr/bin/env python3
"""Throughput of many prompts in step, against one prompt, and how equal their tokens are to those of each alone.

The checkpoint is that of tiers.py: 3.9 GB of Mixtral's shape with random weights. Each set-up runs in a process and a
memory cgroup of its own, which counts page cache. Every figure is a ratio of runs of that process. `--compare N`
instead continues N prompts with the demo model and compares each row with stock transformers.

Prints a table; with --json one last line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import checkout  # noqa: F401

import offmoe
from offmoe.bench.memory_cap import MemoryCap
from offmoe.bench.scratch import ended_by_sigterm, scratch_folder
from offmoe.cli.bench import LIBRARIES_BYTES
from offmoe.errors import CapacityError
from offmoe.pack.pack import pack, weight_format
from offmoe.text import parse_size
from tools.bench import tiers
from tools.bench.synthetic import write_mixtral

SETUPS: dict[str, dict[str, Any]] = {
    "bf16 bitwise": {"exactness": "bitwise"},
    "bf16 numeric": {"exactness": "numeric"},
    "int4": {"experts": "native"},
}
ACCELERATE = "accelerate"
"""The set-up of transformers with accelerate's offload, bf16, with the same prompts as one padded batch."""
PROMPT_TOKENS = 8
TINY = (256, 384)
QUICK_BYTES = 24 << 20
"""Memory of accelerate's weights with --quick: some of them are on the disk."""


def prompts(count: int, low: int = PROMPT_TOKENS, high: int = PROMPT_TOKENS) -> list[list[int]]:
    """Random token ids of the synthetic model's vocabulary, the same in every process."""
    numbers = random.Random(count * 1000 + high)
    return [[numbers.randrange(3, 30000) for _ in range(numbers.randint(low, high))] for _ in range(count)]


def measure(model: Path, widths: list[int], tokens: int, options: dict[str, Any], refill: bool) -> dict[str, Any]:
    """Tokens per second at each width; the prompts that begin are prefilled together, which counts."""
    loaded: Any = offmoe.from_pretrained(model, device="cpu", max_context=4096, **options)
    found: dict[str, Any] = {"tokens_per_s": {}, "experts_per_token": {}}
    with loaded.offload as offload:

        def rate(ids: list[list[int]], width: int, limits: int | list[int]) -> float:
            offload.reset_stats()
            began = time.perf_counter()
            out = offload.generate_many(
                ids, max_new_tokens=limits, batch_size=width, do_sample=False, eos_token_id=None
            )
            return sum(row.shape[1] - len(i) for row, i in zip(out, ids, strict=True)) / (time.perf_counter() - began)

        rate(prompts(1), 1, 2)
        for width in widths:
            found["tokens_per_s"][width] = rate(prompts(width), width, tokens)
            found["experts_per_token"][width] = offload.stats().demands / (width * tokens)
        if refill:
            width, count = 8, 24
            even = rate(prompts(count), width, tokens)
            numbers = random.Random(5)
            limits = [numbers.randint(1, 2 * tokens - 1) for _ in range(count)]
            found["refill"] = rate(prompts(count, 4, 2 * PROMPT_TOKENS - 4), width, limits) / even
        found["slots"] = list(offload.memory().slots_per_layer)
    return found


def measure_accelerate(model: Path, widths: list[int], tokens: int, memory: int | None, folder: str) -> dict[str, Any]:
    """Tokens per second of stock transformers with accelerate's offload at each width.

    Args:
        model: The checkpoint.
        widths: Numbers of rows.
        tokens: New ones per row.
        memory: Bytes for weights that stay; the others are read from the disk at every use, a layer at a time, which
            comes on top. None: as much as there is.
        folder: Where accelerate writes the weights that it reads.
    """
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    limit = {} if memory is None else {"max_memory": {"cpu": memory}}
    stock: Any = load(model, dtype="auto", device_map="auto", offload_folder=folder, **limit)
    stock.requires_grad_(False)

    def rate(ids: list[list[int]], new_tokens: int) -> float:
        batch = torch.tensor(ids)
        began = time.perf_counter()
        out = stock.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
        )
        return (out.numel() - batch.numel()) / (time.perf_counter() - began)

    rate(prompts(1), 2)
    return {"tokens_per_s": {width: rate(prompts(width), tokens) for width in widths}}


def in_cgroup(command: list[str], cap: int | None) -> dict[str, Any]:
    """Run a child of this script under a memory limit."""
    with ExitStack() as closing:
        limit = None if cap is None else MemoryCap.create(cap, "batch")
        if limit is not None:
            closing.callback(limit.close)
        with subprocess.Popen(
            [sys.executable, __file__, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            if limit is not None:
                limit.add(process.pid)
            said = process.communicate("go\n")[0]
        if process.returncode:  # the other set-ups are worth running all the same
            return {"failed": process.returncode}
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
        if limit is not None:
            found["peak_bytes"] = limit.peak_bytes
        return found


def compare(count: int, tokens: int) -> dict[str, Any]:
    """Rows of the demo model that differ from stock transformers' tokens, and by how much their logits do."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from offmoe.cli.bench import TEXTS
    from offmoe.hf.hub.locate import locate

    folder = locate("demo").folder
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    words, numbers = " ".join(TEXTS).split(), random.Random(0)
    starts = [numbers.randrange(len(words) - 12) for _ in range(count)]
    ids = [tokenizer(" ".join(words[s : s + numbers.randint(1, 12)]))["input_ids"] for s in starts]
    asked = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").requires_grad_(False)
    for weight in [*stock.parameters(), *stock.buffers()]:  # memory of torch's own: alignment decides last bits
        weight.data = weight.data.clone()
    expected = [
        stock.generate(torch.tensor([i]), attention_mask=torch.ones(1, len(i)), max_new_tokens=tokens, **asked)
        for i in ids
    ]
    found: dict[str, Any] = {"rows": count, "tokens": tokens}
    for exactness in ("bitwise", "numeric"):
        model: Any = offmoe.from_pretrained("demo", device="cpu", slots_per_layer=4, exactness=exactness)
        with model.offload as offload:
            rows = offload.generate_many(ids, max_new_tokens=tokens, batch_size=16, **asked)
        pairs = list(zip(rows, expected, strict=True))
        same = [torch.equal(ours.sequences, theirs.sequences) for ours, theirs in pairs]
        # Logits are comparable up to the first token that differs; the first step's always are.
        first = [float((ours.logits[0] - theirs.logits[0]).abs().max()) for ours, theirs in pairs]
        equal = [all(map(torch.equal, ours.logits, theirs.logits)) for ours, theirs in pairs]
        found[exactness] = {
            "other_tokens": count - sum(same),
            "other_logits": count - sum(equal),
            "largest_first_difference": max(first),
        }
    return found


def table(found: dict[str, Any]) -> None:
    for name, values in found.items():
        if "failed" in values:
            print(f"{name:13} ended with status {values['failed']}")
            continue
        rates = values["tokens_per_s"]
        one = rates[min(rates, key=int)]
        for width, rate in rates.items():
            line = f"{name:13} {width:>3} rows: {rate:7.2f} tokens/s, {rate / one:5.2f} x"
            if "experts_per_token" in values:
                line += f", {values['experts_per_token'][width]:6.2f} experts/token"
            if width in values.get("vs_accelerate", {}):
                line += f", {values['vs_accelerate'][width]:5.2f} x accelerate"
            print(line)
        if "refill" in values:
            print(f"{name:13} prompts and answers of very different length / equal ones: {values['refill']:.3f}")


def child(setup: dict[str, Any], widths: list[int], tokens: int) -> dict[str, Any]:
    """What a process of its own measures."""
    model, options = Path(setup["model"]), setup["options"]
    if setup["name"] == ACCELERATE:
        return measure_accelerate(model, widths, tokens, options.get("device_memory"), setup["scratch"])
    return measure(model, widths, tokens, options, setup["refill"])


def all_setups(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The figures of each set-up; those that are in bf16 come before the checkpoint becomes int4."""
    cap = parse_size(args.cap, "--cap")
    hidden, intermediate = TINY if args.quick else (tiers.HIDDEN, tiers.INTERMEDIATE)
    model, packed = Path(scratch, "model"), Path(scratch, "packed")
    shape = {"layers": tiers.LAYERS, "experts": tiers.EXPERTS, "top_k": tiers.TOP_K}
    layer_bytes = tiers.EXPERTS * 6 * hidden * intermediate
    write_mixtral(model, hidden, intermediate, vocabulary=tiers.VOCABULARY, **shape)
    found: dict[str, Any] = {}
    for name in sorted(args.setups.split(","), key=lambda name: name == "int4"):
        options = dict(SETUPS.get(name, {}))
        if name == "int4":
            pack(model, packed, weight_format("int4"))
            shutil.rmtree(model)
        if not args.quick:
            # accelerate is killed with room for one layer beside its weights, and runs with room for two.
            options["device_memory"] = cap - LIBRARIES_BYTES - (2 * layer_bytes if name == ACCELERATE else 0)
        elif name == ACCELERATE:
            options["device_memory"] = QUICK_BYTES
        folder = os.fspath(packed if name == "int4" else model)
        refill = args.refill and name in ("bf16 numeric", "int4")
        setup = {"name": name, "model": folder, "options": options, "refill": refill, "scratch": f"{scratch}/offload"}
        widths = args.accelerate_widths if name == ACCELERATE else args.widths
        common = ["--child", json.dumps(setup), "--widths", widths, "--tokens", str(args.tokens)]
        began = time.monotonic()
        try:
            found[name] = in_cgroup(common, None if args.quick else cap)
        except CapacityError as error:
            sys.exit(f"batch.py: {error}")
        found[name]["seconds"] = round(time.monotonic() - began, 1)
        shutil.rmtree(setup["scratch"], ignore_errors=True)
    theirs = found.get(ACCELERATE, {}).get("tokens_per_s", {})
    for name, values in found.items():
        if theirs and name != ACCELERATE:
            rates = values.get("tokens_per_s", {})
            values["vs_accelerate"] = {width: rates[width] / theirs[width] for width in rates if width in theirs}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder with 8 GB of room for a few minutes (default: temporary)")
    parser.add_argument("--cap", default="2.5GB", help="memory of each set-up, page cache included")
    parser.add_argument("--widths", default="1,4,16,64", help="rows at the same time")
    parser.add_argument("--accelerate-widths", default="1,16", help="those that accelerate runs")
    parser.add_argument("--no-refill", dest="refill", action="store_false", help="leave out prompts of other lengths")
    parser.add_argument("--tokens", type=int, default=8, help="new ones per row")
    parser.add_argument("--setups", default=",".join([*SETUPS, ACCELERATE]), help="which of the set-ups")
    parser.add_argument("--compare", type=int, metavar="N", help="only compare N rows of the demo model with stock")
    parser.add_argument("--quick", action="store_true", help="tiny experts and no cap: does everything run?")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    widths = [int(width) for width in args.widths.split(",")]
    unknown = set(args.setups.split(",")) - {*SETUPS, ACCELERATE}
    if unknown:
        parser.error(f"--setups: no set-up is called {min(unknown)!r}")
    if args.child:
        sys.stdin.readline()  # until this process is in its cgroup
        print(json.dumps(child(json.loads(args.child), widths, args.tokens)))
        return
    if args.compare:
        found = compare(args.compare, args.tokens)
        print(json.dumps(found, indent=None if args.json else 1))
        return
    with ended_by_sigterm(), scratch_folder("offmoe-batch-", args.work) as scratch:
        found = all_setups(args, scratch)
    table(found)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
