"""`offmoe tune TRACE`: find the best expert cache for a recorded routing and write it as a profile; needs no torch.

This module parses, shows and writes; `offmoe.simulate.search` decides which configurations are replayed, on all cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from offmoe.cli import options
from offmoe.cli.output import Output, new_table
from offmoe.cli.plot import Curve, Figure, check_plot, write_plot
from offmoe.config import EVICTIONS, ON_MISS, SCOPES, CacheOptions
from offmoe.device.cores import usable_cpus
from offmoe.errors import ConfigError
from offmoe.files import check_folder
from offmoe.profile import Profile, read_profile
from offmoe.simulate import sweep
from offmoe.simulate.predictions import PredictionQuality, total
from offmoe.simulate.search import SearchResult, search
from offmoe.text import or_dash, parse_size, percent, plain, span
from offmoe.trace.trace import Trace, read_trace

Results = tuple[list[sweep.Outcome], list[sweep.Bounds]]

UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("bytes", 1))
SHOWN = 12
"""Rows shown of the ranked table; --json has all."""
LEFT = ("policy", "scope", "slots", "RAM", "ahead")
"""Columns of the ranked table that are aligned to the left."""


def parser() -> options.Parser:
    parser = options.Parser(
        "tune",
        "Find the best cache for a recorded routing. Half of the requests choose, the other half says what the choice "
        "is worth; without --slots-per-layer or --budget the memory is that of the knee.",
    )
    parser.add_argument("trace", metavar="TRACE", help="an .npz file written by generate --trace or trace")
    group = parser.add_argument_group("memory")
    add, add_list, number = options.add_option, options.add_list, options.positive
    add(group, "--slots-per-layer", "N", "choose among caches of this size", number)
    add(group, "--budget", "SIZE", "the same in bytes of experts on the device: 8GiB")
    add_list(group, "--capacities", "N,N", "slots per layer to sweep", number)
    in_ram = "slots per layer in RAM between disk and device (default: as recorded, and half)"
    add_list(group, "--host-slots", "N,N", in_ram, lambda part: 0 if part == "0" else number(part))
    group = parser.add_argument_group("what to try")
    policies = f"of: {', '.join(EVICTIONS)} (default: all of these), MODULE:CLASS"
    add_list(group, "--eviction", "A,B", policies, options.eviction)
    add_list(group, "--scope", "A,B", f"of: {', '.join(SCOPES)} (default: both)", str)
    predicted = "0, N, auto (default: what the trace has predictions for)"
    add_list(group, "--prefetch", "N,N", predicted, options.number_or_text)
    add_list(group, "--on-miss", "A,B", f"of: {', '.join(ON_MISS)} (default: all)", str)
    group.add_argument("--clear-between-requests", action="store_true", help="every request finds an empty cache")
    add(group, "--profile", "FILE", "JSON with measured costs: rank by tokens per second")
    add(group, "--jobs", "N", "processes (default: one per core)", number)
    group = parser.add_argument_group("results")
    group.add_argument("-o", "--output", metavar="FILE", help="write the best as a profile: generate --profile FILE")
    group.add_argument("--plot", metavar="FILE", help="hit rate over slots: .html, or .png where matplotlib is there")
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    if args.plot is not None:
        check_plot(args.plot)
    if args.output is not None:
        check_folder(args.output, f"--output {args.output}")
    costs = None if args.profile is None else read_profile(args.profile).costs
    if args.profile is not None and costs is None:
        raise ConfigError(f"--profile {args.profile}: it holds no 'costs', and nothing else of it is used here.")
    trace = read_trace(args.trace)
    if not trace.tokens:
        raise ConfigError(f"{args.trace}: the trace is empty; record one with 'offmoe generate MODEL PROMPT --trace'.")
    settings = sweep.Settings(costs, args.clear_between_requests, sweep.split_requests(trace))
    jobs = args.jobs or usable_cpus()

    def replayed(candidates: Sequence[CacheOptions], bounds: Sequence[CacheOptions]) -> Results:
        with out.progress("replaying", len(candidates) + len(bounds), "configurations") as advance:
            return sweep.sweep(trace, candidates, bounds, settings, jobs=jobs, progress=lambda *counts: advance(1))

    result = search(
        trace,
        settings,
        replayed,
        args.capacities or sweep.capacities(trace.shape),
        _memory(args, trace),
        args.eviction or EVICTIONS,
        args.scope,
        args.prefetch,
        on_misses=args.on_miss,
        host_sizes=args.host_slots,
    )
    predictions = result.predictions()
    out.result(
        f"{args.trace}: {trace.model or 'unnamed model'}, {trace.tokens} tokens, {trace.shape.layers} MoE layers, "
        f"{span(trace.shape.experts)} experts, top_k {span(trace.shape.top_k)}",
        _sweep_table(result),
        _ranked_table(result),
        *_remarks(result, predictions),
    )
    if args.output is not None:
        _profile(result, args.trace).write(args.output)
        out.note(f"profile written to {args.output}; use it with: offmoe generate MODEL PROMPT --profile {args.output}")
    if args.plot is not None:
        write_plot(args.plot, _figure(result))
        out.note(f"plot written to {args.plot}")
    out.json(
        {
            "candidates": [_facts(result, outcome) for outcome in [*result.ranked, *result.others()]],
            "best": _facts(result, result.best),
            "bounds": [vars(bound) for bound in result.bounds],
            "pools": {slots: outcome.whole.stats.hit_rate for slots, outcome in result.pools.items()},
            "knee": _knee_facts(result),
            "predictions": {name: _prediction_facts(quality) for name, quality in predictions.items()},
            "tokens": trace.tokens,
            "test_requests": sorted(settings.test_requests),
        }
    )


def _memory(args: argparse.Namespace, trace: Trace) -> int | None:
    """The slots per layer of --slots-per-layer or --budget; None without either."""
    if args.budget is not None and args.slots_per_layer is not None:
        raise ConfigError("--budget and --slots-per-layer are both given; they are the same thing in two units.")
    if args.budget is not None:
        return sweep.affordable(trace.shape, parse_size(args.budget, "--budget"))
    if args.slots_per_layer is not None:
        return max(CacheOptions(slots_per_layer=args.slots_per_layer).quotas(trace.shape))
    return None


def _facts(result: SearchResult, outcome: sweep.Outcome) -> dict[str, object]:
    whole, chosen = outcome.whole, outcome.options
    return {
        "eviction": chosen.eviction,
        "scope": chosen.scope,
        "slots_per_layer": plain(chosen.quotas(result.trace.shape)),
        "prefetch": chosen.prefetch,
        "on_miss": chosen.on_miss,
        "host_slots": plain(chosen.host_quotas(result.trace.shape)),
        "hit_rate": whole.stats.hit_rate,
        "train_hit_rate": outcome.train.stats.hit_rate,
        "test_hit_rate": outcome.judged.stats.hit_rate,
        "gap_closed": result.gap(outcome),
        "misses_per_token": whole.misses_per_token,
        "bytes_per_token": whole.bytes_per_token,
        "disk_bytes_per_token": whole.disk_bytes_per_token,
        "stall_s": whole.stats.stall_s if result.settings.costs else None,
        "tokens_per_s": whole.tokens_per_s,
        "test_tokens_per_s": outcome.judged.tokens_per_s,
    }


def _prediction_facts(quality: list[PredictionQuality]) -> dict[str, object]:
    return {**total(quality).to_dict(), "by_layer": [layer.to_dict() for layer in quality]}


def _knee_facts(result: SearchResult) -> dict[str, object]:
    curve = result.curve(result.best.options.eviction) or {result.slots: result.best.whole.stats.hit_rate}
    return {
        "slots_per_layer": sweep.knee(curve),
        "chosen": result.slots,
        "doubling": {str(n): sweep.gain_of_doubling(curve, n) for n in curve if 2 * n <= max(curve)},
    }


def _profile(result: SearchResult, name: str) -> Profile:
    best = result.best
    return Profile(
        best.options.to_dict(),
        result.settings.costs,
        {
            "trace": Path(name).name,
            "model": result.trace.model,
            "tokens": result.trace.tokens,
            "hit_rate": best.whole.stats.hit_rate,
            "test_hit_rate": best.judged.stats.hit_rate,
            **({"hit_rates": rates} if (rates := result.hit_rates()) else {}),
        },
    )


# --- for people


def _sweep_table(result: SearchResult) -> Table:
    sizes = [bound.slots_per_layer for bound in result.bounds]
    columns = [f"{n}*" if n == result.slots else str(n) for n in sizes]
    table = new_table("hit rate, % (whole trace), by slots per layer", left=("policy",), right=columns)
    curves = {name: result.curve(name) for name in result.policies if result.curve(name)}
    for name, curve in curves.items():
        table.add_row(name, *(f"{100 * curve[n]:.1f}" if n in curve else "" for n in sizes if isinstance(n, int)))
    for name in {outcome.options.eviction for outcome in result.pools.values()}:
        totals = [sum(min(n, e) for e in result.trace.shape.experts) for n in sizes if isinstance(n, int)]
        table.add_row(f"{name}, one pool", *(f"{100 * result.pools[n].whole.stats.hit_rate:.1f}" for n in totals))
    table.add_section()
    for label, key in (
        ("Belady", "belady"),
        ("... with bypass", "belady_bypass"),
        ("shuffled tokens", "shuffled"),
        ("uniform routing", "uniform"),
    ):
        table.add_row(label, *(f"{100 * getattr(bound, key):.1f}" for bound in result.bounds))
    if curve := result.curve(result.best.options.eviction):
        table.add_section()
        gains = {n: sweep.gain_of_doubling(curve, n) for n in curve if 2 * n <= max(curve)}
        equal = [n for n in sizes if isinstance(n, int)]
        table.add_row("doubling adds", *(f"{100 * gains[n]:+.1f}" if n in gains else "" for n in equal))
    return table


def _ranked_table(result: SearchResult) -> Table:
    in_ram = any(any(outcome.options.host_quotas(result.trace.shape)) for outcome in result.ranked)
    judged = "tokens per second" if result.settings.costs is not None else "bytes read" if in_ram else "bytes moved"
    rows = [_ranked_row(result, outcome, in_ram) for outcome in result.ranked[:SHOWN]]
    left = [name for name in rows[0] if name in LEFT]
    table = new_table(
        f"at {result.slots} slots per layer, best first by {judged}",
        left,
        [name for name in rows[0] if name not in LEFT],
        no_wrap=True,
        box=None,  # eleven columns must fit into 80 characters
        pad_edge=False,
    )
    for row in rows:
        table.add_row(*row.values())
    return table


def _ranked_row(result: SearchResult, outcome: sweep.Outcome, in_ram: bool) -> dict[str, str]:
    """The cells of one configuration, by column."""
    chosen, whole, gap = outcome.options, outcome.whole, result.gap(outcome)
    unit, size = next(u for u in UNITS if result.best.whole.bytes_per_token >= u[1] or u[1] == 1)
    row = {
        "policy": chosen.eviction + ("" if chosen.on_miss == "fetch" else f"+{chosen.on_miss}"),
        "scope": chosen.scope,
        "slots": span(chosen.quotas(result.trace.shape)),
    }
    if in_ram:
        row["RAM"] = span(chosen.host_quotas(result.trace.shape))
    row |= {
        "ahead": str(chosen.prefetch),
        "hit %": f"{100 * whole.stats.hit_rate:.1f}",
        "unseen": f"{100 * outcome.judged.stats.hit_rate:.1f}",
        "gap %": or_dash(gap, lambda share: f"{100 * share:.0f}"),
        "misses": f"{whole.misses_per_token:.2f}",
        unit: f"{whole.bytes_per_token / size:.1f}",
    }
    if in_ram:
        row[f"{unit} read"] = f"{whole.disk_bytes_per_token / size:.1f}"
    if result.settings.costs is not None:
        row["tok/s"] = f"{whole.tokens_per_s or 0.0:.2f}"
        row["stall %"] = f"{100 * whole.stats.stall_s / (whole.seconds or 1.0):.0f}"
    return row


def _remarks(result: SearchResult, predictions: dict[str, list[PredictionQuality]]) -> list[str]:
    lines = []
    curve = result.curve(result.best.options.eviction)
    if len(curve) > 1:
        at = sweep.knee(curve)
        doubled = f"; doubling from there buys {100 * sweep.gain_of_doubling(curve, at):.1f} points"
        lines.append(f"Knee: {at} slots per layer, {percent(curve[at])}{doubled if 2 * at <= max(curve) else ''}.")
    if result.settings.test_requests:
        lines.append(
            "unseen: hit rate on the requests that nothing was fitted to. gap: share of the way from LRU to Belady, "
            "which knows the future.\nahead: prefetch. +cpu, +auto: on_miss. misses and bytes: per token. "
            "doubling adds: points, best policy."
        )
    else:
        lines.append("One request only: the choice is fitted to what it is measured on. Record more prompts.")
    if result.settings.costs is None:
        lines.append(
            "Without costs the fewest bytes win, so never a prefetch; pass --profile with costs to weigh time."
        )
    for name, quality in predictions.items():
        counts = total(quality)
        if counts.recall is None or counts.precision is None:
            continue
        text = f"Predictions ({name}): recall {percent(counts.recall)}, precision {percent(counts.precision)}"
        if counts.coverage is not None and counts.precision_missing is not None:
            text += (
                f"; cover {percent(counts.coverage)} of the misses, {percent(counts.precision_missing)} of them useful"
            )
            if counts.extra_per_saved is not None:
                text += f", {counts.extra_per_saved:.2f} bytes wasted per byte saved"
        lines.append(text + ".")
    return lines


def _figure(result: SearchResult) -> Figure:
    curves = [Curve(name, sorted(points.items())) for name in result.policies if (points := result.curve(name))]
    for label, key in (("Belady", "belady"), ("shuffled", "shuffled"), ("uniform", "uniform")):
        points = {b.slots_per_layer: getattr(b, key) for b in result.bounds if isinstance(b.slots_per_layer, int)}
        curves.append(Curve(label, sorted(points.items()), is_bound=True))
    trace, model = result.trace, result.trace.model or "unnamed model"
    note = (
        f"{model}: {trace.tokens} tokens, {trace.shape.layers} MoE layers, caches per layer, no prefetch. "
        "Belady knows the future; uniform routing has neither skew nor memory, shuffled tokens have skew only."
    )
    return Figure("Expert cache: hit rate over slots per layer", note, curves, result.slots)
