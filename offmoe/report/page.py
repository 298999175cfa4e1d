"""Writes the page of `offmoe report -o`: one HTML file that needs only a browser.

The template holds style and drawing; this module fills in numbers and texts as JSON. The page grows by some bytes per
(layer, type, expert) and per pair of experts, so very wide layers pair only their busiest experts. Texts of tokens are
untrusted input: the file must never contain them in a form that a browser could run.
"""

from __future__ import annotations

import json
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from offmoe.errors import OffmoeError
from offmoe.files import check_folder, replacing
from offmoe.report.coactivation import MIN_EXPECTED, Coactivation
from offmoe.report.findings import findings, missing
from offmoe.report.report import ALERT, Report
from offmoe.report.specialization import CLEAR, MIN_TOKENS
from offmoe.report.token_types import TYPES
from offmoe.text import or_dash, percent

DATA = "/*DATA*/"
PAIRED_EXPERTS = 64
"""Experts per layer in the co-activation maps. The page grows with its square, times the number of layers."""


def page(report: Report) -> str:
    """The report as a self-contained HTML page."""
    template = files("offmoe.report").joinpath("page.html").read_text(encoding="utf-8")
    assert template.count(DATA) == 1
    # "<" ends a script element and opens a comment; as an escape it is the same text to JSON and no markup to HTML.
    data = json.dumps(_data(report), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace(DATA, data.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def write_page(path: str, report: Report) -> None:
    """Write the page atomically."""
    target = Path(path)
    check_folder(target, f"-o {path}")
    try:
        with replacing(target) as temporary:
            temporary.write_text(page(report), encoding="utf-8")
    except OSError as error:
        raise OffmoeError(f"cannot write {path}: {error.strerror}. Free space or choose another path.") from error


def _data(report: Report) -> dict[str, Any]:
    return {
        "model": report.model or "unnamed model",
        "tokens": report.tokens,
        "requests": report.requests,
        "top_k": list(report.shape.top_k),
        "cards": _cards(report),
        "findings": findings(report),
        "missing": missing(report),
        "alert": ALERT,
        "min_expected": MIN_EXPECTED,
        "min_tokens": MIN_TOKENS,
        "clear": CLEAR,
        "layers": [
            {
                **{name: _rounded(value) for name, value in {**load.to_dict(), **vars(report.consistency[i])}.items()},
                "loads": load.routes.tolist(),
                "prefill": report.prefill.loads[i].routes.tolist(),
                "decode": report.decode.loads[i].routes.tolist(),
                "consecutive_prefill": _rounded(report.prefill.consecutive[i]),
                "consecutive_decode": _rounded(report.decode.consecutive[i]),
            }
            for i, load in enumerate(report.loads)
        ],
        "phases": {
            name: {key: _rounded(value) for key, value in phase.to_dict().items()}
            for name, phase in (("prefill", report.prefill), ("decode", report.decode))
        },
        "pairs": [_pairs(pair) for pair in report.coactivation],
        "types": _types(report),
    }


def _cards(report: Report) -> list[dict[str, str]]:
    means = report.overall()
    active = report.active
    chance = _shown(means["independent"])
    cards = [
        ("Gini of loads", _shown(means["gini"], "{:.2f}".format), "0 even, 1 one expert does all"),
        ("Busiest expert", _shown(means["busiest"], "{:.1f}x".format), "the mean, average of layers"),
        ("Alerts", str(len(report.alerts)), f"experts above {ALERT:g}x the mean"),
        ("Experts kept", _shown(means["consecutive"]), f"from token to token; chance {chance}"),
        ("Same token", _shown(means["same_token"]), f"meets the same experts; chance {chance}"),
        ("Active per token", percent(active.expert_bytes / active.expert_bytes_total), "of the expert weights"),
    ]
    levels = {"Alerts": "bad" if report.alerts else "good"}
    return [
        {"label": label, "value": value, "note": note, "level": levels.get(label, "")} for label, value, note in cards
    ]


def _pairs(pair: Coactivation) -> dict[str, Any]:
    rows = np.sort(np.argsort(-pair.before, kind="stable")[:PAIRED_EXPERTS])
    cols = np.sort(np.argsort(-pair.after, kind="stable")[:PAIRED_EXPERTS])
    return {
        "rows": rows.tolist(),
        "cols": cols.tolist(),
        "before": pair.before[rows].tolist(),
        "after": pair.after[cols].tolist(),
        "both": pair.both,
        "tokens": pair.tokens[np.ix_(rows, cols)].tolist(),
        "guessed": _rounded(pair.guessed),
        "by_popularity": _rounded(pair.by_popularity),
    }


def _types(report: Report) -> dict[str, Any] | None:
    specialization = report.specialization
    if specialization is None:
        return None
    return {
        "names": list(specialization.types),
        "meaning": [TYPES.get(name, f"letters of this script: {name}") for name in specialization.types],
        "tokens": list(specialization.types.values()),
        "routes": [routes.tolist() for routes in specialization.routes],
        "favorites": [
            [[[t.piece, t.routes, t.occurrences, _rounded(t.lift)] for t in tokens] for tokens in experts]
            for experts in specialization.favorites
        ],
        "strongest": [[s.layer, s.expert, s.type, s.routes, _rounded(s.lift)] for s in specialization.strongest()],
    }


def _rounded(value: object) -> object:
    """Rounded to four digits, which is more than a picture shows."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


_shown = partial(or_dash, dash="\u2013")
