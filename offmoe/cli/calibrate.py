"""`offmoe calibrate MODEL`: measure what moving and computing a model costs on this machine; write a profile.

It takes `--seconds`, and the time to load the dense part. The rest of an existing profile is kept.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from offmoe.cli import options
from offmoe.cli.model import open_model
from offmoe.cli.output import Output, new_table
from offmoe.errors import ConfigError
from offmoe.files import check_folder
from offmoe.profile import CostModel, Profile, read_profile

DEFAULT_SECONDS = 30
FIGURES = {
    "disk_gb_s": ("reading experts, all readers", "GB/s"),
    "read_latency_us": ("one read beyond its bytes", "us"),
    "ram_gb_s": ("copies within RAM", "GB/s"),
    "h2d_gb_s": ("copies to the device", "GB/s"),
    "expert_us_device": ("one expert, one token", "us"),
    "expert_us_landed": ("one expert, one token, left when all of it has landed (estimated from its size)", "us"),
    "expert_us_host": ("one expert, one token, on the CPU", "us"),
    "expert_us_host_4": ("one expert, four tokens, on the CPU", "us"),
    "expert_us_host_overlapped": ("one expert, one token, on the CPU beside reading or copying", "us"),
    "fetch_us": ("one fetch, taken from the computing thread", "us"),
    "dense_us_per_token": ("everything but the experts, per token", "us"),
}


def parser() -> options.Parser:
    parser = options.Parser(
        "calibrate",
        "Measure disk, RAM, link and expert times of a model on this machine, and write them into a profile. With it, "
        "simulate, tune and inspect estimate tokens/s.",
    )
    options.add_loading(parser)
    options.add_cache(parser)
    parser.add_argument("-o", "--output", metavar="PROFILE", help="write the costs into this profile, new or not")
    how_long = f"time to measure, without loading (default: {DEFAULT_SECONDS})"
    options.add_option(parser, "--seconds", "S", how_long, float, DEFAULT_SECONDS)
    parser.set_defaults(no_generation_config=True)
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    if not 0 <= args.seconds <= 3600:
        raise ConfigError(f"--seconds {args.seconds} must be from 0 to 3600.")
    profile = Profile()
    if args.output is not None:
        output = Path(args.output)
        if output.exists():
            profile = read_profile(output)
        else:
            check_folder(output, f"-o {args.output}")
    with open_model(args, out, prefetch=0) as opened:
        from offmoe.measure.calibrate import calibrate

        costs = calibrate(opened.fetch(), args.seconds, lambda what: out.note(f"measuring: {what}"))
        device = str(opened.inspected.config.device)
    out.result(_table(args.model, device, costs))
    if args.output is not None:
        replace(profile, costs=costs).write(args.output)
        out.note(
            f"written to {args.output}; next: offmoe simulate TRACE --profile {args.output}, offmoe inspect "
            f"{options.model_words(args)} --profile {args.output}"
        )
    out.json({"costs": costs.to_dict()})


def _table(model: str, device: str, costs: CostModel) -> Table:
    table = new_table(f"costs of {model} on {device}, medians", left=("",), right=("",))
    for name, (what, unit) in FIGURES.items():
        value = getattr(costs, name)
        if value is not None:
            table.add_row(what, f"{value:,.2f} {unit}" if unit == "GB/s" else f"{value:,.1f} {unit}")
    return table
