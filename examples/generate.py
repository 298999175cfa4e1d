"""Generate text with half of the experts in memory, and say what the expert cache did."""

from __future__ import annotations

import argparse

from transformers import AutoTokenizer, TextStreamer

import offmoe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", help="a Hub id, a folder with safetensors, or 'demo'")
    parser.add_argument("--prompt", default="And the LORD said unto")
    parser.add_argument("--slots", type=int, default=4, help="experts in memory per layer")
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()

    model = offmoe.from_pretrained(args.model, slots_per_layer=args.slots)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    model.generate(**inputs, max_new_tokens=args.new_tokens, streamer=TextStreamer(tokenizer))

    stats = model.offload.stats()
    print(f"hit rate {stats.hit_rate:.1%}, {stats.misses} misses, {stats.disk_bytes / 1e6:.1f} MB read")
    model.offload.close()  # ends the reader threads and frees the slots


if __name__ == "__main__":
    main()
