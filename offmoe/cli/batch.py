"""`offmoe batch MODEL IN.jsonl -o OUT.jsonl`: answer a file of prompts, many at the same time.

The lines are those of OpenAI's batch format, or {"prompt": ...} and {"messages": ...}. A run that was ended in any way
goes on where it was when the same command is given again. With --ray the workers of a cluster load the model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from offmoe.batch.lines import NEW_TOKENS, Line, read_lines
from offmoe.cli import options
from offmoe.cli.model import open_model
from offmoe.cli.output import Output
from offmoe.cli.state_file import check_state
from offmoe.errors import ConfigError, OffmoeError
from offmoe.extras import require
from offmoe.text import or_dash

if TYPE_CHECKING:
    from offmoe.batch.results import Results
    from offmoe.batch.run import Progress
    from offmoe.hf.hub.locate import Source
    from offmoe.rows.width import WidthRate
    from offmoe.storage.checkpoint import Checkpoint

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


class _Ended(NamedTuple):
    """What a run did."""

    lines: int
    tokens: int
    seconds: float
    failed: int


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
    group = parser.add_argument_group("several machines")
    address = "compute on a Ray cluster: HOST:PORT, auto (the one of this machine), or local (a new one of it alone)"
    add(group, "--ray", "ADDRESS", address)
    count = "with --ray: workers, each with the model (default: one per GPU, or per machine without GPUs)"
    add(group, "--ray-workers", "N", count, options.positive)
    options.add_cache(parser)
    options.add_state(parser)
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    require("serve", "offmoe batch", "openai", "starlette", python=" on Python 3.11 or later")
    _check(args)
    lines = read_lines(args.input)
    ended = _run_here(args, out, lines) if args.ray is None else _run_on_cluster(args, out, lines)
    if ended.failed:
        raise OffmoeError(f"{ended.failed} of {len(lines)} lines have an error in {args.output}.")


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is read."""
    check_state(args)
    both = args.input, args.output
    if os.path.realpath(args.input) == os.path.realpath(args.output) or (
        all(map(os.path.exists, both)) and os.path.samefile(*both)
    ):
        raise ConfigError("IN and -o are the same file; give the results one of their own.")
    if args.ray is None and args.ray_workers is not None:
        raise ConfigError("--ray-workers works with --ray ADDRESS only; give that as well, or leave it out.")
    if args.ray is not None:
        require("ray", "--ray", "ray", "pyarrow", "pandas", python=" on Python 3.11 or later")
        if args.state is not None:
            raise ConfigError("--state belongs to one process; leave it out with --ray.")


def _run_here(args: argparse.Namespace, out: Output, lines: Sequence[Line]) -> _Ended:
    """Answer the lines in this process."""
    from offmoe.batch.run import Batch
    from offmoe.cli import prompts

    with open_model(args, out) as opened:
        inspected = opened.inspected
        tokenizer = prompts.tokenizer_of(inspected)
        checkpoint = inspected.source.fetch(inspected.checkpoint)
        fingerprint = _fingerprint(
            args, inspected.source, checkpoint, "numeric" if inspected.config.is_numeric else "bitwise"
        )
        results = _results(args, out, lines, fingerprint)
        model, _ = opened.load(warm=True)
        batch = Batch(
            model,
            tokenizer,
            _names(args),
            fingerprint,
            _created(args),
            args.max_new_tokens,
            args.batch_size,
            args.batch_invariant,
        )
        ended = _answer(out, lines, results, lambda tell: batch.run(lines, results, tell))
        _report(out, ended, {} if batch.session is None else batch.session.curve)
    return ended


