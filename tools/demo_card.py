#!/usr/bin/env python3
"""Measure the demo model that ships and write its model card.

What moves: held-out text through stock transformers, teacher-forced, in windows of 512 tokens; the routing it causes
goes through offmoe's simulator. Bound: about a minute on one core. Must never write a number by hand.

    tools/demo_card.py WORK      WORK: the folder of tools/train_demo.py, which holds the held-out tokens
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_demo
from transformers import AutoTokenizer, MixtralForCausalLM

from offmoe.config import CacheOptions
from offmoe.simulate.replay import belady, replay
from offmoe.trace.trace import Trace
from offmoe.types import CacheShape

MODEL = Path(__file__).resolve().parents[1] / "offmoe" / "demo" / "model"
WINDOWS = 6

CARD = """---
license: other
license_name: psf-and-public-domain
library_name: transformers
tags: [mixtral, mixture-of-experts, demo]
---
# The demo model of offmoe
A Mixtral-architecture language model of {parameters:.2f} M parameters, small enough for a package: {layers} layers, 8
experts with top-2 routing, hidden size 128, expert size 256, byte-level BPE of 4,096 pieces, bf16. It exists to show
and to test an expert cache on routing like that of a real model. It writes recognizable English and Python; it knows
nothing.

## Data and licenses
| source | share of training windows | license |
|---|---|---|
| Python standard library (CPython 3.11, without tests) | {python:.0%} | PSF-2.0 |
| King James Bible (Debian bible-kjv-text) | {bible:.0%} | public domain |
| The Jargon File 4.4.7 (Debian dict-jargon) | {jargon:.0%} | public domain |
| The Devil's Dictionary, A. Bierce (Debian dict-devil) | {devil:.0%} | public domain |
| set.mm of Metamath, statements and comments without proofs (Debian metamath-databases) | {metamath:.0%} | CC0 |

Every 50th document of each source was held out. Weights: same terms as the sources; our part is under Apache-2.0.

## Training
`tools/train_demo.py`: {tokens:.1f} M tokens in {steps} steps of 8 x 512 on two CPU cores; Muon for hidden matrices,
AdamW for the rest; rate held to step 2200, from there 62 % of it falling linearly to zero. Router losses: load balance
per layer (weight {balance}; 0.02, 0.05 and 0.08 before steps 925, 1175 and 2200), agreement with the prediction from
the layer before (weight {ahead}, from step 1175 on). Longer training was still paying when it was stopped.

## Held-out loss
Nats per token of 512-token windows, in bf16 with stock transformers: {losses}.

## Routing
Held-out text, teacher-forced, 512-token windows, {routed} tokens in the proportions of training.

| | demo | Mixtral 8x7B |
|---|---|---|
| overlap of consecutive tokens | {overlap:.3f} | .374 |
| LRU hit rate at 2 / 4 / 6 of 8 slots | {lru} % | 37.3 / 61.6 / 81.9 % |
| aged LFU at 4 of 8 | {lfu:.1f} % | 63.2 % |
| Belady at 4 of 8 | {belady:.1f} % | 74.6 % |
| recall@2 of the next layer's router, asked one layer early | {recall:.3f} | .866 |
| ... by layer | {recall_by_layer} | .57 .72 .79 .87 .86 ... |
| busiest expert / uniform | {busiest_over_uniform:.2f} | 1.35 |

Overlap by layer: {overlap_by_layer}. LRU at 4 of 8 by layer: {lru_by_layer} %.

## Samples
Temperature 0.7, top-k 40, 90 tokens.

{samples}
"""


def held_out(work: Path) -> dict[str, torch.Tensor]:
    """Windows [n, 512] per source, as many as its share of training of 20 x WINDOWS, spread evenly."""
    out = {}
    for name, share in train_demo.SOURCES.items():
        tokens = np.load(work / f"{name}.held.npy")
        count = min(max(1, round(share * 20 * WINDOWS)), len(tokens) // train_demo.WINDOW)
        starts = np.linspace(0, len(tokens) - train_demo.WINDOW - 1, count).astype(int)
        out[name] = train_demo.windows(tokens, starts)
    return out


def as_trace(experts: np.ndarray) -> Trace:
    tokens, layers, k = experts.shape
    shape = CacheShape((8,) * layers, (k,) * layers, (1,) * layers)
    steps = np.arange(tokens, dtype=np.int32)
    return Trace("demo", shape, experts.astype(np.int16), np.zeros(tokens, np.int32), steps)


def samples(model: Any) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    out = []
    for seed, prompt in enumerate(("And the LORD said unto", "def read(self, size=-1):\n", "hacker\n n.\n\n    ")):
        torch.manual_seed(seed)
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=90, do_sample=True, temperature=0.7, top_k=40)
        out.append("```\n" + tokenizer.decode(ids[0], skip_special_tokens=True) + "\n```")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--json", action="store_true", help="print the routing figures as one last line")
    args = parser.parse_args()
    model = MixtralForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    held = held_out(args.work)
    losses = train_demo.evaluate(model, held)
    experts, predicted = train_demo.routing(model, held)
    summary = train_demo.routing_summary(experts, predicted)
    trace = as_trace(experts)
    rates = {
        (policy, slots): replay(trace, CacheOptions(policy, slots_per_layer=slots)).stats
        for policy, slots in (("lru", 2), ("lru", 4), ("lru", 6), ("aged-lfu", 4))
    }
    bound = belady(trace, CacheOptions(slots_per_layer=4))
    overlap = (experts[1:, :, :, None] == experts[:-1, :, None, :]).any(3).mean((0, 2))
    steps = torch.load(args.work / "checkpoint.pt", weights_only=True)["step"]
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        layers=model.config.num_hidden_layers,
        steps=steps,
        tokens=steps * train_demo.BATCH * train_demo.WINDOW / 1e6,
        balance=train_demo.BALANCE,
        ahead=train_demo.LOOK_AHEAD,
        losses=", ".join(f"{name} {loss:.2f}" for name, loss in losses.items()),
        routed=len(experts),
        lru=" / ".join(f"{100 * rates['lru', slots].hit_rate:.1f}" for slots in (2, 4, 6)),
        lfu=100 * rates["aged-lfu", 4].hit_rate,
        belady=100 * bound.hit_rate,
        overlap_by_layer=" ".join(f"{x:.3f}" for x in overlap),
        lru_by_layer=" ".join(f"{100 * layer.hit_rate:.1f}" for layer in rates["lru", 4].by_layer),
        samples=samples(model),
        **train_demo.SOURCES,
        **summary,
    )
    (MODEL / "README.md").write_text(card)
    print(card)
    if args.json:
        figures = {"lru_4_of_8": rates["lru", 4].hit_rate, "overlap": summary["overlap"], "recall": summary["recall"]}
        print(json.dumps({**figures, "losses": losses}))


if __name__ == "__main__":
    main()
