"""`offmoe verify MODEL`: prove on this machine that tokens and logits are the same wherever experts are.

The model runs once per set-up. It takes as many loads, and reads experts from the disk where they have no slot. No
state of an earlier run is used. Exit status 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from offmoe.cli import options, prompts
from offmoe.cli.model import open_model
from offmoe.cli.output import Output, new_table
from offmoe.errors import ConfigError, OffmoeError
from offmoe.measure.set_ups import NAMES

if TYPE_CHECKING:
    from torch import Tensor

    from offmoe.cli.model import OpenModel
    from offmoe.measure.verify import Outcome

DEFAULT_TOKENS = 16
COLORS = {"reference": "bold", "same": "green", "close": "green", "differs": "red", "not used": "yellow"}
MOST_TOKENS = 512
"""The logits of so many tokens take 0.8 GB of RAM at a vocabulary of 150,000."""


def parser() -> options.Parser:
    parser = options.Parser(
        "verify",
        "Run the model in several set-ups, with experts in other places and moved in other ways, and compare tokens "
        "and logits: with each other, and with stock transformers where that fits. Exit status 1 if a promise is "
        "broken.",
    )
    options.add_loading(parser)
    group = parser.add_argument_group("verifying")
    new = f"tokens to decode after each prompt (default: {DEFAULT_TOKENS})"
    options.add_option(group, "--new-tokens", "N", new, options.positive, DEFAULT_TOKENS)
    options.add_option(group, "--prompt", "TEXT", "begin with TEXT in place of random tokens")
    names = f"run these set-ups alone: {', '.join(NAMES)}"
    options.add_list(group, "--only", "NAME[,NAME...]", names, str)
    parser.set_defaults(no_generation_config=True)
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    unknown = [name for name in args.only or () if name not in NAMES]
    if unknown:
        raise ConfigError(f"--only {unknown[0]!r} is no set-up; use some of: {', '.join(NAMES)}.")
    if args.new_tokens > MOST_TOKENS:
        raise ConfigError(f"--new-tokens {args.new_tokens} is more than {MOST_TOKENS}.")
    config = options.offload_config(args)
    # "auto" is bitwise where it can be, so that both kinds of sums are compared.
    chosen = {} if config.exactness != "auto" or config.experts != "native" else {"exactness": "bitwise"}
    with open_model(args, out, **chosen) as opened:
        prompt = _prompt(args, opened)
        fetched = opened.fetch()
        from offmoe.measure.verify import broken, verify

        outcomes: list[Outcome] = []
        for outcome in verify(
            fetched,
            tokens=args.new_tokens,
            prompt=prompt,
            only=args.only or NAMES,
            numeric=config.exactness != "bitwise",
            begins=lambda name: out.note(f"running: {name}"),
        ):
            outcomes.append(outcome)
        device = str(fetched.config.device)
    problems = broken(outcomes)
    compared = sum(outcome.status in ("same", "close", "differs", "not used") for outcome in outcomes)
    kept = bool(compared) and not problems
    verdict = [f"Every promise is kept; set-ups compared: {compared}."] if kept else problems
    out.result(_table(args.model, device, outcomes), *_reasons(outcomes), *verdict)
    out.json(
        {
            "kept": kept,
            "model": args.model,
            "device": device,
            "compared": compared,
            "problems": problems,
            "set_ups": [outcome.to_dict() for outcome in outcomes],
        }
    )
    if not compared:
        raise OffmoeError("nothing could be compared: fewer than two set-ups ran; see why in the table.")
    if problems:
        raise OffmoeError(f"a promise is broken: {'; '.join(problems)}.")


def _prompt(args: argparse.Namespace, opened: OpenModel) -> Tensor | None:
    if args.prompt is None:
        return None
    return prompts.encode(prompts.tokenizer_of(opened.inspected), args.prompt, chat=False)


def _table(model: str, device: str, outcomes: list[Outcome]) -> Table:
    """A row per set-up: misses that were fetched and left without a slot, and how far it is from the reference."""
    right = ("misses", "no slot", "prefetch", "tokens", "logits", "KL", "s")
    title = f"{model} on {device}: differences from the reference"
    narrow: dict[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False, "padding": 0}  # 80 columns in a pipe
    table = new_table(title, ("set-up", "result"), right, no_wrap=True, **narrow)
    for outcome in outcomes:
        stats, apart = outcome.stats or {}, outcome.difference
        counts = [str(stats[name]) if stats else "" for name in ("misses", "host_computed", "prefetched_used")]
        figures = ["", "", ""]
        if outcome.status in ("same", "not used") and apart is None:
            figures = ["0", "0", "0"]
        elif apart is not None and apart.tokens is not None:
            figures = [f"{apart.tokens}/{apart.steps}", f"{apart.largest:.2g}", f"{apart.divergence:.2g}"]
        status = f"[{COLORS.get(outcome.status, 'dim')}]{outcome.status}[/]"
        seconds = "" if outcome.status == "left out" else f"{outcome.seconds:.1f}"
        table.add_row(outcome.name, status, *counts, *figures, seconds)
    return table


def _reasons(outcomes: list[Outcome]) -> list[str]:
    """A line per set-up that proves nothing here."""
    return [
        f"{outcome.name} ({outcome.what}) {outcome.status}: {outcome.reason}" for outcome in outcomes if outcome.reason
    ]
