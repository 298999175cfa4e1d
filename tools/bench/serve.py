#!/usr/bin/env python3
"""Measures what the server costs and saves, on the demo model or another.

Decode: tokens/s of a stream through the server against `generate` in the same process, in turns; the client is a
process of its own. First token: the time to the first token of each turn of a conversation, by mode of prefix reuse,
with the bytes of experts that it read. Leaving: seconds from a client's end to an idle engine, while decoding and in a
long prompt. Masks: microseconds per token of a JSON grammar at a vocabulary of 150,000. Soak (--soak N): N requests
from eight clients, a third of them cut off and a tenth malformed; each whole answer is compared with its answer alone.

Prints tables; with --json one last line with all figures.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import checkout  # noqa: F401
import psutil
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import offmoe
from offmoe.dialogue.constraint import GrammarCompiler
from offmoe.serve.engine import Engine
from offmoe.serve.http.app import build_app
from offmoe.serve.http.guard import Access
from offmoe.serve.http.service import Service
from offmoe.serve.run import bind

PARTS = ("decode", "turns", "leaving", "masks")
PROMPT = "In the beginning God created the heaven and the earth. And the earth was without form, and"
NO_END = {"logit_bias": {"0": -100}, "temperature": 0}
"""Fields that keep the demo from ending an answer: token 0 ends it."""
CLIENT = """
import json, sys, time, urllib.request
url, body = sys.argv[1], sys.argv[2].encode()
began = time.perf_counter()
for line in urllib.request.urlopen(urllib.request.Request(url, body), timeout=600): pass
print(time.perf_counter() - began)
"""


@contextmanager
def server(engine: Engine) -> Iterator[str]:
    """Serve an engine at a socket -> its address."""
    bound = bind("127.0.0.1", 0)
    served = uvicorn.Server(
        uvicorn.Config(build_app(Service(engine, ["model"]), Access()), log_config=None, lifespan="off")
    )
    thread = threading.Thread(target=served.run, args=([bound],))
    thread.start()
    while not served.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        served.should_exit = True
        thread.join()
        bound.close()


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)


def decode(model: Any, tokenizer: Any, tokens: int, rounds: int) -> list[float]:
    """Ratios of tokens/s, server to generate, one per round. The first round is left out."""
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    body = json.dumps({"prompt": PROMPT, "max_tokens": tokens, "stream": True, **NO_END})
    ratios = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        alone = time.perf_counter() - began
        with Engine(model, tokenizer, prefix_reuse="off") as engine, server(engine) as url:
            command = [sys.executable, "-c", CLIENT, f"{url}/v1/completions", body]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        ratios.append(alone / float(done.stdout))
    return ratios[1:]


def first_tokens(model: Any, tokenizer: Any, turns: int, chunk: int) -> dict[str, list[dict[str, float]]]:
    """By mode: seconds to the first token, tokens reused and bytes read, of each turn of a conversation."""
    found = {}
    for mode in ("off", "exact", "numeric"):
        text, rows = "", []
        with Engine(model, tokenizer, prefix_reuse=mode, prefill_chunk=chunk) as engine, server(engine) as url:
            for turn in range(turns):
                text += f"{turn} And the LORD spake unto Moses, saying, " * 20
                before = model.offload.stats()
                began = time.perf_counter()
                reply = post(f"{url}/v1/completions", {"prompt": text, "max_tokens": 1, **NO_END})
                seconds = time.perf_counter() - began
                read = (model.offload.stats() - before).disk_bytes
                cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
                prompt = reply["usage"]["prompt_tokens"]
                rows.append({"ttft_s": seconds, "prompt": prompt, "cached": cached, "disk_bytes": read})
        found[mode] = rows
    return found


def leaving(model: Any, tokenizer: Any, rounds: int) -> dict[str, list[float]]:
    """Seconds from a client's end to an idle engine."""
    found: dict[str, list[float]] = {"decoding": [], "prefill": []}
    with Engine(model, tokenizer, prefix_reuse="off") as engine, server(engine) as url:
        host, port = url.removeprefix("http://").split(":")
        for when, times in found.items():
            prompt = PROMPT if when == "decoding" else PROMPT * (engine.max_context // 25)
            body = json.dumps({"prompt": prompt, "stream": True, **NO_END}).encode()
            for _ in range(rounds):
                with socket.create_connection((host, int(port))) as connection:
                    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
                    connection.sendall(head.encode() + body)
                    while not engine.running:
                        time.sleep(0.001)
                    time.sleep(0.05)
                began = time.perf_counter()
                while engine.running:
                    time.sleep(0.001)
                times.append(time.perf_counter() - began)
    return found


def mask_us(vocabulary: int) -> dict[str, float]:
    """Microseconds of one mask of a JSON grammar, at a vocabulary of bytes and of words made up."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<end>", *alphabet, *(f"{number:x}" + "aeiou"[number % 5] for number in range(vocabulary))][:vocabulary]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    size = tokenizer.get_vocab_size()
    grammars = GrammarCompiler(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"), size, [0])
    properties = {"a": {"type": "string"}, "b": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["a", "b"]}
    processor = grammars.processor(grammars.json(schema, "schema"), lambda: False)
    ids, times = torch.tensor([[5]]), []
    scores = torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        fresh = scores.clone()
        began = time.perf_counter()
        allowed = processor(ids, fresh)  # type: ignore[arg-type]
        times.append(1e6 * (time.perf_counter() - began))
        token = int(allowed.argmax())
        if token == 0:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return {
        "vocabulary": size,
        "median": statistics.median(times),
        "largest": max(times),
        "masks": len(times),
    }


def soak(model: Any, tokenizer: Any, requests: int, parallel: int) -> dict[str, float]:
    """Many requests at once; counts answers that differ from the same answer alone, and what is left afterwards."""
    rng = random.Random(0)
    prompts = [f"{PROMPT} {word}" for word in ("light", "darkness", "waters", "firmament", "evening", "morning", "day")]
    kinds = rng.choices(["whole", "cut", "malformed"], [57, 33, 10], k=requests)
    process = psutil.Process()
    with Engine(model, tokenizer, parallel=parallel, queue=64) as engine, server(engine) as url:
        body = {"max_tokens": 12, **NO_END}
        expected = {p: post(f"{url}/v1/completions", {**body, "prompt": p})["choices"][0]["text"] for p in prompts}
        threads, rss = threading.active_count(), process.memory_info().rss
        files = process.num_fds()
        wrong = {"answers": 0, "statuses": 0}

        def one(kind: str) -> None:
            prompt = rng.choice(prompts)
            if kind == "malformed":
                try:
                    post(f"{url}/v1/completions", {"prompt": [prompt, 3], "max_tokens": "many"})
                    wrong["statuses"] += 1
                except urllib.error.HTTPError as error:
                    wrong["statuses"] += error.code != 400
                return
            if kind == "whole":
                text = post(f"{url}/v1/completions", {**body, "prompt": prompt})["choices"][0]["text"]
                wrong["answers"] += text != expected[prompt]
                return
            request = urllib.request.Request(
                f"{url}/v1/completions",
                json.dumps({**body, "prompt": prompt, "stream": True, "max_tokens": 400}).encode(),
            )
            with urllib.request.urlopen(request, timeout=600) as reply:
                reply.readline()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, kinds))
        while engine.running or engine.waiting:
            time.sleep(0.01)
        time.sleep(0.5)
        return {
            "requests": requests,
            "parallel": parallel,
            "wrong_answers": wrong["answers"],
            "wrong_statuses": wrong["statuses"],
            "threads_left": threading.active_count() - threads,
            "files_left": process.num_fds() - files,
            "rss_growth_mib": (process.memory_info().rss - rss) / 2**20,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--slots-per-layer", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200, help="tokens of an answer in the rounds of decoding")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--max-context", type=int, default=2048)
    parser.add_argument("--soak", type=int, default=0, metavar="N")
    parser.add_argument("--parallel", type=int, default=2, help="answers in turns while soaking")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options = {"device": "cpu", "slots_per_layer": args.slots_per_layer, "max_context": args.max_context}
    figures: dict[str, Any] = {}
    if set(args.only) - {"masks"} or args.soak:
        model: Any = offmoe.from_pretrained(args.model, **options)
        tokenizer: Any = AutoTokenizer.from_pretrained(model.name_or_path)
        with model.offload:
            figures = with_model(model, tokenizer, args)
    if "masks" in args.only:
        masks = figures["masks_us"] = mask_us(150_000)
        print(f"masks at {masks['vocabulary']} tokens: {masks['median']:.0f} us, at most {masks['largest']:.0f}")
    if args.json:
        print(json.dumps(figures))


def with_model(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The figures that need a model, by name. Prints each."""
    figures: dict[str, Any] = {}
    if "decode" in args.only:
        ratios = figures["decode"] = decode(model, tokenizer, args.tokens, args.rounds)
        print(f"decode, server / generate: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    if "turns" in args.only:
        firsts = figures["first_tokens"] = first_tokens(model, tokenizer, args.turns, args.chunk)
        for mode, rows in firsts.items():
            last = rows[-1]
            share = last["ttft_s"] / firsts["off"][-1]["ttft_s"]
            print(
                f"turn {args.turns}, {last['prompt']} tokens, {mode}: {1e3 * last['ttft_s']:.0f} ms, {share:.2f}; "
                f"{last['cached']} tokens reused, {last['disk_bytes'] / 1e6:.1f} MB of experts read"
            )
    if "leaving" in args.only:
        left = figures["leaving_s"] = leaving(model, tokenizer, args.rounds)
        for when, times in left.items():
            median, most = 1e3 * statistics.median(times), 1e3 * max(times)
            print(f"idle after a client left, {when}: {median:.0f} ms, at most {most:.0f}")
    if args.soak:
        figures["soak"] = soak(model, tokenizer, args.soak, args.parallel)
        print(f"soak: {figures['soak']}")
    return figures


if __name__ == "__main__":
    main()
