#!/usr/bin/env python3
"""What a missed expert should get on a CPU, fetch, cpu or auto: decoding timed in paired rounds, and foretold.

What moves: the experts that are missed, from the disk. Six set-ups: the demo model on text, models of Mixtral's and
Qwen3's expert shapes and random weights on a recorded routing (the demo's; gpt-oss-20b's from tests/data), each with
two cache sizes. The three ways take turns in every round on the same tokens, which come out the same. Each set-up is
calibrated first; the run's own recording priced at those costs is the prediction.

"worst_vs_best": the largest over the set-ups of the median over rounds of auto's time divided by that of the better of
the other two, the one with the lower median. "worst_prediction_error": the largest relative error of tokens/s, over
set-ups and ways.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

import offmoe
from offmoe.bench.scratch import ended_by_sigterm, scratch_folder
from offmoe.calibration import calibrate
from offmoe.cli.bench import TEXTS
from offmoe.config import ON_MISS, OffloadConfig
from offmoe.hf.adapters import find_experts
from offmoe.hf.load import resolve_folder
from offmoe.hf.replayed import ReplayedRouting
from offmoe.inspection import inspect
from offmoe.profile import CostModel
from offmoe.simulator import Recording
from offmoe.trace import Trace, read_trace
from offmoe.tuning import Settings, evaluate
from tools.bench.synthetic import write_mixtral, write_qwen3

GPT_OSS = Path(__file__).parents[2] / "tests" / "data" / "gptoss20b_6req.npz"
PROMPT_TOKENS, WARM_TOKENS = 8, 48
FREE_BYTES = 4 * 10**9


@dataclass(frozen=True)
class SetUp:
    """One model with one cache. routing: to replay; None: the routers' own."""

    name: str
    model: str
    slots: int
    routing: Trace | None


class Way:
    """The model of a set-up, loaded with one on_miss and recording."""

    def __init__(self, setup: SetUp, on_miss: str, recording: Path):
        self.recording = recording
        self.model: Any = offmoe.from_pretrained(
            setup.model, device="cpu", slots_per_layer=setup.slots, prefetch=0, on_miss=on_miss, trace=recording
        )
        self._routing = None
        if setup.routing is not None:
            shape = self.model.offload._executor.shape
            self._routing = ReplayedRouting(setup.routing, shape)
            self._routing.attach(list(find_experts(self.model).values()))

    def run(self, prompt: torch.Tensor, tokens: int, row: int) -> tuple[list[float], list[int]]:
        """Seconds of each token, and the tokens. prompt: int64 [1, n]; row: of the routing, for its first token."""
        if self._routing is not None:
            self._routing.seek(row)
        with torch.no_grad():
            out = self.model(input_ids=prompt, use_cache=True)
            times, chosen = [], [int(out.logits[0, -1].argmax())]
            for _ in range(tokens):
                began = time.perf_counter()
                out = self.model(
                    input_ids=torch.tensor([chosen[-1:]]), past_key_values=out.past_key_values, use_cache=True
                )
                times.append(time.perf_counter() - began)
                chosen.append(int(out.logits[0, -1].argmax()))
        return times, chosen

    def close(self) -> None:
        self.model.offload.close()


