"""`offmoe pack MODEL OUT`: quantize a model's experts once, into a folder that loads like any model.

The time goes into quantizing, else into the disk, and with --perplexity into computing. After an interruption the same
command goes on where it stopped.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.table import Table

from offmoe.cli import options, prompts
from offmoe.cli.output import Output, new_table
from offmoe.text import format_size

if TYPE_CHECKING:
    from torch import Tensor

    from offmoe.measure.perplexity import Score
    from offmoe.pack.pack import Packed


ERRORS = ("max_error", "mean_error", "relative_error")
"""Figures of a layer's loss."""


def parser() -> options.Parser:
    parser = options.Parser(
        "pack",
        "Quantize the experts of a model and write it to a folder that every verb and from_pretrained take as a model "
        "(safetensors in the layout of compressed-tensors). The rest is copied as it is. After an interruption the "
        "same command goes on where it was.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a Hub id, or 'demo'; not quantized yet")
    parser.add_argument("output", metavar="OUT", help="a new or empty folder, or one that an earlier run began")
    parser.add_argument("--experts", metavar="FORM", default="int4", help="int4 (default) or int8")
    scales = "int4: weights per scale, 32, 64 (default) or 128"
    options.add_option(parser, "--group", "N", scales, options.positive)
    parser.add_argument("--zero-points", action="store_true", help="int4: store a zero point with every scale")
    order = "rows (default) as compressed-tensors reads them, or tiles as the CPU's kernels do, for offmoe alone"
    options.add_option(parser, "--layout", "ORDER", order, default="rows")
    measured = "measure the perplexity of the model before and after on this text (UTF-8); loads both in turn"
    options.add_option(parser, "--perplexity", "FILE", measured)
    options.add_hub(parser)
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    from offmoe.hf.quiet import quiet
    from offmoe.pack.pack import pack, weight_format

    how = weight_format(args.experts, args.group, args.zero_points)
    quiet(args.verbose, args.json)
    ids = None if args.perplexity is None else _windows(args)
    with out.transfer("packing") as progress:
        done = pack(args.model, args.output, how, layout=args.layout, progress=progress, **options.hub_options(args))
    out.result(_table(done, str(how)))
    if done.kept:
        out.note(f"finished by an earlier run: {done.kept} of {done.shards} shards")
    out.note(f"next: offmoe generate {args.output} PROMPT --experts {args.experts}")
    scored = {}
    if ids is not None:
        before, after = (_score(which, ids, args, out) for which in (args.model, args.output))
        change = 100 * (after.perplexity / before.perplexity - 1)
        out.result(
            f"perplexity on {args.perplexity}, {before.tokens:,} tokens: {before.perplexity:.4f} before, "
            f"{after.perplexity:.4f} after ({change:+.2f} %)"
        )
        scored["perplexity"] = {"before": before.perplexity, "after": after.perplexity, "tokens": before.tokens}
    out.json(
        {
            "bytes_in": done.bytes_in,
            "bytes_out": done.bytes_out,
            "seconds": done.seconds,
            "max_error": done.max_error,
            "layers": [{"name": name} | {f: getattr(loss, f) for f in ERRORS} for name, loss in done.layers.items()],
            **scored,
        }
    )


def _windows(args: argparse.Namespace) -> Tensor:
    """The text as windows of token ids. ConfigError for a file that is not text or too short, before packing begins."""
    from offmoe.hf.hub.locate import locate
    from offmoe.hf.load.tokenizer import load_tokenizer
    from offmoe.measure.perplexity import windows

    text = prompts.read_text(args.perplexity, "--perplexity")
    tokenizer = load_tokenizer(locate(args.model, **options.hub_options(args)).model)
    return windows(tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0])


def _score(model: str, ids: Tensor, args: argparse.Namespace, out: Output) -> Score:
    from offmoe.api import from_pretrained
    from offmoe.measure.perplexity import scores

    hub = options.hub_options(args) if model == args.model else {}
    loaded = from_pretrained(model, **hub)
    with loaded.offload, out.transfer(f"scoring {model}") as progress:
        return scores({model: loaded}, ids, progress=progress)[model]


def _table(done: Packed, how: str) -> Table:
    sizes = f"{format_size(done.bytes_in)} became {format_size(done.bytes_out)}"
    title = f"experts as {how}: {sizes} in {done.seconds:,.0f} s"
    table = new_table(title, left=("experts of",), right=("max error", "mean error", "relative, %"))
    for name, loss in done.layers.items():
        table.add_row(name, f"{loss.max_error:.3g}", f"{loss.mean_error:.3g}", f"{100 * loss.relative_error:.2f}")
    return table
