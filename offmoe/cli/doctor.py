"""`offmoe doctor [FOLDER]`: check this machine: device, link, pinning, disk, versions; say what to change.

It takes a few seconds and loads no model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from offmoe.cli import options
from offmoe.cli.output import Output, new_table
from offmoe.errors import ConfigError, OffmoeError

if TYPE_CHECKING:
    from offmoe.measure.doctor import Check

COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


def parser() -> options.Parser:
    parser = options.Parser("doctor", "What this machine can do for offmoe, and what to change.")
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", default=".", help="a folder on the disk that holds models (default: .)"
    )
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    folder = Path(args.folder)
    if not folder.is_dir():
        raise ConfigError(f"FOLDER {args.folder!r} is no folder; give one on the disk that holds your models.")
    from offmoe.measure.doctor import examine

    checks = []
    with out.progress("checking", 12, "checks") as advance:
        for check in examine(folder.resolve()):
            checks.append(check)
            advance(1)
    advice = [f"{check.name}: {check.advice}" for check in checks if check.advice]
    out.result(_table(checks), *(advice or ["Nothing needs to change."]))
    out.json({"checks": [check.to_dict() for check in checks]})
    failed = [check.name for check in checks if check.verdict == "fail"]
    if failed:
        raise OffmoeError(f"offmoe cannot run here until these are fixed: {', '.join(failed)}.")


def _table(checks: list[Check]) -> Table:
    table = new_table("this machine")
    for check in checks:
        table.add_row(f"[{COLORS[check.verdict]}]{check.verdict}[/]", check.name, escape(check.finding))
    return table
