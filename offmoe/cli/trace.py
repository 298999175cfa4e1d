"""`offmoe trace MODEL --prompts FILE -o TRACE`: run prompts, record which experts every token asks for.

What moves: as in `generate`; recording adds a copy of a few small arrays per layer and step. The file appears when
all prompts have run, or holds what had run when something went wrong. `--merge` joins recordings instead and loads no
model. Must never record a prompt that was cut to fit.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from offmoe.cli import options, prompts
from offmoe.cli.output import Output
from offmoe.errors import ConfigError, OffmoeError, TraceError
from offmoe.text import percent

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from offmoe.budget.inspect import Inspected
    from offmoe.handle import Offload
    from offmoe.trace.trace import Parameters


def parser() -> options.Parser:
    parser = options.Parser(
        "trace",
        "Continue every prompt of a file and record the routing, for 'simulate', 'tune' and 'report'. "
        "With --merge, join recordings of one model instead.",
    )
    options.add_loading(parser, always=False)
    group = parser.add_argument_group("recording")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help='one prompt per line; in .jsonl {"prompt": ...} or {"messages": [...]} per line; \'-\' reads stdin',
    )
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
    if not Path(args.output).parent.is_dir():
        raise ConfigError(f"-o {args.output}: the folder does not exist; create it first.")
    write_trace(Path(args.output), whole)
    lost = [name for name in ("token", "probs", "options") if getattr(whole, name) is None]
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
    config, hub = options.offload_config(args), options.hub_options(args)
    sampling = prompts.sampling(args)
    asked = prompts.read_prompts(args.prompts, args.paragraphs)
    import torch

    from offmoe.api import fetch, load
    from offmoe.budget.inspect import inspect
    from offmoe.hf.quiet import hide_bars, quiet

    quiet(args.verbose, args.json)
    inspected = inspect(args.model, config, dtype=args.dtype, **hub)
    tokenizer = prompts.load_tokenizer(inspected.folder)
    runs: list[tuple[Tensor, int]] = []
    for prompt in asked:
        try:
            ids = prompts.encode(tokenizer, prompt.content, args.chat_template)
            taken = prompts.context_taken(inspected.hf_config, ids)
            runs.append((ids, prompts.room(args.max_new_tokens, taken, inspected.plan.max_context, out)))
        except OffmoeError as error:
            raise type(error)(f"{prompt.where}: {error}") from error
    out.note(f"memory on {inspected.config.device}: {inspected.plan.describe()}")
    inspected = fetch(inspected)
    hide_bars()
    model = load(inspected, name=args.model, trace=args.output)
    offload = cast("Offload", model.offload)
    new_tokens = 0
    with offload:
        trace = offload.trace
        assert trace is not None
        trace.parameters = _parameters(model, inspected)
        prompts.check_vocabulary(model, torch.cat([ids for ids, _ in runs], dim=1))
        if args.seed is None:
            torch.seed()
        else:
            torch.manual_seed(args.seed)
        began = time.perf_counter()
        try:
            with out.progress("recording", sum(n for _, n in runs), "tokens") as advance:
                for ids, limit in runs:
                    count = _Count(advance)
                    ids = ids.to(model.device)
                    cast("Callable[..., object]", model.generate)(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=limit,
                        streamer=count,
                        **sampling,
                    )
                    advance(limit - count.tokens)
                    new_tokens += count.tokens
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


class _Count:
    """Streamer for `generate` that only counts."""

    def __init__(self, advance: Callable[[int], None]):
        self._advance = advance
        self._prompt_came = False
        self.tokens = 0

    def put(self, tokens: Tensor) -> None:
        """Called by transformers with the prompt first, then with every new token."""
        if not self._prompt_came:
            self._prompt_came = True
            return
        self.tokens += tokens.numel()
        self._advance(tokens.numel())

    def end(self) -> None:
        """Called by transformers after the last token."""


def _parameters(model: PreTrainedModel, inspected: Inspected) -> Parameters:
    """Counts for the trace's header: a loaded model holds all of its parameters except the experts'."""
    from offmoe.trace.trace import Parameters

    weights = {id(p): p.numel() for p in model.parameters()}
    looked_up, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is not None and looked_up.weight is not output.weight:
        weights.pop(id(looked_up.weight), None)
    shapes = [
        layer.decode.shapes.values() if layer.decode else [p.shape for p in layer.layout.params]
        for layer in inspected.catalog.layers
    ]
    experts = tuple(sum(map(math.prod, layer)) for layer in shapes)
    return Parameters(sum(weights.values()), experts)
