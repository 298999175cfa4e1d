#!/usr/bin/env python3
"""Measures decoding and prefill of whole models against what the machine's memory and disk allow.

Two checkpoints with random int4 experts are written once (or reused from --work): Mixtral 8x7B's and Qwen3-30B-A3B's
shape with 8 layers. Each round reads memory with the kernels' threads, decodes, and prefills, all in one process. The
bound of a token is the time in which the weights that it needs (dense ones, and those of its experts) pass through
memory at the rate of the same round. Each round also runs with torch's operators for the dense part, and with all of
torch's threads. With --cap, only a share of the experts has slots and the files are cold; the bound is then reading the
bytes of the misses, or computing, whichever takes longer. Random weights route evenly (Mixtral's shape) or always alike
(the others), so each share is measured once more with the recorded routing of a trained model that has as many experts:
the demo model's for Mixtral's shape, gpt-oss-20b's from the test data for its own, where predictions are transition
counts of another request, or --routing. Qwen3's shape has none. Decoder layers are not computed in one call then.

--profile adds where a token's time goes, by kind of module. --json prints one object as the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch

import offmoe
from offmoe.bench.scratch import ended_by_sigterm, scratch_folder
from offmoe.budget.inspect import inspect
from offmoe.compute.kernels.cpu import CpuKernels, kernel_threads
from offmoe.compute.kernels.library import status
from offmoe.config import OffloadConfig
from offmoe.errors import ConfigError
from offmoe.hf.adapters.find import find_experts
from offmoe.hf.load.kernel_linears import LinearForward
from offmoe.hf.replay import ReplayedRouting
from offmoe.measure.probes import DiskProbe, drop_page_cache
from offmoe.pack.pack import TILED, weight_format
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.store import ExpertStore
from offmoe.trace.trace import Trace, read_trace
from offmoe.types import CacheStats, ExpertKey
from tools.bench.figures import spread
from tools.bench.prefetch import real_routing, record_demo
from tools.bench.shapes import GPT_OSS, GROUP, SHAPES, VOCABULARY, add_options, configs
from tools.bench.synthetic import num_experts, write_packed

READ_BYTES = 512 << 20
DISK_S = 3.0
MAX_CONTEXT = 1024
KINDS = (
    ("projections", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ("experts", ("experts",)),
    ("router", ("gate",)),
    ("norms", ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm")),
    ("head", ("lm_head",)),
)
"""Kinds of modules, and the last part of their names."""


class Run:
    """One loaded model, and its figures of each round."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.model: Any = offmoe.from_pretrained(folder, device="cpu", max_context=MAX_CONTEXT, **options)
        self._random = torch.Generator().manual_seed(0)
        self.cache: Any = None

    def tokens(self, count: int) -> torch.Tensor:
        return torch.randint(0, VOCABULARY, (1, count), generator=self._random)

    def prefill(self, count: int) -> float:
        """Seconds of a prompt; decoding goes on from it."""
        began = time.perf_counter()
        self.cache = self.model(input_ids=self.tokens(count), use_cache=True, logits_to_keep=1).past_key_values
        return time.perf_counter() - began

    def decode(self, count: int) -> list[float]:
        """Seconds of each of `count` tokens."""
        times = []
        for _ in range(count):
            ids, began = self.tokens(1), time.perf_counter()
            self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
            times.append(time.perf_counter() - began)
        return times

    def token_bytes(self) -> tuple[int, int]:
        """Bytes of the dense weights that a token reads, and of its experts."""
        table = self.model.get_input_embeddings().weight
        dense = sum(p.nbytes for p in self.model.parameters() if p is not table)
        shape = self.model.offload.shape
        return dense, sum(k * size for k, size in zip(shape.top_k, shape.expert_bytes, strict=True))

    @contextmanager
    def dense_by_torch(self) -> Iterator[None]:
        """The linear layers of the dense part as stock transformers computes them, with all threads."""
        own = {module: module.__dict__.get("forward") for module in self.model.modules()}
        forwards = {module: forward for module, forward in own.items() if isinstance(forward, LinearForward)}
        for module in forwards:
            del module.__dict__["forward"]
        with self.all_threads():
            yield
        for module, forward in forwards.items():
            object.__setattr__(module, "forward", forward)

    @contextmanager
    def all_threads(self) -> Iterator[None]:
        """torch has all of its threads for a few tokens, too, while the block runs."""
        steps = self.model.offload._steps
        threads, steps.threads = steps.threads, None
        yield
        steps.threads = threads

    @contextmanager
    def profiled(self) -> Iterator[dict[str, float]]:
        """Seconds by kind of module while the block runs."""
        seconds, began, hooks = defaultdict[str, float](float), dict[int, float](), []
        kinds = {name: kind for kind, names in KINDS for name in names}

        def before(module: torch.nn.Module, *_: object) -> None:
            began[id(module)] = time.perf_counter()

        def after(kind: str) -> Callable[..., None]:
            def add(module: torch.nn.Module, *_: object) -> None:
                seconds[kind] += time.perf_counter() - began[id(module)]

            return add

        for name, module in self.model.named_modules():
            kind = kinds.get(name.rpartition(".")[2])
            if kind is not None:
                hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after(kind))]
        yield seconds
        for hook in hooks:
            hook.remove()


