#!/usr/bin/env python3
"""Compares what a missed expert can get on a CPU (fetch, cpu or auto): decoding timed in paired rounds, and estimated.

There are six set-ups: the demo model on text, and models with random weights of Mixtral's and of Qwen3's expert shapes
on a recorded routing (the demo's, and gpt-oss-20b's from tests/data), each with two cache sizes. In every round the
three ways decode the same tokens, a few in turn each, so that other load on the machine affects all of them. Each
set-up is calibrated before and after its rounds. Every round is estimated too: its recording is replayed and priced at
the mean of the two calibrations.

With --json, one last line. "worst_vs_best": the time of auto divided by the time of the better of the other two, as a
median over rounds; the largest of the set-ups. "worst_prediction_error": the relative error of the estimated tokens/s,
as a median over rounds; the largest of the set-ups and ways.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from offmoe.budget.inspect import inspect
from offmoe.cli.bench import TEXTS
from offmoe.config import ON_MISS, OffloadConfig
from offmoe.handle import Offload
from offmoe.hf.adapters.find import find_experts
from offmoe.hf.hub.locate import locate
from offmoe.hf.replay import ReplayedRouting
from offmoe.measure.calibrate import calibrate
from offmoe.profile import CostModel
from offmoe.simulate.replay import Recording
from offmoe.simulate.sweep import Settings, Totals, evaluate
from offmoe.trace.trace import Trace, read_trace
from offmoe.types import CacheStats
from tools.bench.synthetic import write_mixtral, write_qwen3

GPT_OSS = Path(__file__).parents[2] / "tests" / "data" / "gptoss20b_6req.npz"
PROMPT_TOKENS, WARM_TOKENS, TOKENS_AT_ONCE = 8, 48, 4
DEMO_TIMES = 2
"""The demo decodes this many times as many tokens as the others, because its tokens take less time."""
FREE_BYTES = 4 * 10**9


@dataclass(frozen=True)
class SetUp:
    """One model with one cache. routing: to replay; None: the routers' own."""

    name: str
    model: str
    slots: int
    routing: Trace | None


class Way:
    """The model of a set-up, loaded with one value of on_miss; its routing is recorded."""

    def __init__(self, setup: SetUp, on_miss: str, recording: Path):
        self.recording = recording
        self.model: Any = offmoe.from_pretrained(
            setup.model,
            device="cpu",
            slots_per_layer=setup.slots,
            scope="model",
            prefetch=0,
            on_miss=on_miss,
            trace=recording,
        )
        self.offload: Offload = self.model.offload
        self._routing = None
        if setup.routing is not None:
            shape = self.model.offload._executor.shape
            self._routing = ReplayedRouting(setup.routing, shape)
            self._routing.attach(list(find_experts(self.model).values()))

    def begin(self, prompt: torch.Tensor, row: int) -> None:
        """Prefill. prompt: int64 [1, n]; row: row of the routing for its first token."""
        if self._routing is not None:
            self._routing.seek(row)
        self._out = self.model(input_ids=prompt, use_cache=True)
        self.tokens = [int(self._out.logits[0, -1].argmax())]

    def decode(self, tokens: int) -> float:
        """Decode `tokens` more tokens. Returns the seconds."""
        began = time.perf_counter()
        for _ in range(tokens):
            self._out = self.model(
                input_ids=torch.tensor([self.tokens[-1:]]), past_key_values=self._out.past_key_values, use_cache=True
            )
            self.tokens.append(int(self._out.logits[0, -1].argmax()))
        return time.perf_counter() - began


