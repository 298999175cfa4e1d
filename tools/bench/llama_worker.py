"""What llama_cpp.py runs in processes of its own: offmoe, llama.cpp's library, or llama-bench, each with one model.

A worker waits for a line on stdin, so that it can be moved into a cgroup before it takes any memory. Its last line on
stdout is JSON: {"prefill_tokens_per_s", "tokens_per_s"} and what else its program tells. tests/test_llama_cpp.py asks
it for the greedy tokens of llama.cpp's library.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkout  # noqa: F401

CONTEXT, BATCH = 1024, 512
WARM_UP = 256
"""Tokens of the prompt that warms up, where all experts fit: 16 for each of 128, at 8 per token."""
MMAP = 1
"""`llama_load_mode`: weights stay in the page cache."""


class ModelParams(ctypes.Structure):
    """The head of `struct llama_model_params` (llama.h of 2026), with room for whatever follows it."""

    _fields_ = (
        ("pointers", ctypes.c_void_p * 2),
        *((name, ctypes.c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        ("more_pointers", ctypes.c_void_p * 4),
        *((name, ctypes.c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host")),
        ("rest", ctypes.c_uint8 * 256),
    )


class ContextParams(ctypes.Structure):
    """The head of `struct llama_context_params`."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        ("outputs", ctypes.c_uint32 * 2),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 512),
    )


class Batch(ctypes.Structure):
    """`struct llama_batch`."""

    _fields_ = (("n_tokens", ctypes.c_int32), ("pointers", ctypes.c_void_p * 6))


def library(folder: Path, name: str) -> ctypes.CDLL:
    """One of llama.cpp's libraries in a folder, by the beginning of its name."""
    files = sorted(folder.glob(f"{name}.*"))
    if not files:
        sys.exit(f"llama_cpp.py: {folder} has no {name}")
    return ctypes.CDLL(str(files[0]), mode=ctypes.RTLD_GLOBAL)


class Llama:
    """One model in llama.cpp, driven by its C API.

    Structures are passed by value. Only their heads are described here, so their defaults are looked at: another
    version of the library, whose fields stand elsewhere, is refused.
    """

    def __init__(self, folder: Path, model: Path, threads: int, capped: bool) -> None:
        base, ggml, self._c = (library(folder, name) for name in ("libggml-base", "libggml", "libllama"))
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self._alive, c = (base, ggml), self._c
        c.llama_model_default_params.restype = ModelParams
        c.llama_context_default_params.restype = ContextParams
        c.llama_model_load_from_file.argtypes = (ctypes.c_char_p, ModelParams)
        c.llama_init_from_model.argtypes = (ctypes.c_void_p, ContextParams)
        c.llama_decode.argtypes = (ctypes.c_void_p, Batch)
        c.llama_batch_get_one.argtypes = (ctypes.c_void_p, ctypes.c_int32)
        c.llama_batch_get_one.restype = Batch
        c.llama_memory_clear.argtypes = (ctypes.c_void_p, ctypes.c_bool)
        c.llama_get_memory.argtypes = c.llama_synchronize.argtypes = (ctypes.c_void_p,)
        c.llama_model_get_vocab.argtypes = c.llama_vocab_n_tokens.argtypes = (ctypes.c_void_p,)
        c.llama_get_logits_ith.argtypes = (ctypes.c_void_p, ctypes.c_int32)
        c.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
        for name in ("model_load_from_file", "init_from_model", "get_memory", "model_get_vocab"):
            getattr(c, f"llama_{name}").restype = ctypes.c_void_p
        params, of_context = c.llama_model_default_params(), c.llama_context_default_params()
        known = (of_context.n_ctx, of_context.n_batch, of_context.n_ubatch, of_context.n_threads, params.split_mode)
        if known != (512, 2048, 512, 4, 1) or not params.use_extra_bufts:
            sys.exit(f"llama_cpp.py: this libllama has other structures ({known}); use --llama-bench")
        if capped:  # repacked weights would be a copy of all of them
            params.load_mode, params.use_extra_bufts = MMAP, False
        self._model = c.llama_model_load_from_file(str(model).encode(), params)
        of_context.n_ctx, of_context.n_batch, of_context.n_ubatch = CONTEXT, BATCH, BATCH
        of_context.n_threads = of_context.n_threads_batch = threads
        self._context = c.llama_init_from_model(self._model, of_context) if self._model else None
        if not self._context:
            sys.exit(f"llama_cpp.py: llama.cpp does not load {model}")

    def begin(self) -> None:
        """What follows counts. llama.cpp counts nothing."""

    def clear(self) -> None:
        """Forget the context."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def run(self, ids: list[int]) -> None:
        """Compute tokens behind the context."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        if self._c.llama_decode(self._context, self._c.llama_batch_get_one(tokens, len(ids))):
            sys.exit("llama_cpp.py: llama_decode failed")
        self._c.llama_synchronize(self._context)

    def scores(self) -> list[float]:
        """The logits behind the last token."""
        count: int = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model))
        scores: list[float] = self._c.llama_get_logits_ith(self._context, -1)[:count]
        return scores


