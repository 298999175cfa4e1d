"""`offmoe bench MODEL`: time per token against what the hardware would allow, and against others on the same work.

What moves: what the contenders move, each in a process of its own, and the probe of the disk between rounds. Bound:
rounds x tokens x the slower contender. Experts stay cached from round to round, as they do in use; every round has
another prompt, so that no round profits from having been there before.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offmoe.bench.scratch import ended_by_sigterm, scratch_folder
from offmoe.cli import options, prompts
from offmoe.cli.output import Output
from offmoe.config import OffloadConfig
from offmoe.errors import ConfigError
from offmoe.profile import CACHE_OPTIONS
from offmoe.text import format_size, parse_size, percent

if TYPE_CHECKING:
    from rich.table import Table

    from offmoe.bench.task import Pass
    from offmoe.budget.inspect import Inspected

ACCELERATE, NO_PREFETCH = "accelerate", "no-prefetch"
AGAINST = (ACCELERATE, NO_PREFETCH)
OTHER_OPTIONS = ("max_context", "experts", "exactness", "activations")
DEFAULT_ROUNDS, DEFAULT_TOKENS, RANDOM_PROMPT_TOKENS = 5, 32, 16
PROBE_SECONDS = 0.5
LIBRARIES_BYTES = 460 << 20
"""Of Python, torch and transformers: what a memory cap must hold beside the model. 440 MiB seen with
tools/bench/tiers.py.
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
    group.add_argument("--against", metavar="RUNTIME", help="run the same work with it too: accelerate, or no-prefetch")
    group.add_argument(
        "--against-model",
        metavar="MODEL",
        help="what accelerate runs, if not the same: the checkpoint that a packed one was made of",
    )
    group.add_argument(
        "--replay-routing",
        metavar="TRACE",
        help="let this recording say which experts are asked, for weights that are random; results are no model's then",
    )
    group.add_argument("--prompt", metavar="TEXT", help="continue this in every round (default: another text each)")
    group.add_argument("--prompt-tokens", type=options.positive, metavar="N", help="continue N random tokens instead")
    group.add_argument(
        "--random-tokens", action="store_true", help="continue with random tokens instead of the model's"
    )
    group.add_argument(
        "--new-tokens",
        type=options.positive,
        default=DEFAULT_TOKENS,
        metavar="N",
        help=f"per round (default: {DEFAULT_TOKENS})",
    )
    group.add_argument(
        "--rounds", type=options.positive, default=DEFAULT_ROUNDS, metavar="N", help=f"default: {DEFAULT_ROUNDS}"
    )
    group.add_argument(
        "--memory-cap", metavar="SIZE", help="run each contender in a memory cgroup of this size (Linux)"
    )
    group.add_argument("--threads", type=options.positive, default=0, metavar="N", help="of computing on the CPU")
    group.add_argument("--scratch", metavar="FOLDER", help="where accelerate may write the experts once more")
    options.add_cache(parser)
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    if args.against is not None and args.against not in AGAINST:
        raise ConfigError(f"--against {args.against!r} is unknown. Use: {', '.join(AGAINST)}.")
    if args.prompt is not None and args.prompt_tokens is not None:
        raise ConfigError("--prompt and --prompt-tokens are both given; use one of them.")
    if args.new_tokens < 2:
        raise ConfigError("--new-tokens 1: the time per token needs a second one; use 2 or more.")
    cap = None if args.memory_cap is None else parse_size(args.memory_cap, "memory_cap")
    config, hub = options.offload_config(args), options.hub_options(args)
    from offmoe.hf.quiet import hide_bars, quiet

    quiet(args.verbose, args.json)
    found = _inspect(args, config, cap, hub)
    passes = _passes(args, found, out)
    hide_bars()
    with ended_by_sigterm(), ExitStack() as stack:
        stack.callback(found.release)
        results = _measure(args, found, cap, passes, out, stack)
    out.result(_table(results), *_words(args, results))
    out.json(results)


