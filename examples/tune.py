"""Record a run, replay it exactly, and ask what other caches would have done; replaying needs no model and no torch."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

import offmoe
from offmoe.simulate.replay import belady, replay
from offmoe.trace.trace import read_trace

PROMPTS = ("And the LORD said unto", "def read(self, size=-1):", "HACKER, n.")


def record(model_name: str, path: Path, slots: int, new_tokens: int) -> offmoe.CacheStats:
    """Run the prompts with a recorder; the trace is written when the model is closed."""
    model = offmoe.from_pretrained(model_name, slots_per_layer=slots, trace=path)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    with model.offload:
        for text in PROMPTS:
            inputs = tokenizer(text, return_tensors="pt").to(model.device)
            model.generate(**inputs, max_new_tokens=new_tokens)
        return model.offload.stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", help="a Hub id, a folder with safetensors, or 'demo'")
    parser.add_argument("--slots", type=int, default=4, help="experts in memory per layer while recording")
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.npz"
        recorded = record(args.model, path, args.slots, args.new_tokens)
        trace = read_trace(path)
    assert trace.options is not None  # the cache options of the recorded run
    print(f"recorded: {trace.tokens} tokens, hit rate {recorded.hit_rate:.1%}")
    print(f"replayed: hit rate {replay(trace, trace.options).stats.hit_rate:.1%}")

    for slots in (args.slots, args.slots + 1, args.slots + 2):
        options = replace(trace.options, slots_per_layer=slots, prefetch=0, on_miss="fetch")
        rates = {name: replay(trace, replace(options, eviction=name)).stats.hit_rate for name in ("aged-lfu", "lru")}
        rates["optimum"] = belady(trace, options).hit_rate
        print(f"{slots} slots: " + ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items()))


if __name__ == "__main__":
    main()
