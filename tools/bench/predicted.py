#!/usr/bin/env python3
"""Holds predicted speeds to measured ones on this machine's CPU: the demo model, and one of Mixtral's shape.

The synthetic model has random weights (8 layers x 8 experts of 22 MB in bf16, 1.4 GB, or as int4). Each model decodes
with all of its experts resident and with fewer. Its speed is predicted as `offmoe inspect` does, once from the probe of
a fraction of a second and once from `offmoe calibrate`; both with uniform routing, and the calibrated one also at the
hit rate that the run had, which leaves the costs as the only error. Rounds of probe, prediction and run alternate.

Prints a table: tokens/s predicted and measured, and predicted / measured as a median with its range. With --json one
last line {"cases": {name: {...}}}. The machine must be otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch
import transformers

import offmoe
from offmoe.bench.scratch import ended_by_sigterm, scratch_folder
from offmoe.budget.choices import in_default_context, measured_costs, rated_costs
from offmoe.budget.inspect import inspect, survey
from offmoe.budget.predict import predict
from offmoe.config import OffloadConfig
from offmoe.measure.calibrate import calibrate
from offmoe.measure.quick import probe
from offmoe.pack.pack import pack, weight_format
from offmoe.profile import Profile
from tools.bench.synthetic import write_mixtral

LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, VOCABULARY = 8, 8, 2, 1024, 3584, 32000
TINY = (128, 256)
CONTEXT = 512
PROMPT_TOKENS, WARM_TOKENS = 4, 48


@dataclass(frozen=True)
class Case:
    """One model with one cache."""

    name: str
    model: str
    slots: int
    exactness: str

    @property
    def options(self) -> dict[str, Any]:
        return {
            "device": "cpu",
            "slots_per_layer": self.slots,
            "scope": "layer",
            "max_context": CONTEXT,
            "exactness": self.exactness,
        }


def measure(case: Case, tokens: int, rounds: int, calibrate_s: float) -> dict[str, Any]:
    """Predicted and measured tokens/s of one case."""
    config = OffloadConfig(**case.options)
    profile = Profile(costs=calibrate(inspect(case.model, OffloadConfig(**case.options, prefetch=0)), calibrate_s))
    found = survey(case.model, config)
    from_costs = measured_costs(profile, found.needs, found.config.exactness)
    probed, ran, hit_rates = [], [], []
    model: Any = offmoe.from_pretrained(case.model, **case.options)
    with model.offload:
        chance = torch.Generator().manual_seed(0)
        for number in range(rounds + 1):
            way = in_default_context(found, config, rated_costs(probe(found)))[0]
            assert way.predicted is not None
            before = model.offload.stats()
            seconds = decode(model, tokens if number else WARM_TOKENS, chance)
            if number:  # the first round fills the cache
                probed.append(way.predicted.tokens_per_s)
                ran.append(tokens / seconds)
                hit_rates.append((model.offload.stats() - before).hit_rate)
    calibrated = in_default_context(found, config, from_costs)[0]
    assert calibrated.predicted is not None
    assert profile.costs is not None
    hit_rate = statistics.median(hit_rates)
    at_hit_rate = predict(found.needs.shape, found.config, found.plan, profile.costs, hit_rate=hit_rate)
    ratios = [a / b for a, b in zip(probed, ran, strict=True)]
    measured = statistics.median(ran)
    return {
        "measured_tokens_per_s": measured,
        "measured_hit_rate": hit_rate,
        "predicted_hit_rate": calibrated.predicted.hit_rate,
        "probed_tokens_per_s": statistics.median(probed),
        "probed_ratio": statistics.median(ratios),
        "probed_ratio_range": [min(ratios), max(ratios)],
        "calibrated_tokens_per_s": calibrated.predicted.tokens_per_s,
        "calibrated_ratio": calibrated.predicted.tokens_per_s / measured,
        "calibrated_ratio_at_hit_rate": at_hit_rate.tokens_per_s / measured,
        "most_tokens_per_s": calibrated.predicted.most_tokens_per_s,
    }


def decode(model: Any, tokens: int, chance: torch.Generator) -> float:
    """Seconds to decode `tokens` sampled tokens after a prompt of a few random ones."""
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT_TOKENS), generator=chance)
    past = model(input_ids=ids, use_cache=True).past_key_values
    began = time.perf_counter()
    for _ in range(tokens):
        ids = torch.randint(3, model.config.vocab_size, (1, 1), generator=chance)
        past = model(input_ids=ids, past_key_values=past, use_cache=True).past_key_values
    return time.perf_counter() - began


def cases(scratch: Path, quick: bool) -> list[Case]:
    """Write the models, and list what is measured."""
    hidden, intermediate = TINY if quick else (HIDDEN, INTERMEDIATE)
    dense, packed = scratch / "bf16", scratch / "int4"
    write_mixtral(dense, hidden, intermediate, layers=LAYERS, experts=EXPERTS, top_k=TOP_K, vocabulary=VOCABULARY)
    pack(dense, packed, weight_format("int4"))
    return [
        Case("demo, all resident", "demo", 8, "bitwise"),
        Case("demo, 4 of 8 slots", "demo", 4, "bitwise"),
        Case("synthetic bf16, all resident", str(dense), 8, "bitwise"),
        Case("synthetic bf16, 3 of 8 slots", str(dense), 3, "bitwise"),
        Case("synthetic int4, all resident", str(packed), 8, "numeric"),
        Case("synthetic int4, 3 of 8 slots", str(packed), 3, "numeric"),
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder with 3 GB of room for a few minutes (default: temporary)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="decoded per round")
    parser.add_argument("--calibrate", type=float, default=10.0, help="seconds of calibration per case")
    parser.add_argument("--quick", action="store_true", help="a tiny synthetic model: does everything run?")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {}
    with ended_by_sigterm(), scratch_folder("offmoe-predicted-", args.work) as scratch:
        for case in cases(scratch, args.quick):
            found[case.name] = measure(case, args.tokens, args.rounds, args.calibrate)
    print(f"{torch.get_num_threads()} threads, {args.rounds} rounds of {args.tokens} tokens; predicted / measured")
    print(
        f"{'case':30} {'measured':>9} {'hits':>6} {'probed':>8} {'ratio (range)':>20} {'calibrated':>10} {'ratio':>6}"
    )
    for name, f in found.items():
        low, high = f["probed_ratio_range"]
        probed = f"{f['probed_tokens_per_s']:8.2f} {f['probed_ratio']:6.2f} ({low:.2f} to {high:.2f})"
        calibrated = f"{f['calibrated_tokens_per_s']:10.2f} {f['calibrated_ratio']:6.2f}"
        at_hit_rate = f"at the measured hit rate {f['calibrated_ratio_at_hit_rate']:.2f}"
        measured = f"{f['measured_tokens_per_s']:9.2f} {f['measured_hit_rate']:6.1%}"
        print(f"{name:30} {measured} {probed} {calibrated}, {at_hit_rate}")
    if args.json:
        print(json.dumps({"cases": found}))


if __name__ == "__main__":
    main()