def _run_on_cluster(args: argparse.Namespace, out: Output, lines: Sequence[Line]) -> _Ended:
    """Answer the lines on the workers of a cluster. Nothing is loaded in this process."""
    config = options.offload_config(args)
    from offmoe.hf.hub.locate import locate
    from offmoe.hf.quiet import quiet
    from offmoe.ray import cluster

    quiet(args.verbose, args.json)
    source = locate(args.model, **options.hub_options(args))
    fingerprint = _fingerprint(args, source, source.checkpoint(), config.exactness)
    results = _results(args, out, lines, fingerprint)
    generator = {
        "model": os.path.abspath(args.model) if os.path.exists(args.model) else args.model,
        "offload_config": config,
        "dtype": args.dtype,
        "names": _names(args),
        "fingerprint": fingerprint,
        "created": _created(args),
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "batch_invariant": args.batch_invariant,
        **options.hub_options(args),
    }
    with cluster.connected(args.ray):
        used = cluster.workers(args.ray_workers, config.device)
        out.note(f"{used.actors} workers with {used.cpus} processors and {used.gpus} GPUs each")
        ended = _answer(out, lines, results, lambda tell: cluster.answer(lines, results, tell, used, generator))
    _report(out, ended, {})
    return ended


def _results(args: argparse.Namespace, out: Output, lines: Sequence[Line], fingerprint: str) -> Results:
    """The file of results, which may have some of an earlier run."""
    from offmoe.batch.results import Results

    results = Results(args.output, lines, fingerprint)
    done = sum(results.is_done(line) for line in lines)
    if done:
        out.note(f"{done} of {len(lines)} lines are in {args.output} already")
    return results


def _answer(
    out: Output, lines: Sequence[Line], results: Results, compute: Callable[[Callable[[Progress], None]], None]
) -> _Ended:
    """Compute what has no result yet, with a bar. compute: does it, and tells how far it is."""
    todo = sum(not results.is_done(line) for line in lines)
    began, tokens, told = time.monotonic(), 0, 0
    with results, out.progress("answering", todo, "lines") as advance:

        def tell(progress: Progress) -> None:
            nonlocal told, tokens
            advance(progress.lines - told)
            told, tokens = progress.lines, progress.tokens

        compute(tell)
        results.finish()
    return _Ended(todo, tokens, time.monotonic() - began, results.num_failed)


def _report(out: Output, ended: _Ended, curve: Mapping[int, WidthRate]) -> None:
    rate = ended.tokens / ended.seconds if ended.tokens else None
    each = or_dash(rate, "{:.1f} tokens/s".format)
    out.result(f"{ended.lines} lines, {ended.tokens} new tokens, {each} in {ended.seconds:.1f} s")
    for rows, measured in sorted(curve.items()):
        out.details(
            f"{rows} at the same time: {measured.tokens_per_s:.1f} tokens/s, "
            f"{measured.experts_per_token:.1f} experts demanded per token"
        )
    values: dict[str, Any] = {"lines": ended.lines, "new_tokens": ended.tokens, "seconds": ended.seconds}
    widths = {rows: measured._asdict() for rows, measured in sorted(curve.items())}
    out.json({**values, "tokens_per_s": rate, "widths": widths})


def _names(args: argparse.Namespace) -> list[str]:
    """Names that requests may call the model by."""
    return [name.strip() for name in (args.served_model_name or str(args.model)).split(",")]


def _created(args: argparse.Namespace) -> int:
    """The time of the prompts, in seconds since 1970."""
    return int(os.stat(args.input).st_mtime)


def _fingerprint(args: argparse.Namespace, source: Source, checkpoint: Checkpoint, exactness: str) -> str:
    """What answers depend on besides their requests.

    Args:
        args: The options.
        source: Where the model is.
        checkpoint: Its headers. Shards that are absent are not downloaded: the commit stands for them.
        exactness: As it was asked for or resolved.
    """
    from offmoe.storage.fingerprint import fingerprint

    is_absent = not all(path.exists() for path in checkpoint.shards)
    if source.repository is not None and is_absent:
        identity = f"{source.repository.name}@{source.repository.commit}"
    else:
        identity = fingerprint(checkpoint, checkpoint.tensors)
    values = {name: getattr(args, name) for name in DECIDING}
    values["exactness"] = exactness
    return "offmoe-" + hashlib.sha256(json.dumps([identity, values]).encode()).hexdigest()[:16]
