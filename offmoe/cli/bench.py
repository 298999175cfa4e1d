"""`offmoe bench MODEL`: measure time per token, against the hardware's limits and against accelerate.

Each contender runs in a process of its own, and decodes greedily, whatever generation_config.json says. Between rounds
the disk is probed. A run takes rounds x tokens x the slower contender. Experts stay cached from round to round, as in
use. Every round has another prompt, so that no round profits from an earlier one.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from offmoe.bench import rounds
from offmoe.bench.messages import ACCELERATE, OFFMOE, Pass, Task
from offmoe.bench.scratch import ended_by_sigterm, scratch_folder
from offmoe.cli import options, prompts
from offmoe.cli.model import open_model
from offmoe.cli.output import Output, new_table
from offmoe.config import OffloadConfig
from offmoe.errors import ConfigError
from offmoe.profile import CACHE_OPTIONS
from offmoe.text import format_size, or_dash, parse_size, percent

if TYPE_CHECKING:
    from offmoe.budget.inspect import Inspected

NO_PREFETCH = "no-prefetch"
AGAINST = (ACCELERATE, NO_PREFETCH)
OTHER_OPTIONS = ("max_context", "experts", "dense", "exactness", "activations")
DEFAULT_ROUNDS, DEFAULT_TOKENS, RANDOM_PROMPT_TOKENS = 5, 32, 16
PROBE_SECONDS = 0.5
LIBRARIES_BYTES = 460 << 20
"""Memory of Python, torch and transformers, which a memory cap must hold besides the model (440 MiB measured with
tools/bench/tiers.py).
"""
SPARE_BYTES = 1 << 30
TEXTS = (
    "In the beginning the machine was without form, and",
    "The captain looked at the sea and said that the wind",
    "def read_lines(path):\n    with open(path) as file:\n        return",
    "It is a truth universally acknowledged, that a man who owns",
    "The results of the second experiment differ from those of the first because",
    "My dear friend, I have received your letter of the third of March, and",
    "Once upon a time there was a king who had three daughters, and the youngest",
    "The law of the land says that whoever takes the ox of another shall",
)


def parser() -> options.Parser:
    parser = options.Parser("bench", "Measure a model: time to first token, time per token, bytes, peak memory.")
    options.add_loading(parser)
    group = parser.add_argument_group("benchmark")
    add, number = options.add_option, options.positive
    against = "also run the same work with RUNTIME: accelerate, or no-prefetch (offmoe without prefetch)"
    add(group, "--against", "RUNTIME", against)
    stock = "the model that accelerate runs, if it is another one: the checkpoint that a packed one was written from"
    add(group, "--against-model", "MODEL", stock)
    replayed = "route tokens as in this recording, for models with random weights; the text is meaningless then"
    add(group, "--replay-routing", "TRACE", replayed)
    add(group, "--prompt", "TEXT", "continue TEXT in every round (default: another text in each)")
    add(group, "--prompt-tokens", "N", "continue N random tokens in place of a text", number)
    random_tokens = "continue with random tokens in place of the model's"
    group.add_argument("--random-tokens", action="store_true", help=random_tokens)
    tokens = f"tokens to generate per round (default: {DEFAULT_TOKENS})"
    add(group, "--new-tokens", "N", tokens, number, DEFAULT_TOKENS)
    measured = f"rounds to measure, after one that warms up (default: {DEFAULT_ROUNDS})"
    add(group, "--rounds", "N", measured, number, DEFAULT_ROUNDS)
    add(group, "--memory-cap", "SIZE", "run each contender in a memory cgroup of this size (Linux)")
    add(group, "--threads", "N", "threads that compute on the CPU", number, 0)
    add(group, "--scratch", "FOLDER", "folder for the second copy of the experts that accelerate may write")
    options.add_cache(parser)
    parser.set_defaults(no_generation_config=True)
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    if args.against is not None and args.against not in AGAINST:
        raise ConfigError(f"--against {args.against!r} is unknown. Use: {', '.join(AGAINST)}.")
    if args.prompt is not None and args.prompt_tokens is not None:
        raise ConfigError("--prompt and --prompt-tokens are both given; use one of them.")
    if args.new_tokens < 2:
        raise ConfigError("--new-tokens 1: the time per token needs a second one; use 2 or more.")
    cap = None if args.memory_cap is None else parse_size(args.memory_cap, "memory_cap")
    auto_memory = args.device_memory in (None, "auto")
    capped: dict[str, Any] = {"device_memory": max(1, cap - LIBRARIES_BYTES)} if cap is not None and auto_memory else {}
    with ended_by_sigterm(), open_model(args, out, **capped) as opened, ExitStack() as stack:
        if auto_memory and cap is None and args.against is not None:  # two contenders at once share the memory
            opened.inspect(device_memory=opened.inspected.plan.budget // 2)
        passes = _passes(args, opened.inspected, out)
        results = _measure(args, opened.fetch(), cap, passes, out, stack)
    out.result(_table(results), *_words(args, results))
    out.json(results)


def _passes(args: argparse.Namespace, inspected: Inspected, out: Output) -> list[Pass]:
    """One pass to warm up, and one per round."""
    vocabulary = int(inspected.hf_config.get_text_config().vocab_size)
    rng = random.Random(0)
    encoded: list[tuple[int, ...]]
    has_text = (
        args.prompt is not None or inspected.source.file is not None or (inspected.folder / "tokenizer.json").is_file()
    )
    if args.prompt_tokens is None and has_text:
        tokenizer = prompts.tokenizer_of(inspected)
        texts = TEXTS if args.prompt is None else (args.prompt,)
        encoded = [tuple(prompts.encode(tokenizer, text, None)[0].tolist()) for text in texts]
    else:
        length = args.prompt_tokens or RANDOM_PROMPT_TOKENS
        out.note(f"prompts are {length} random tokens")
        encoded = [tuple(rng.choices(range(vocabulary), k=length)) for _ in TEXTS]
    passes = []
    row = 0
    for i in range(args.rounds + 1):
        prompt = encoded[i % len(encoded)]
        prompts.fitting_tokens(args.new_tokens, len(prompt), inspected.plan.max_context, out)
        forced = tuple(rng.choices(range(vocabulary), k=args.new_tokens)) if args.random_tokens else ()
        passes.append(Pass(prompt, args.new_tokens, forced, row))
        row += len(prompt) + args.new_tokens - 1
    return passes


def _measure(
    args: argparse.Namespace, inspected: Inspected, cap: int | None, passes: list[Pass], out: Output, stack: ExitStack
) -> dict[str, Any]:
    """Run the rounds. stack: closes the contenders."""
    from offmoe.measure.probes import DiskProbe, drop_page_cache
    from offmoe.storage.store import ExpertStore

    shards = inspected.checkpoint.shards
    stock_model = _stock_model(args, inspected)
    contenders = _start_contenders(args, inspected, stock_model, cap, out, stack)
    store = stack.enter_context(closing(ExpertStore(shards, inspected.catalog.records)))
    disk = stack.enter_context(closing(DiskProbe(store, inspected.catalog.records, shards)))
    rates: list[float] = []

    def probe() -> None:
        rates.append(disk.gb_s(PROBE_SECONDS))
        drop_page_cache(shards)

    with out.progress("rounds", len(passes), "rounds") as advance:
        records = rounds.paired(contenders, passes, probe, advance)
    ours = records[0]
    return {
        "ours": ours.to_dict(),
        **_comparison(records, comparable=stock_model is None or not _other_weights(args, inspected)),
        "roofline": rounds.roofline(ours, contenders[0].costs(), statistics.median(rates)),
        "against": args.against,
        "rounds": len(ours.outcomes),
        "new_tokens": args.new_tokens,
        "memory": inspected.plan.to_dict(),
        "memory_cap": cap,
        "routing": "replayed" if args.replay_routing else "the model's own",
        "tokens": "random" if args.random_tokens else "greedy",
        "device": str(inspected.config.device),
    }


def _start_contenders(
    args: argparse.Namespace,
    inspected: Inspected,
    stock_model: Inspected | None,
    cap: int | None,
    out: Output,
    stack: ExitStack,
) -> list[rounds.ContenderProcess]:
    """Start the contenders, offmoe first. stock_model: what accelerate runs, if it does."""
    from offmoe.measure.probes import drop_page_cache

    scratch_parent = None if stock_model is None else _scratch_parent(args, stock_model)
    drop_page_cache(inspected.checkpoint.shards)  # or a contender reads pages that another cgroup is charged for
    config = inspected.config
    task = Task(
        OFFMOE,
        str(inspected.source.model if inspected.temporary is None else inspected.folder),
        device=str(config.device),
        dtype=str(inspected.dtype).removeprefix("torch."),
        device_memory=inspected.plan.budget,
        options={
            **{name: getattr(config, name) for name in (*CACHE_OPTIONS, *OTHER_OPTIONS)},
            "prefill_chunk": args.prefill_chunk,
        },
        routing=args.replay_routing or "",
        threads=args.threads,
    )
    tasks = {OFFMOE: task}
    if args.against == NO_PREFETCH:
        tasks[NO_PREFETCH] = replace(task, options={**task.options, "prefetch": 0})
    elif stock_model is not None:
        scratch = str(stack.enter_context(scratch_folder("offmoe-bench-", scratch_parent)))
        out.note("loading the model with accelerate's offload, which may write a second copy of the experts")
        folder = str(stock_model.source.folder)
        tasks[ACCELERATE] = replace(task, runtime=ACCELERATE, model=folder, options={}, scratch=scratch)
    return [stack.enter_context(rounds.ContenderProcess(name, each, cap)) for name, each in tasks.items()]


def _comparison(records: Sequence[rounds.Record], *, comparable: bool) -> dict[str, Any]:
    """The other contender's figures. comparable: whether both computed with the same weights."""
    if len(records) < 2:
        return dict.fromkeys(("baseline", "ratio", "ttft_ratio", "same"))
    ours, other = records
    return {
        "baseline": other.to_dict(),
        "ratio": rounds.ratio(other, ours),
        "ttft_ratio": rounds.ratio(other, ours, lambda outcome: outcome.ttft_s),
        "same": rounds.same(ours, other) if comparable else None,
    }