class Offmoe:
    """One model in offmoe."""

    def __init__(self, model: Path, threads: int, capped: bool, options: dict[str, Any]) -> None:
        import torch

        import offmoe

        torch.set_num_threads(threads)
        self._torch, self._cache = torch, None
        self._model: Any = offmoe.from_pretrained(model, device="cpu", max_context=CONTEXT, fill=not capped, **options)
        while self._model.offload.fill_progress().running:  # llama.cpp reads all of a file, too, where it fits
            time.sleep(0.05)
        self._before = self._model.offload.stats()

    def begin(self) -> None:
        self._before = self._model.offload.stats()

    def clear(self) -> None:
        self._cache = None

    def run(self, ids: list[int]) -> None:
        with self._torch.inference_mode():
            out = self._model(
                input_ids=self._torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        self._cache = out.past_key_values

    def more(self) -> dict[str, Any]:
        """What it tells of the decoding besides its speed."""
        stats = self._model.offload.stats() - self._before
        return {"hit_rate": stats.hit_rate, "disk_gb": stats.disk_bytes / 1e9}


def measured(program: Llama | Offmoe, task: dict[str, Any]) -> dict[str, Any]:
    """Prefill and decoding after a warm-up. task: as llama_cpp.py sends it."""
    chance = random.Random(0)

    def ids(count: int) -> list[int]:
        return [chance.randrange(task["vocabulary"]) for _ in range(count)]

    def seconds(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    if not task["capped"]:
        program.run(ids(WARM_UP))
        program.clear()
    prompt_s = seconds(lambda: program.run(ids(task["prompt"])))
    for _ in range(task["warm"]):
        program.run(ids(1))
    program.begin()
    decode_s = sum(seconds(lambda: program.run(ids(1))) for _ in range(task["tokens"]))
    return {"prefill_tokens_per_s": task["prompt"] / prompt_s, "tokens_per_s": task["tokens"] / decode_s}


def greedy(llama: Llama, prompt: list[int], tokens: int) -> dict[str, Any]:
    """The likeliest tokens behind a prompt, one after the other, and the logits that each was chosen by."""
    chosen: list[int] = []
    logits = []
    for _ in range(tokens):
        llama.run(chosen[-1:] or prompt)
        logits.append(llama.scores())
        chosen.append(max(range(len(logits[-1])), key=logits[-1].__getitem__))
    return {"tokens": chosen, "logits": logits}


def main() -> None:
    sys.stdin.readline()
    task = json.loads(sys.argv[1])
    model, threads = Path(task["model"]), task["threads"]
    if task["program"] == "llama-bench":
        run = ["-p", task["prompt"], "-n", task["tokens"], "-t", threads, "-r", 1, "-o", "json"]
        run += ["-lm", "mmap", "--repack", 0] if task["capped"] else []
        os.execv(task["path"], [task["path"], "-m", str(model), *map(str, run)])
    if task["program"] == "offmoe":
        ours = Offmoe(model, threads, task["capped"], task["options"])
        print(json.dumps({**measured(ours, task), **ours.more()}))
        return
    llama = Llama(Path(task["path"]), model, threads, task["capped"])
    if task["program"] == "greedy":
        print(json.dumps(greedy(llama, task["ids"], task["tokens"])))
        return
    print(json.dumps(measured(llama, task)))


if __name__ == "__main__":
    main()