@torch.no_grad()
def play(ways: Mapping[str, Way], prompt: torch.Tensor, row: int, tokens: int, turn: int) -> dict[str, float]:
    """Seconds of each way in one round. The ways take turns every few tokens: what disturbs one disturbs all."""
    for way in ways.values():
        way.begin(prompt, row)
    seconds = dict.fromkeys(ways, 0.0)
    for i in range(0, tokens, TOKENS_AT_ONCE):
        first = (turn + i // TOKENS_AT_ONCE) % len(ON_MISS)
        for how in ON_MISS[first:] + ON_MISS[:first]:
            seconds[how] += ways[how].decode(min(TOKENS_AT_ONCE, tokens - i))
    assert len({tuple(way.tokens) for way in ways.values()}) == 1, "all ways compute the same"
    return seconds


def measure(
    setup: SetUp, prompts: Callable[[int], torch.Tensor], args: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """Ratios, tokens/s and the errors of their estimates in one set-up."""
    inspected = inspect(
        setup.model, OffloadConfig(device="cpu", slots_per_layer=setup.slots, scope="model", prefetch=0)
    )
    before = calibrate(inspected, args.calibrate)
    tokens = args.tokens * (DEMO_TIMES if setup.routing is None else 1)
    rounds: list[dict[str, float]] = []
    ways: dict[str, Way] = {}
    try:
        for how in ON_MISS:
            ways[how] = Way(setup, how, scratch / f"{how}.npz")
        play(ways, prompts(0), 0, max(tokens, WARM_TOKENS), 0)
        for i in range(1, args.rounds + 1):
            rounds.append(play(ways, prompts(i), (i - 1) * (tokens + PROMPT_TOKENS) + 400, tokens, i))
    finally:
        for way in ways.values():
            way.offload.close()
    shape = inspected.catalog.shape
    calibrated = mean_costs(before, calibrate(inspected, args.calibrate))
    typical = {how: statistics.median(r[how] for r in rounds) for how in ON_MISS}
    best = min(("fetch", "cpu"), key=lambda how: typical[how])
    found: dict[str, Any] = {
        "set-up": setup.name,
        "slots": setup.slots,
        "tokens": tokens,
        "best": best,
        "vs_best": statistics.median(r["auto"] / r[best] for r in rounds),
    }
    for how in ON_MISS:
        trace = read_trace(ways[how].recording)
        estimates = [estimated(trace, calibrated, i) for i in range(args.rounds)]
        errors = [r[how] / estimate.single_seconds - 1 for r, estimate in zip(rounds, estimates, strict=True)]
        whole = sum((estimate.stats for estimate in estimates), CacheStats.for_layers(shape.layers))
        found[how] = {
            "tokens_per_s": tokens / typical[how],
            "hit_rate": whole.hit_rate,
            "host_computed": whole.host_computed,
            "misses": whole.misses,
            "error": statistics.median(errors),
        }
    found["costs"] = calibrated.to_dict()
    return found


def estimated(trace: Trace, costs: CostModel, i: int) -> Totals:
    """The totals of round `i` of a recording, priced."""
    assert trace.options is not None
    return evaluate(Recording(trace), trace.options, Settings(costs, test_requests=frozenset({i + 1}))).test


def mean_costs(a: CostModel, b: CostModel) -> CostModel:
    """The mean of the calibrations before and after, for the time in between."""
    one, other = a.to_dict(), b.to_dict()
    return CostModel.from_dict({name: (float(one[name]) + float(other[name])) / 2 for name in one if name in other})  # type: ignore[arg-type]


def set_ups(scratch: Path, quick: bool) -> Iterator[tuple[SetUp, Callable[[int], torch.Tensor]]]:
    """The set-ups with their prompts. Models are written when they are needed, and removed."""
    tokenizer = AutoTokenizer.from_pretrained(locate("demo").folder)
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
    """The tokens of a trace that have all of their experts."""
    whole = np.asarray((trace.experts >= 0).all(axis=(1, 2)))
    return replace(trace.select(whole, np.arange(int(whole.sum()))), predicted=None)


def table(found: Sequence[dict[str, Any]]) -> None:
    print(f"{'set-up':10}{'slots':>6}{'auto/best':>11}   tokens/s (error of the estimate), hit rate")
    for row in found:
        ways = "  ".join(
            f"{how} {row[how]['tokens_per_s']:.2f} ({row[how]['error']:+.0%}) {row[how]['hit_rate']:.0%}"
            for how in ON_MISS
        )
        print(f"{row['set-up']:10}{row['slots']:6}{row['vs_best']:11.3f}   {ways}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--tokens", type=int, default=24, help=f"decoded per round and way; {DEMO_TIMES} times as many of the demo"
    )
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
        rounded = {"worst_vs_best": round(worst, 4), "worst_prediction_error": round(error, 4)}
        print(json.dumps({**rounded, "set_ups": found}))


if __name__ == "__main__":
    main()