def resident(folder: Path, options: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Everything has a slot: decoding against the memory's rate."""
    run = Run(folder, options)
    dense, experts = run.token_bytes()
    library = status().library
    assert library is not None, status().message
    memory = torch.ones(READ_BYTES, dtype=torch.uint8)
    rounds = []
    with run.model.offload, CpuKernels(library, kernel_threads()) as reader, torch.inference_mode():
        for key in range(2):  # fills the slots
            run.prefill(args.prompt if key else 512)
        run.decode(3)
        for _ in range(args.rounds):
            rates = []
            for _ in range(3):
                began = time.perf_counter()
                reader.read(memory)
                rates.append(READ_BYTES / 1e9 / (time.perf_counter() - began))
            with run.dense_by_torch():
                torch_prompt_s = run.prefill(args.prompt)
                torch_token_s = statistics.median(run.decode(args.tokens))
            prompt_s = run.prefill(args.prompt)
            with run.all_threads():
                spinning_token_s = statistics.median(run.decode(args.tokens))
            token_s = statistics.median(run.decode(args.tokens))
            bound = (dense + experts) / 1e9 / max(rates)
            rounds.append(
                {
                    "read_gb_s": max(rates),
                    "tokens_per_s": 1 / token_s,
                    "prefill_tokens_per_s": args.prompt / prompt_s,
                    "of_bound": bound / token_s,
                    "decode_vs_all_threads": spinning_token_s / token_s,
                    "decode_vs_torch_dense": torch_token_s / token_s,
                    "prefill_vs_torch_dense": torch_prompt_s / prompt_s,
                }
            )
        out = {"dense_bytes": dense, "expert_bytes": experts, **spreads(rounds)}
        if args.profile:
            with run.profiled() as seconds:
                total = sum(run.decode(args.tokens))
            seconds["rest"] = total - sum(seconds.values())
            out["profile_ms"] = {kind: round(s / args.tokens * 1e3, 3) for kind, s in seconds.items()}
    return out


def capped(
    folder: Path,
    slots: int,
    options: dict[str, Any],
    compute_s: float,
    routing: Trace | None,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Some experts have slots, and the files are cold: decoding against disk and computing.

    slots: of all layers together. compute_s: a token takes with everything resident. routing: to replay; None: the
    routers' own.
    """
    shards = Checkpoint.open(folder).shards
    quotas = tuple(slots // args.layers + (layer < slots % args.layers) for layer in range(args.layers))
    rounds = []
    for _ in range(args.rounds):
        drop_page_cache(shards)
        run = Run(folder, {**options, "slots_per_layer": quotas, "scope": "model"})
        with run.model.offload as offload, torch.inference_mode():
            if routing is not None:
                replayed = ReplayedRouting(routing, offload.shape)
                replayed.attach(list(find_experts(run.model).values()))
                offload.predict_with(replayed)
            run.prefill(args.prompt)
            run.decode(args.tokens)
            before: CacheStats = offload.stats()
            seconds = sum(run.decode(args.tokens))
            stats = offload.stats() - before
            gb_s = disk_gb_s(folder, run.model)
            missed = sum(
                (layer.misses + layer.pending) * size
                for layer, size in zip(stats.by_layer, offload.shape.expert_bytes, strict=True)
            )
        rounds.append(
            {
                "tokens_per_s": args.tokens / seconds,
                "disk_gb_s": gb_s,
                "resident": stats.hits / stats.demands,
                "prefetched": stats.pending / stats.demands,
                "read": stats.misses / stats.demands,
                "times_bound": seconds / max(missed / 1e9 / gb_s, compute_s * args.tokens),
            }
        )
    return spreads(rounds)


def recorded_routing(shape: str, folder: Path, file: Path | None) -> Trace | None:
    """A trained model's routing for the shape in the folder; None: there is none. file: of the user's choice."""
    if file is not None:
        trace = read_trace(file)
        try:
            ReplayedRouting(trace, inspect(folder, OffloadConfig(device="cpu")).catalog.shape)
        except ConfigError as error:
            sys.exit(f"whole_model.py: --routing {file}: {error} --shape chooses one.")
        return trace
    if shape == GPT_OSS:
        trace = real_routing()
        return trace.select(trace.request == 1)  # the one that its predictions were not made of
    return record_demo() if shape == "mixtral" else None


def disk_gb_s(folder: Path, model: Any) -> float:
    """GB/s at which the runtime's readers read cold experts, nothing else running."""
    found = inspect(folder, OffloadConfig(device="cpu", exactness="numeric"))
    shards, shape = found.checkpoint.shards, model.offload.shape
    keys = [ExpertKey(layer, expert) for layer, count in enumerate(shape.experts) for expert in range(count)]
    with (
        closing(ExpertStore(shards, found.catalog.records)) as store,
        closing(DiskProbe(store, keys, shards)) as probe,
    ):
        return probe.gb_s(DISK_S)


def spreads(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Per figure its median and range over the rounds."""
    return {name: spread([figures[name] for figures in rounds], digits=4) for name in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--cap", type=float, action="append", default=[], help="share of the experts that have slots")
    parser.add_argument("--routing", type=Path, help="replay this trace, under --cap, instead of the shape's own")
    parser.add_argument("--profile", action="store_true", help="where a token's time goes")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    with ended_by_sigterm(), scratch_folder("offmoe-whole-", args.work) as scratch:
        for shape in args.shape or SHAPES:
            tiles, config = args.layout == TILED, configs(args.layers)[shape]
            folder = (args.work or scratch) / f"{shape}-{args.layers}{'-tiles' if tiles else ''}"
            if not folder.exists():
                write_packed(folder, config, weight_format("int4", GROUP), scratch, tiles=tiles)
            options = {"exactness": "numeric", "activations": args.activations, "dense": args.dense}
            routing = recorded_routing(shape, folder, args.routing) if args.cap else None
            found[shape] = out = {"resident": resident(folder, options, args)}
            compute_s = 1 / out["resident"]["tokens_per_s"]["median"]
            for share in args.cap:
                slots = max(2, round(share * num_experts(config) * args.layers))
                out[f"cap {share}"] = capped(folder, slots, options, compute_s, None, args)
                if routing is not None:
                    out[f"cap {share}, recorded routing"] = capped(folder, slots, options, compute_s, routing, args)
    for shape, parts in found.items():
        for part, figures in parts.items():
            print(f"{shape}, {part}")
            for name, value in figures.items():
                print(f"  {name:22} {value}")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
