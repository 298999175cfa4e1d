"""`offmoe report TRACE`: describe a recorded routing: balance, specialization, memory; needs no torch.

It takes a few passes over the trace: some seconds for 50,000 tokens of 24 layers.
"""

from __future__ import annotations

import argparse

from rich.table import Table
from rich.text import Text

from offmoe.cli import options
from offmoe.cli.output import Output, new_table
from offmoe.report.findings import findings, missing
from offmoe.report.page import write_page
from offmoe.report.report import ALERT, Report, describe
from offmoe.text import or_dash
from offmoe.trace.trace import read_trace

STRONGEST_SHOWN, TOKENS_SHOWN = 10, 4


def parser() -> options.Parser:
    parser = options.Parser(
        "report",
        "Describe a recorded routing: load of the experts, how consistent routing is, which tokens go to which expert, "
        "and which experts work together.",
    )
    parser.add_argument("trace", metavar="TRACE", help="an .npz file written by 'trace' or by generate --trace")
    parser.add_argument("-o", "--output", metavar="PAGE", help="write a self-contained HTML page with heatmaps")
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    report = describe(read_trace(args.trace))
    written = []
    if args.output is not None:
        write_page(args.output, report)
        written.append(f"page written to {args.output}")
    heading = f"{args.trace}: {report.model or 'unnamed model'}, {report.tokens} tokens of {report.requests} requests"
    out.result(heading, _layers(report))
    if strongest := _strongest(report):
        out.result(strongest)
    out.result(*(f"\u2022 {text}" for text in findings(report)))
    out.details(*missing(report), *written)
    out.json(report.to_dict())


def _layers(report: Report) -> Table:
    caption = (
        "kept: experts shared with the token before; same: between occurrences of a token; any: of any two tokens; "
        f"busiest: expert (times the mean), red above {ALERT:g}"
    )
    columns = ("layer", "Gini", "entropy", "busiest", "unused", "kept", "same", "any")
    table = new_table("experts by layer", (), columns, no_wrap=True, caption=caption, caption_justify="left")
    for i, (load, consistency) in enumerate(zip(report.loads, report.consistency, strict=True)):
        busiest = "-" if load.busiest is None else f"{int(load.routes.argmax())} ({load.busiest:.2f}x)"
        table.add_row(
            str(i),
            or_dash(load.gini, "{:.3f}".format),
            or_dash(load.entropy, "{:.3f}".format),
            f"[red]{busiest}[/]" if (load.busiest or 0) > ALERT else busiest,
            str(load.unused),
            or_dash(consistency.consecutive),
            or_dash(consistency.same_token),
            or_dash(consistency.independent),
        )
    return table


def _strongest(report: Report) -> Table | None:
    """Experts with the clearest jobs; None if none has one."""
    if report.specialization is None or not (strongest := report.specialization.strongest(STRONGEST_SHOWN)):
        return None
    table = Table(title="clearest specialists", title_justify="left")
    for name in ("layer", "expert", "takes", "lift"):
        table.add_column(name, justify="left" if name == "takes" else "right", no_wrap=True)
    table.add_column("tokens that stand out", no_wrap=True, overflow="ellipsis")
    for entry in strongest:
        tokens = report.specialization.favorites[entry.layer][entry.expert]
        favorites = " ".join(repr(token.piece) for token in tokens[:TOKENS_SHOWN])
        # Text: markup in a token is a text like any other.
        table.add_row(str(entry.layer), str(entry.expert), entry.type, f"{entry.lift:.1f}x", Text(favorites))
    return table
