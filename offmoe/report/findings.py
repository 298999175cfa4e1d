"""Writes a report as plain sentences, for the terminal and the page. Findings are compared with chance.

No sentence is written without counts behind it.
"""

from __future__ import annotations

from bisect import bisect_right

from offmoe.report.report import ALERT, Report, mean
from offmoe.report.specialization import TypeLift
from offmoe.text import format_size, percent, span

FEW_TOKENS = 100
SPECIALISTS = 500
"""Strongest specialists that are searched for jobs of different types."""
JOBS = 3
UNEVEN_GINI = (0.15, 0.3, 0.5)
SPREADS = ("evenly", "somewhat unevenly", "unevenly", "very unevenly")
"""Words for the spread of the work below each Gini coefficient of UNEVEN_GINI, and above the last."""


def findings(report: Report) -> list[str]:
    """The findings, the most general first, in one or two sentences each."""
    if not report.tokens:
        return ["The trace holds no tokens: there is nothing to describe."]
    parts = (_work, _balance, _memory, _same_token, _specialization, _paths, _phases)
    sentences = [text for part in parts if (text := part(report))]
    if report.tokens < FEW_TOKENS:
        few = _plural(report.tokens, "token", "tokens")
        sentences.append(f"Only {few}: all of this may be chance. Record more before concluding anything.")
    return sentences


def missing(report: Report) -> list[str]:
    """What the trace cannot tell, and what would be needed."""
    sentences = []
    if report.specialization is None:
        sentences.append(
            "Which tokens go where is unknown: the trace holds no tokens with their texts. 'offmoe trace' records them."
        )
    if report.active.parameters is None:
        sentences.append(
            "Parameters and FLOPs per token are unknown: the trace's header has no parameter counts. 'offmoe trace' "
            "writes them."
        )
    if report.tokens and not (report.prefill.tokens and report.decode.tokens):
        only = "decode" if report.decode.tokens else "prefill"
        sentences.append(f"Only {only} was recorded, so prefill and decode cannot be compared.")
    return sentences


def _work(report: Report) -> str:
    active = report.active
    share = percent(active.expert_bytes / active.expert_bytes_total)
    text = (
        f"Each token uses {span(report.shape.top_k)} of {span(report.shape.experts)} experts in each of "
        f"{_plural(report.shape.layers, 'MoE layer', 'MoE layers')}: {format_size(active.expert_bytes)} of "
        f"{format_size(active.expert_bytes_total)} of expert weights ({share})."
    )
    if active.parameters is not None and active.parameters_total is not None and active.flops_per_token is not None:
        text += (
            f" Of {_count(active.parameters_total)} parameters {_count(active.parameters)} are active, about "
            f"{_count(active.flops_per_token)}FLOP per token."
        )
    return text


def _balance(report: Report) -> str:
    means = report.overall()
    gini, busiest = means["gini"], means["busiest"]
    if gini is None or busiest is None:
        return "No token was routed to any expert."
    how = SPREADS[bisect_right(UNEVEN_GINI, gini)]
    text = (
        f"The work is spread {how}: Gini {gini:.2f}, and the busiest expert of a layer carries {busiest:.1f}x the mean."
    )
    alerts = report.alerts
    if alerts:
        worst = alerts[0]
        text += (
            f" {_plural(len(alerts), 'expert carries', 'experts carry')} more than {ALERT:g}x the mean, most of all "
            f"expert {worst.expert} in layer {worst.layer} ({worst.times_mean:.1f}x)."
        )
    else:
        text += f" No expert carries more than {ALERT:g}x the mean."
    unused = sum(load.unused for load in report.loads if load.total)
    if unused:
        text += f" {_plural(unused, 'expert was', 'experts were')} never chosen."
    return text


def _memory(report: Report) -> str:
    overall = report.overall()
    ours, chance = overall["consecutive"], overall["independent"]
    if ours is None or chance is None:
        return ""
    text = (
        f"Routing remembers: a token shares {percent(ours)} of its experts with the one before it; two tokens picked "
        f"at random share {percent(chance)}."
        if ours > 1.1 * chance
        else f"Routing hardly remembers: a token shares {percent(ours)} of its experts with the one before it, "
        f"{percent(chance)} with any other."
    )
    gains = [
        (layer.consecutive - layer.independent, i)
        for i, layer in enumerate(report.consistency)
        if layer.consecutive is not None and layer.independent is not None
    ]
    if len(gains) > 1 and ours > 1.1 * chance:
        text += f" A cache gains most in layer {max(gains)[1]}, least in layer {min(gains)[1]}."
    return text


def _same_token(report: Report) -> str:
    overall = report.overall()
    same, chance = overall["same_token"], overall["independent"]
    if same is None or chance is None:
        return ""
    by_layer = [layer.same_token for layer in report.consistency]
    text = f"The same token meets the same experts in {percent(same)} of cases (any two tokens: {percent(chance)})"
    first, last = by_layer[0], by_layer[-1]
    if len(by_layer) > 1 and first is not None and last is not None:
        text += f", from {percent(first)} in the first layer to {percent(last)} in the last"
    return text + "."


def _specialization(report: Report) -> str:
    by_type: dict[str, TypeLift] = {}
    for entry in report.specialization.strongest(SPECIALISTS) if report.specialization else []:
        by_type.setdefault(entry.type, entry)
    if not by_type:
        return ""
    named = list(by_type.values())[:JOBS]
    jobs = [f"expert {s.expert} of layer {s.layer} takes '{s.type}' {s.lift:.1f}x as often" for s in named]
    return f"Clearest jobs: {', '.join(jobs)} as its load explains."


def _paths(report: Report) -> str:
    guessed = mean([pair.guessed for pair in report.coactivation])
    popular = mean([pair.by_popularity for pair in report.coactivation])
    if guessed is None or popular is None:
        return ""
    return (
        f"Counting which experts follow each other, {percent(guessed)} of the next layer's experts can be guessed; "
        f"popularity alone guesses {percent(popular)}."
    )


def _phases(report: Report) -> str:
    if not (report.prefill.tokens and report.decode.tokens) or report.shift is None:
        return ""
    return (
        f"{report.prefill.tokens} tokens were prefill, {report.decode.tokens} decode; {percent(report.shift)} of the "
        "routes would have to move to turn the loads of one into the other's."
    )


def _count(number: int) -> str:
    """5,545,600 -> '5.5 M'. Below a thousand the text ends in a space."""
    size = float(number)
    for unit in ("", "k", "M", "G", "T"):
        if size < 1000:
            return f"{size:.0f} " if not unit else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} P"


def _plural(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"
