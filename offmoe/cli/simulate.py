"""`offmoe simulate TRACE`: replay a recorded routing trace under one cache configuration; needs no torch.

The planner takes tens of microseconds per step and layer, and runs twice: for the configuration and for the Belady
bound.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from rich.table import Table

from offmoe.checks import LAG_ONE
from offmoe.cli import options
from offmoe.cli.output import Output, new_table
from offmoe.config import CacheOptions
from offmoe.errors import ConfigError
from offmoe.profile import Profile, read_profile
from offmoe.simulate.decode_prices import DecodePaths, decode_prices
from offmoe.simulate.replay import Recording, belady, uniform_hit_rate
from offmoe.simulate.sweep import Settings, Totals, evaluate
from offmoe.text import format_size, percent, plain, span
from offmoe.trace.trace import Trace, read_trace
from offmoe.types import CacheStats

OVERRIDES = ("slots_per_layer", "eviction", "scope", "prefetch", "on_miss", "lag")
"""Options that override the trace's header."""


def parser() -> options.Parser:
    parser = options.Parser(
        "simulate",
        "Replay a recorded routing under one cache configuration. Options not given are those of the recorded run; "
        "a trace without them gets the defaults and no prefetch.",
    )
    parser.add_argument("trace", metavar="TRACE", help="an .npz file written by generate --trace")
    options.add_cache(parser, default="the recorded run's")
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    profile = Profile() if args.profile is None else read_profile(args.profile)
    trace = read_trace(args.trace)
    chosen = _options(args, trace, profile)
    quotas = chosen.quotas(trace.shape)
    outcome = evaluate(Recording(trace), chosen, Settings(profile.costs, fills=True)).whole
    stats = outcome.stats
    paths = decode_prices(Recording(trace), chosen, profile.costs)
    bound = belady(trace, chosen)
    uniform = uniform_hit_rate(trace, chosen)
    uniforms = [n / e for n, e in zip(quotas, trace.shape.experts, strict=True)]
    if chosen.scope == "model":
        uniforms = [uniform] * trace.shape.layers
    by_layer = [
        {"layer": i, "demands": ours.demands, "hit_rate": ours.hit_rate, "belady": best.hit_rate, "uniform": even}
        for i, (ours, best, even) in enumerate(zip(stats.by_layer, bound.by_layer, uniforms, strict=True))
    ]
    out.result(
        f"{args.trace}: {trace.model or 'unnamed model'}, {trace.tokens} tokens, {trace.shape.layers} MoE layers",
        f"{chosen.eviction}, {span(quotas)} slots per layer of {span(trace.shape.experts)}, scope {chosen.scope}, "
        f"prefetch {chosen.prefetch}, on a miss {chosen.on_miss}" + (f", lag {chosen.lag}" if chosen.lag else ""),
        _table(stats, bound, uniforms, uniform),
        _gap(stats.hit_rate, bound.hit_rate, uniform, chosen.prefetch != 0),
        *_fills(trace, stats),
        f"fetched {format_size(stats.h2d_bytes)}; {_speed(outcome)}",
        *_paths(paths),
    )
    out.json(
        {
            "hit_rate": stats.hit_rate,
            "belady": bound.hit_rate,
            "uniform": uniform,
            "by_layer": by_layer,
            "tokens_per_s": outcome.tokens_per_s,
            "decode_paths": None if paths is None else paths.to_dict(),
            "tokens": trace.tokens,
            "stats": stats.to_dict(),
            "config": {**chosen.to_dict(), "slots_per_layer": plain(quotas)},
        }
    )


def _fills(trace: Trace, stats: CacheStats) -> list[str]:
    """A line about the recorded run's background fill, if there was one."""
    if trace.fills is None:
        return []
    if stats.filled:
        return [f"{stats.filled} slots were filled in the background, as in the run; Belady begins with none filled."]
    return [
        f"The run filled {len(trace.fills)} slots in the background; another configuration is replayed without that."
    ]


def _speed(outcome: Totals) -> str:
    if outcome.tokens_per_s is None:
        return 'tokens/s needs the costs of a machine: --profile FILE with "costs"'
    return f"{outcome.tokens_per_s:.1f} tokens/s at the profile's costs, {outcome.stats.stall_s:.2f} s of stall"


def _paths(paths: DecodePaths | None) -> list[str]:
    """A line about decoding without the host in its way, where there is a price for it."""
    if paths is None:
        return []
    return [
        f"Predicted for a GPU that decodes: {paths.eager:.3g} tokens/s where each layer waits for the host, "
        f"{paths.lag_1:.3g} where none does (lag 1, untried on a GPU), {paths.captured:.3g} captured in "
        "graphs (untried too)."
    ]


def _options(args: argparse.Namespace, trace: Trace, profile: Profile) -> CacheOptions:
    """What was given, else the profile's, else what the run had, else the defaults, with slots that the model can work
    with.
    """
    default = CacheOptions()
    assert isinstance(default.slots_per_layer, int)
    base = trace.options or replace(default, slots_per_layer=max(default.slots_per_layer, *trace.shape.top_k))
    overrides = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    implied = LAG_ONE if overrides.get("lag") == 1 else {}
    values = {**base.to_dict(), **profile.cache, **implied, **overrides}
    if values["eviction"] != "static":
        values.pop("popularity", None)
    chosen = CacheOptions.from_dict(values)
    if args.prefetch not in (None, 0) and trace.predicted is None:
        raise ConfigError(
            f"--prefetch {args.prefetch}: the trace holds no predictions to act on; record one with 'offmoe generate "
            f"--prefetch {args.prefetch} --trace FILE'."
        )
    return chosen


def _table(stats: CacheStats, bound: CacheStats, uniforms: list[float], uniform: float) -> Table:
    columns = ("MoE layer", "demands", "hit rate", "Belady", "uniform", "misses")
    table = new_table("simulated expert cache", right=columns)
    rows = zip(map(str, range(len(uniforms))), stats.by_layer, bound.by_layer, uniforms, strict=True)
    for name, ours, best, even in [*rows, ("all", stats, bound, uniform)]:
        if name == "all":
            table.add_section()
        rates = map(percent, (ours.hit_rate, best.hit_rate, even))
        table.add_row(name, str(ours.demands), *rates, str(ours.misses))
    return table


def _gap(hit_rate: float, best: float, uniform: float, prefetching: bool) -> str:
    """The rest of the gap to Belady, as a share of the gap from uniform routing to Belady."""
    belady = "Belady (which knows the future" + (", but fetches nothing ahead)" if prefetching else ")")
    if hit_rate >= best:
        return f"No gap to {belady} remains."
    if best <= uniform:
        return f"{belady} does no better than uniform routing would: there is nothing to gain."
    return f"Of the gap from uniform routing to {belady}, {percent((best - hit_rate) / (best - uniform))} remains."
