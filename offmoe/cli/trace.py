"""`offmoe trace MODEL --prompts FILE -o TRACE`: run prompts and record which experts every token uses.

The file is written when all prompts have run; after an error it holds what had run until then. A prompt that does not
fit the context is refused, never shortened. `--merge` joins recordings instead and loads no model.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from offmoe.cli import options, prompts
from offmoe.cli.decoding import Decoding
from offmoe.cli.model import open_model
from offmoe.cli.output import Output
from offmoe.errors import ConfigError, OffmoeError, TraceError
from offmoe.files import check_folder
from offmoe.text import percent

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offmoe.budget.inspect import Inspected
    from offmoe.trace.trace import Parameters


def parser() -> options.Parser:
    parser = options.Parser(
        "trace",
        "Continue every prompt of a file and record the routing, for 'simulate', 'tune' and 'report'. "
        "With --merge, join recordings of one model instead.",
    )
    options.add_loading(parser, required=False)
    group = parser.add_argument_group("recording")
    form = 'one prompt per line; in .jsonl {"prompt": ...} or {"messages": [...]} per line; \'-\' reads stdin'
    options.add_option(group, "--prompts", "FILE", form)
    group.add_argument("--paragraphs", action="store_true", help="prompts are separated by blank lines")
    group.add_argument("-o", "--output", metavar="TRACE", help="the .npz file to write")
    group.add_argument("--merge", metavar="TRACE", nargs="+", help="write these recordings as one")
    prompts.add_generating(parser)
    options.add_cache(parser)
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    if args.output is None:
        raise ConfigError("-o TRACE is missing: name the .npz file to write.")
    if args.merge is not None:
        _merge(args, out)
    else:
        _record(args, out)


def _merge(args: argparse.Namespace, out: Output) -> None:
    if args.model is not None or args.prompts is not None:
        raise ConfigError("--merge joins recordings and runs no model; leave MODEL and --prompts out.")
    from offmoe.trace.merge import merge_traces
    from offmoe.trace.trace import read_trace, write_trace

    parts = [read_trace(path) for path in args.merge]
    try:
        whole = merge_traces(parts)
    except TraceError as error:
        raise TraceError(f"--merge {' '.join(args.merge)}: {error}") from None
    check_folder(args.output, f"-o {args.output}")
    write_trace(Path(args.output), whole)
    lost = [name for name in ("token", "probs", "options", "fills") if getattr(whole, name) is None]
    for name in lost:
        if any(getattr(part, name) is not None for part in parts):
            out.note(f"left out, because the recordings do not agree on it: {name}")
    out.note(f"{len(parts)} recordings, {whole.requests} requests, {whole.tokens} tokens written to {args.output}")
    out.json({"tokens": whole.tokens, "requests": whole.requests, "stats": None, "merged": len(parts)})


def _record(args: argparse.Namespace, out: Output) -> None:
    if args.model is None:
        raise ConfigError("MODEL is missing; give a folder, a Hub id, or 'demo'.")
    if args.prompts is None:
        raise ConfigError("--prompts FILE is missing; it holds one prompt per line.")
    prompts.sampling(args)
    texts = prompts.read_prompts(args.prompts, args.paragraphs)
    with open_model(args, out, trace=args.output) as opened:
        tokenizer = prompts.tokenizer_of(opened.inspected)
        decoding = Decoding.of(args, opened.inspected, tokenizer, out)
        runs = _encode(args, texts, tokenizer, decoding, opened.inspected, out)
        model, offload = opened.load(args.output)
        trace = offload.trace
        assert trace is not None
        trace.parameters = _parameters(opened.inspected)
        for ids, _ in runs:
            prompts.check_vocabulary(model, ids)
        prompts.seed(args.seed)
        began = time.perf_counter()
        try:
            new_tokens = _run(model, runs, decoding, out)
        finally:
            trace.pieces.update(prompts.pieces(tokenizer, trace.tokens_seen()))
        seconds = time.perf_counter() - began
        stats, tokens = offload.stats(), trace.tokens
    out.note(
        f"{len(runs)} requests, {tokens} tokens recorded ({new_tokens} generated) in {seconds:.1f} s, hit rate "
        f"{percent(stats.hit_rate)}"
    )
    out.note(f"next: offmoe report {args.output}, offmoe tune {args.output}")
    out.json(
        {
            "tokens": tokens,
            "requests": len(runs),
            "stats": stats.to_dict(),
            "new_tokens": new_tokens,
            "seconds": seconds,
        }
    )


def _encode(
    args: argparse.Namespace,
    texts: list[prompts.Prompt],
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    inspected: Inspected,
    out: Output,
) -> list[tuple[Tensor, int]]:
    """(ids [1, n], new tokens) of every prompt; an error names the line of the prompt that does not fit."""
    runs = []
    for prompt in texts:
        try:
            ids = prompts.encode(tokenizer, prompt.content, args.chat_template)
            runs.append((ids, decoding.new_tokens(args.max_new_tokens, ids, inspected, out)))
        except OffmoeError as error:
            raise type(error)(f"{prompt.where}: {error}") from error
    return runs


def _run(model: PreTrainedModel, runs: list[tuple[Tensor, int]], decoding: Decoding, out: Output) -> int:
    """Continue every prompt -> how many tokens were generated."""
    new_tokens = 0
    with out.progress("recording", sum(limit for _, limit in runs), "tokens") as advance:
        for ids, limit in runs:
            counter = _Counter(advance)
            decoding.generate(model, ids, limit, counter)
            advance(limit - counter.tokens)
            new_tokens += counter.tokens
    return new_tokens


class _Counter(prompts.NewTokens):
    """Streamer for `generate` that only counts."""

    def __init__(self, advance: Callable[[int], None]):
        self._advance = advance
        self.tokens = 0

    def add(self, tokens: Tensor) -> None:
        self.tokens += tokens.numel()
        self._advance(tokens.numel())


def _parameters(inspected: Inspected) -> Parameters:
    """Counts for the trace's header, of the model as it is published: loaded ones may be words, or in tiles."""
    from offmoe.hf.adapters.find import find_experts, require_adapter
    from offmoe.trace.trace import Parameters

    experts, dense = find_experts(inspected.meta), inspected.needs.parameters.dense
    modules = [experts[layer.name] for layer in inspected.catalog.layers]
    shapes = [require_adapter(module).shapes(module) for module in modules]
    looked_up, output = inspected.meta.get_input_embeddings(), inspected.meta.get_output_embeddings()
    if output is not None and looked_up.weight is not output.weight:
        dense -= looked_up.get_parameter("weight").numel()
    return Parameters(dense, tuple(sum(map(math.prod, layer.values())) for layer in shapes))
