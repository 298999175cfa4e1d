"""Chat in a terminal: one turn per line, an empty line ends. A model without a chat template continues the text."""

from __future__ import annotations

import argparse

from transformers import AutoTokenizer, TextStreamer

import offmoe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", help="a Hub id, a folder with safetensors, or 'demo'")
    parser.add_argument("--device-memory", default="auto", help="cap for everything on the device, such as 10GiB")
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()

    # The `with` ends the reader threads and frees the slots, also on Ctrl-C.
    model = offmoe.from_pretrained(args.model, device_memory=args.device_memory)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    with model.offload:
        while line := ask():
            messages.append({"role": "user", "content": line})
            before = model.offload.stats()
            inputs = tokenizer(prompt(tokenizer, messages), return_tensors="pt").to(model.device)
            out = model.generate(**inputs, max_new_tokens=args.new_tokens, streamer=streamer)
            answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})
            turn = model.offload.stats() - before  # snapshots subtract
            print(f"[hit rate {turn.hit_rate:.1%}, waited {turn.stall_s:.2f} s for experts]")


def ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def prompt(tokenizer, messages: list[dict[str, str]]) -> str:
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in messages)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


if __name__ == "__main__":
    main()