def measure(
    setup: SetUp, prompts: Callable[[int], torch.Tensor], args: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """Ratios and tokens/s of one set-up."""
    inspected = inspect(setup.model, OffloadConfig(device="cpu", slots_per_layer=setup.slots, prefetch=0))
    before = calibrate(inspected, args.calibrate)
    ways = {how: Way(setup, how, scratch / f"{how}.npz") for how in ON_MISS}
    times: dict[str, list[float]] = {how: [] for how in ON_MISS}
    try:
        for i in range(args.rounds + 1):  # the first warms up
            told = set()
            for how in ON_MISS[i % 3 :] + ON_MISS[: i % 3]:
                tokens = args.tokens if i else WARM_TOKENS
                seconds, chosen = ways[how].run(
                    prompts(i), tokens, row=max(0, i - 1) * (args.tokens + PROMPT_TOKENS) + 400 * (i > 0)
                )
                told.add(tuple(chosen))
                if i:
                    times[how].append(sum(seconds))
            assert len(told) == 1, "all ways compute the same"
    finally:
        for way in ways.values():
            way.close()
    costs = mean_costs(before, calibrate(inspected, args.calibrate))
    best = min(("fetch", "cpu"), key=lambda how: statistics.median(times[how]))
    ratios = [ours / theirs for ours, theirs in zip(times["auto"], times[best], strict=True)]
    found: dict[str, Any] = {
        "set-up": setup.name,
        "slots": setup.slots,
        "best": best,
        "vs_best": statistics.median(ratios),
    }
    for how in ON_MISS:
        measured = args.rounds * args.tokens / sum(times[how])
        trace = read_trace(ways[how].recording)
        assert trace.options is not None
        timed = frozenset(range(1, args.rounds + 1))
        part = evaluate(Recording(trace), trace.options, Settings(costs, test_requests=timed)).test
        assert part.tokens_per_s is not None
        found[how] = {
            "tokens_per_s": measured,
            "predicted": part.tokens_per_s,
            "error": part.tokens_per_s / measured - 1,
            "hit_rate": part.stats.hit_rate,
            "host_computed": part.stats.host_computed,
        }
    found["costs"] = costs.to_dict()
    return found


def mean_costs(a: CostModel, b: CostModel) -> CostModel:
    """Of the calibrations before and after: what the machine was like in between."""
    one, other = a.to_dict(), b.to_dict()
    return CostModel.from_dict({name: (float(one[name]) + float(other[name])) / 2 for name in one if name in other})  # type: ignore[arg-type]


def set_ups(scratch: Path, quick: bool) -> Iterator[tuple[SetUp, Callable[[int], torch.Tensor]]]:
    """Writes models when their turn comes, and removes them."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_folder("demo"))
    texts = [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]
    demo_routing = scratch / "demo.npz"
    recorded: Any = offmoe.from_pretrained("demo", device="cpu", slots_per_layer=8, prefetch=0, trace=demo_routing)
    torch.manual_seed(0)
    with recorded.offload:
        for ids in texts[:4]:
            recorded.generate(input_ids=ids, max_new_tokens=160, min_new_tokens=160, do_sample=True)
    for slots in (3, 5):
        yield SetUp("demo", "demo", slots, None), lambda i: texts[i % len(texts)][:, :PROMPT_TOKENS]

    def random_prompt(i: int) -> torch.Tensor:
        return torch.randint(5, 1000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(i))

    small = 8 if quick else 1
    folder = scratch / "mixtral"
    write_mixtral(folder, 2048 // small, 3584 // small, layers=4, experts=8, top_k=2, vocabulary=8192)
    for slots in (3, 5):
        yield SetUp("mixtral", str(folder), slots, read_trace(demo_routing)), random_prompt
    shutil.rmtree(folder)
    folder = scratch / "qwen3"
    write_qwen3(folder, 2048 // small, 768 // small, layers=4, experts=32, top_k=4, vocabulary=8192)
    for slots in (6, 12):
        yield SetUp("qwen3", str(folder), slots, complete(read_trace(GPT_OSS))), random_prompt
    shutil.rmtree(folder)


def complete(trace: Trace) -> Trace:
    """Its tokens with all of their experts."""
    whole = (trace.experts >= 0).all(axis=(1, 2))
    return replace(
        trace,
        experts=trace.experts[whole],
        request=trace.request[whole],
        step=np.arange(int(whole.sum()), dtype=np.int32),
        token=None,
        probs=None,
        predicted=None,
    )


def table(found: Sequence[dict[str, Any]]) -> None:
    print(f"{'set-up':10}{'slots':>6}{'auto/best':>11}   tokens/s measured (predicted), hit rate")
    for row in found:
        ways = "  ".join(
            f"{how} {row[how]['tokens_per_s']:.2f} ({row[how]['predicted']:.2f}, {100 * row[how]['error']:+.0f} %) "
            f"{100 * row[how]['hit_rate']:.0f} %"
            for how in ON_MISS
        )
        print(f"{row['set-up']:10}{row['slots']:6}{row['vs_best']:11.3f}   {ways}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=24, help="decoded per round and way")
    parser.add_argument(
        "--calibrate", type=float, default=8.0, metavar="S", help="seconds, before and after the rounds"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="a folder with 4 GB of room (default: temporary)")
    parser.add_argument("--only", help="the set-ups of this model")
    parser.add_argument("--quick", action="store_true", help="tiny experts, few rounds: does everything run?")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.quick:
        args.rounds, args.tokens, args.calibrate = 2, 6, 0.5
    found = []
    with ended_by_sigterm(), scratch_folder("offmoe-on-miss-", args.work) as scratch:
        if shutil.disk_usage(scratch).free < FREE_BYTES:
            sys.exit(f"on_miss.py: {scratch} has less than {FREE_BYTES / 1e9:.0f} GB free; name another with --work")
        for setup, prompts in set_ups(scratch, args.quick):
            if args.only in (None, setup.name):
                found.append(measure(setup, prompts, args, scratch))
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    table(found)
    if args.json:
        worst = max(row["vs_best"] for row in found)
        error = max(abs(row[how]["error"]) for row in found for how in ON_MISS)
        print(
            json.dumps({"worst_vs_best": round(worst, 4), "worst_prediction_error": round(error, 4), "set_ups": found})
        )


if __name__ == "__main__":
    main()