def _stock_model(args: argparse.Namespace, inspected: Inspected) -> Inspected | None:
    """The model that accelerate runs; None if accelerate is not asked for."""
    if args.against != ACCELERATE:
        if args.against_model is not None:
            raise ConfigError("--against-model names what accelerate runs; add --against accelerate.")
        return None
    from offmoe.api import fetch
    from offmoe.budget.inspect import inspect

    model = inspected.source.model if args.against_model is None else args.against_model
    if str(model).endswith(".gguf"):
        raise ConfigError(
            f"--against accelerate: stock transformers does not run {model}, a GGUF file with experts; name the "
            "model's safetensors checkpoint with --against-model."
        )
    if not _other_weights(args, inspected):
        return inspected
    other = fetch(inspect(model, OffloadConfig(device=inspected.config.device), dtype=inspected.dtype))
    if (other.shape.experts, other.shape.top_k) != (inspected.shape.experts, inspected.shape.top_k):
        raise ConfigError(f"--against-model {args.against_model}: has other layers or experts than {args.model}.")
    return other


def _other_weights(args: argparse.Namespace, inspected: Inspected) -> bool:
    """Whether offmoe computes with other weights than accelerate."""
    return args.against_model is not None or inspected.temporary is not None


def _scratch_parent(args: argparse.Namespace, stock_model: Inspected) -> str:
    """The folder that accelerate's scratch folder is created in. Raises ConfigError if its disk is too full."""
    folder: str = args.scratch or tempfile.gettempdir()
    if not Path(folder).is_dir():
        raise ConfigError(f"--scratch {folder!r} is no folder; give an existing one.")
    free, needed = shutil.disk_usage(folder).free, stock_model.expert_bytes + SPARE_BYTES
    if free < needed:
        raise ConfigError(
            f"{folder} has {format_size(free)} free; accelerate may write a second copy of all experts there, which "
            f"takes {format_size(needed)}: give --scratch FOLDER on a disk with room."
        )
    return folder


ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "first token, s": ("ttft_s", "{:.3f}".format),
    "ms per token": ("ms_per_token", "{:.2f}".format),
    "tokens/s": ("tokens_per_s", "{:.2f}".format),
    "waiting for experts, ms per token": ("stall_ms_per_token", "{:.2f}".format),
    "experts resident": ("resident_rate", percent),
    "prefetched or read ahead": ("foretold_rate", percent),
    "read when demanded": ("missed_rate", percent),
    "experts from disk per token": ("disk_bytes_per_token", format_size),
    "read from disk per round": ("read_bytes_per_round", format_size),
}


