"""`offmoe batch MODEL IN.jsonl -o OUT.jsonl`: answer a file of prompts, many at the same time.

The lines are those of OpenAI's batch format, or {"prompt": ...} and {"messages": ...}. A run that was ended in any way
goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

from offmoe.cli import extras, options
from offmoe.cli.model import open_model
from offmoe.cli.output import Output
from offmoe.cli.state_file import check_state
from offmoe.errors import ConfigError, OffmoeError
from offmoe.text import or_dash

if TYPE_CHECKING:
    from offmoe.batch.run import Batch, Progress
    from offmoe.budget.inspect import Inspected

NEW_TOKENS = 256
DECIDING = (
    "experts",
    "dense",
    "exactness",
    "activations",
    "dtype",
    "prefill_chunk",
    "batch_invariant",
    "max_new_tokens",
)
"""Options that change answers."""


def parser() -> options.Parser:
    parser = options.Parser("batch", "Answer a file of prompts with one model, many at the same time.")
    options.add_loading(parser)
    add = options.add_option
    parser.add_argument("input", metavar="IN.jsonl", help="prompts: lines of OpenAI's batch format, or of prompts")
    group = parser.add_argument_group("batch")
    group.add_argument("-o", "--output", metavar="OUT.jsonl", required=True, help="results; a run goes on from them")
    size = "prompts under way at the same time (default: as many as pay, measured in the first steps)"
    add(group, "--batch-size", "N", size, options.positive)
    tokens = f"tokens of an answer whose request does not say (default: {NEW_TOKENS})"
    add(group, "--max-new-tokens", "N", tokens, options.positive, NEW_TOKENS)
    group.add_argument(
        "--batch-invariant",
        action=argparse.BooleanOptionalAction,
        help="let no answer depend on the others of its batch (default: with exactness bitwise)",
    )
    add(group, "--served-model-name", "NAME[,NAME...]", "names that requests may call the model by (default: MODEL)")
    options.add_cache(parser)
    options.add_state(parser)
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    extras.require("serve", "offmoe batch", "openai", "starlette", python=" on Python 3.11 or later")
    check_state(args)
    if os.path.realpath(args.input) == os.path.realpath(args.output):
        raise ConfigError("IN and -o are the same file; give the results one of their own.")
    from offmoe.batch.lines import read_lines
    from offmoe.batch.results import Results
    from offmoe.batch.run import Batch
    from offmoe.cli import prompts

    lines = read_lines(args.input)
    with open_model(args, out) as opened:
        tokenizer = prompts.tokenizer_of(opened.inspected)
        inspected = opened.fetch()
        fingerprint = _fingerprint(args, inspected)
        results = Results(args.output, lines, fingerprint)
        todo = sum(not results.is_done(line) for line in lines)
        if todo < len(lines):
            out.note(f"{len(lines) - todo} of {len(lines)} lines are in {args.output} already")
        model, _ = opened.load(warm=True)
        names = [name.strip() for name in (args.served_model_name or str(args.model)).split(",")]
        batch = Batch(
            model,
            tokenizer,
            names,
            fingerprint,
            int(os.stat(args.input).st_mtime),
            args.max_new_tokens,
            args.batch_size,
            args.batch_invariant,
        )
        began, tokens = time.monotonic(), 0
        with results, out.progress("answering", todo, "lines") as advance:
            told = 0

            def tell(progress: Progress) -> None:
                nonlocal told, tokens
                advance(progress.lines - told)
                told, tokens = progress.lines, progress.tokens

            batch.run(lines, results, tell)
            results.finish()
        _report(args, out, batch, todo, tokens, time.monotonic() - began)
    if results.num_failed:
        raise OffmoeError(f"{results.num_failed} of {len(lines)} lines have an error in {args.output}.")


def _report(args: argparse.Namespace, out: Output, batch: Batch, todo: int, tokens: int, seconds: float) -> None:
    rate = tokens / seconds if tokens else None
    out.result(f"{todo} lines, {tokens} new tokens, {or_dash(rate, '{:.1f} tokens/s'.format)} in {seconds:.1f} s")
    curve = {} if batch.session is None else batch.session.curve
    for rows, measured in sorted(curve.items()):
        out.details(
            f"{rows} at the same time: {measured.tokens_per_s:.1f} tokens/s, "
            f"{measured.experts_per_token:.1f} experts demanded per token"
        )
    values: dict[str, Any] = {"lines": todo, "new_tokens": tokens, "seconds": seconds, "tokens_per_s": rate}
    out.json({**values, "widths": {rows: measured._asdict() for rows, measured in sorted(curve.items())}})


def _fingerprint(args: argparse.Namespace, inspected: Inspected) -> str:
    """What answers depend on besides their requests."""
    from offmoe.storage.fingerprint import fingerprint

    config = inspected.config
    values = {name: getattr(args, name) for name in DECIDING}
    values["exactness"] = "numeric" if config.is_numeric else "bitwise"
    checkpoint = fingerprint(inspected.checkpoint, inspected.checkpoint.tensors)
    return "offmoe-" + hashlib.sha256(json.dumps([checkpoint, values]).encode()).hexdigest()[:16]
