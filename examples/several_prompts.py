"""Several prompts in step: an expert that is read serves all of them, and each answer is the one it is alone."""

from __future__ import annotations

import argparse

from transformers import AutoTokenizer

import offmoe

PROMPTS = ["And the LORD said unto", "def read(self, size=-1):", "HACKER, n."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", help="a Hub id, a folder with safetensors, or 'demo'")
    parser.add_argument("--slots", type=int, default=4, help="experts in memory per layer")
    parser.add_argument("--new-tokens", type=int, default=24)
    args = parser.parse_args()

    model = offmoe.from_pretrained(args.model, slots_per_layer=args.slots)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    with model.offload:  # ends the reader threads and frees the slots, whatever happens
        out = model.offload.generate_many(tokenizer(PROMPTS)["input_ids"], max_new_tokens=args.new_tokens)
        stats = model.offload.stats()
    for ids in out:
        print(tokenizer.decode(ids[0], skip_special_tokens=True).replace("\n", " "))
    print(f"{stats.misses} misses for {len(PROMPTS)} prompts, {stats.disk_bytes / 1e6:.1f} MB read")


if __name__ == "__main__":
    main()