def _inspect(args: argparse.Namespace, config: OffloadConfig, cap: int | None, hub: dict[str, Any]) -> Inspected:
    """With "auto" memory made to fit the cap, or two contenders at once."""
    from offmoe.api import fetch
    from offmoe.budget.inspect import inspect

    if config.device_memory == "auto" and cap is not None:
        config = replace(config, device_memory=max(1, cap - LIBRARIES_BYTES))
    found = inspect(args.model, config, dtype=args.dtype, **hub)
    if config.device_memory == "auto" and args.against is not None:
        found = inspect(args.model, replace(config, device_memory=found.plan.budget // 2), dtype=args.dtype, **hub)
    return fetch(found)


def _passes(args: argparse.Namespace, found: Inspected, out: Output) -> list[Pass]:
    """One to warm up, and one per round."""
    from offmoe.bench.task import Pass

    vocabulary = int(found.hf_config.get_text_config().vocab_size)
    chance = random.Random(0)
    encoded: list[tuple[int, ...]]
    has_text = args.prompt is not None or (found.folder / "tokenizer.json").is_file()
    if args.prompt_tokens is None and has_text:
        tokenizer = prompts.load_tokenizer(found.folder)
        texts = TEXTS if args.prompt is None else (args.prompt,)
        encoded = [tuple(prompts.encode(tokenizer, text, None)[0].tolist()) for text in texts]
    else:
        length = args.prompt_tokens or RANDOM_PROMPT_TOKENS
        out.note(f"prompts are {length} random tokens")
        encoded = [tuple(chance.choices(range(vocabulary), k=length)) for _ in TEXTS]
    passes = []
    row = 0
    for i in range(args.rounds + 1):
        prompt = encoded[i % len(encoded)]
        prompts.room(args.new_tokens, len(prompt), found.plan.max_context, out)
        forced = tuple(chance.choices(range(vocabulary), k=args.new_tokens)) if args.random_tokens else ()
        passes.append(Pass(prompt, args.new_tokens, forced, row))
        row += len(prompt) + args.new_tokens - 1
    return passes


def _measure(
    args: argparse.Namespace, found: Inspected, cap: int | None, passes: list[Pass], out: Output, stack: ExitStack
) -> dict[str, Any]:
    from offmoe.bench import duel
    from offmoe.bench import task as tasks
    from offmoe.measure.probes import DiskProbe, drop_page_cache
    from offmoe.storage.store import ExpertStore

    stock_of = _stock(args, found)
    scratch_in = None if stock_of is None else _scratch(args, stock_of)
    shards = found.checkpoint.shards
    drop_page_cache(shards)  # or a contender would read what another process's cgroup pays for
    config = found.config
    task = tasks.Task(
        tasks.OFFMOE,
        str(found.folder),
        device=str(config.device),
        dtype=str(found.dtype).removeprefix("torch."),
        device_memory=found.plan.budget,
        options={name: getattr(config, name) for name in (*CACHE_OPTIONS, *OTHER_OPTIONS)},
        routing=args.replay_routing or "",
        threads=args.threads,
    )
    out.note(f"memory on {config.device}: {found.plan.describe()}")
    opponents = [stack.enter_context(duel.Opponent(tasks.OFFMOE, task, cap))]
    if args.against == NO_PREFETCH:
        other = replace(task, options={**task.options, "prefetch": 0})
        opponents.append(stack.enter_context(duel.Opponent(NO_PREFETCH, other, cap)))
    elif stock_of is not None:
        scratch = str(stack.enter_context(scratch_folder("offmoe-bench-", scratch_in)))
        out.note("loading the model with accelerate's offload, which may write the experts once more")
        stock = replace(task, runtime=tasks.ACCELERATE, model=str(stock_of.source.folder), options={}, scratch=scratch)
        opponents.append(stack.enter_context(duel.Opponent(ACCELERATE, stock, cap)))
    store = ExpertStore(shards, found.catalog.records)
    stack.callback(store.close)
    disk = stack.enter_context(DiskProbe(store, found.catalog.records, shards))
    rates: list[float] = []

    def probe() -> None:
        rates.append(disk.gb_s(PROBE_SECONDS))
        drop_page_cache(shards)

    with out.progress("rounds", len(passes), "rounds") as advance:
        records = duel.paired(opponents, passes, probe, advance)
    # Not before: computing is measured with a routing that is fixed, and what predicts experts is found by watching the
    # first pass.
    costs = opponents[0].costs()
    ours = records[0]
    results: dict[str, Any] = {
        "ours": ours.to_dict(),
        "baseline": None,
        "ratio": None,
        "ttft_ratio": None,
        "same": None,
    }
    if args.against is not None:
        results |= {
            "baseline": records[1].to_dict(),
            "ratio": duel.ratio(records[1], ours),
            "ttft_ratio": duel.ratio(records[1], ours, lambda outcome: outcome.ttft_s),
            "same": None if stock_of is not None and _reweighted(args, found) else duel.same(ours, records[1]),
        }
    return results | {
        "roofline": duel.roofline(ours, costs, statistics.median(rates)),
        "against": args.against,
        "rounds": len(ours.outcomes),
        "new_tokens": args.new_tokens,
        "memory": found.plan.to_dict(),
        "memory_cap": cap,
        "routing": "replayed" if args.replay_routing else "the model's own",
        "tokens": "random" if args.random_tokens else "greedy",
        "device": str(config.device),
    }


def _stock(args: argparse.Namespace, found: Inspected) -> Inspected | None:
    """What accelerate runs, if it does."""
    if args.against != ACCELERATE:
        if args.against_model is not None:
            raise ConfigError("--against-model says what accelerate runs; give --against accelerate too.")
        return None
    from offmoe.api import fetch
    from offmoe.budget.inspect import inspect

    model = found.source.folder if args.against_model is None else args.against_model
    if not _reweighted(args, found):
        return found
    other = fetch(inspect(model, OffloadConfig(device=found.config.device), dtype=found.dtype))
    if (other.shape.experts, other.shape.top_k) != (found.shape.experts, found.shape.top_k):
        raise ConfigError(f"--against-model {args.against_model}: has other layers or experts than {args.model}.")
    return other


def _reweighted(args: argparse.Namespace, found: Inspected) -> bool:
    """Whether offmoe computes with other weights than accelerate does."""
    return args.against_model is not None or found.temporary is not None


def _scratch(args: argparse.Namespace, found: Inspected) -> str:
    folder: str = args.scratch or tempfile.gettempdir()
    if not Path(folder).is_dir():
        raise ConfigError(f"--scratch {folder!r} is no folder; give an existing one.")
    free, needed = shutil.disk_usage(folder).free, found.expert_bytes + SPARE_BYTES
    if free < needed:
        raise ConfigError(
            f"{folder} has {format_size(free)} free; accelerate may write all experts there once more, which takes "
            f"{format_size(needed)}: give --scratch FOLDER on a disk with room."
        )
    return folder


ROWS = {
    "first token, s": ("ttft_s", "{:.3f}"),
    "ms per token": ("ms_per_token", "{:.2f}"),
    "tokens/s": ("tokens_per_s", "{:.2f}"),
    "waiting for experts, ms per token": ("stall_ms_per_token", "{:.2f}"),
}
SIZES = {"experts from disk per token": "disk_bytes_per_token", "read from disk per round": "read_bytes_per_round"}


def _table(results: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"medians of {results['rounds']} rounds", title_justify="left")
    contenders = [results["ours"], *([results["baseline"]] if results["baseline"] else [])]
    table.add_column("")
    for name in ("offmoe", results["against"])[: len(contenders)]:
        table.add_column(name, justify="right")
    for title, (key, form) in ROWS.items():
        table.add_row(title, *("-" if c[key] is None else form.format(c[key]) for c in contenders))
    table.add_row("hit rate", *("-" if c["hit_rate"] is None else percent(c["hit_rate"]) for c in contenders))
    table.add_row(
        "of it foretold", *("-" if c["hit_rate"] is None else percent(c["foretold_rate"]) for c in contenders)
    )
    for title, key in SIZES.items():
        table.add_row(title, *("-" if c[key] is None else format_size(c[key]) for c in contenders))
    for place in ("rss", "cgroup", "device"):
        if any(c["peak"][place] is not None for c in contenders):
            values = (c["peak"][place] for c in contenders)
            table.add_row(f"peak memory, {place}", *("-" if v is None else format_size(v) for v in values))
    return table


def _words(args: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    bound = results["roofline"]
    parts = [f"disk {bound['disk_ms']:.2f} ms at {bound['disk_gb_s']:.2f} GB/s"]
    if bound["link_ms"] is not None:
        parts.append(f"link {bound['link_ms']:.2f} ms at {bound['link_gb_s']:.1f} GB/s")
    if bound["compute_ms"] is not None:
        parts.append(f"computing {bound['compute_ms']:.2f} ms")
    lines = [f"bound per token: {', '.join(parts)}; {percent(bound['share'])} of it is reached"]
    if results["ratio"] is not None:
        found, first, equal = results["ratio"], results["ttft_ratio"], results["same"]
        same = "weights are not the same, so tokens are not compared"
        if equal is not None:
            tokens, logits = "equal" if equal["tokens"] else "DIFFER", "equal" if equal["logits"] else "differ"
            same = f"tokens {tokens}, logits {logits}"
        lines.append(
            f"{found['median']:.2f} times as fast per token as {args.against} ({found['least']:.2f} to "
            f"{found['most']:.2f}), {first['median']:.2f} times to the first token; {same}"
        )
    if args.replay_routing:
        lines.append(f"The routing is that of {args.replay_routing}, not the model's: the text means nothing.")
    return lines