def _table(results: dict[str, Any]) -> Table:
    contenders = [results["ours"], *([results["baseline"]] if results["baseline"] else [])]
    names = ("offmoe", results["against"])[: len(contenders)]
    table = new_table(f"medians of {results['rounds']} rounds", ("",), names)
    for title, (key, form) in ROWS.items():
        table.add_row(title, *(or_dash(contender[key], form) for contender in contenders))
    for place in ("rss", "cgroup", "device"):
        peaks = [contender["peak"][place] for contender in contenders]
        if any(peak is not None for peak in peaks):
            table.add_row(f"peak memory, {place}", *(or_dash(peak, format_size) for peak in peaks))
    return table


def _words(args: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    bound = results["roofline"]
    parts = [f"disk {bound['disk_ms']:.2f} ms at {bound['disk_gb_s']:.2f} GB/s"]
    if bound["link_ms"] is not None:
        parts.append(f"link {bound['link_ms']:.2f} ms at {bound['link_gb_s']:.1f} GB/s")
    if bound["compute_ms"] is not None:
        parts.append(f"computing {bound['compute_ms']:.2f} ms")
    lines = [f"bound per token: {', '.join(parts)}; offmoe reaches {percent(bound['share'])} of it"]
    if results["ratio"] is not None:
        per_token, first, equal = results["ratio"], results["ttft_ratio"], results["same"]
        same = "the weights are not the same, so tokens are not compared"
        if equal is not None:
            tokens, logits = "equal" if equal["tokens"] else "DIFFER", "equal" if equal["logits"] else "differ"
            same = f"tokens {tokens}, logits {logits}"
        lines.append(
            f"{per_token['median']:.2f} times as fast per token as {args.against} ({per_token['least']:.2f} to "
            f"{per_token['most']:.2f}), {first['median']:.2f} times to the first token; {same}"
        )
    if args.replay_routing:
        lines.append(f"The routing is that of {args.replay_routing}, not the model's: the text is meaningless.")
    return lines
