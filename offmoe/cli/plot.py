"""The curves of `offmoe tune --plot`: a self-contained HTML page with inline SVG, or a PNG if matplotlib is installed.

The page needs no script, font or network. Texts of a trace are foreign input and are escaped. matplotlib is no
dependency of offmoe.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from offmoe.errors import ConfigError, OffmoeError
from offmoe.files import replacing

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 24, 56
COLORS = ("#2f6fde", "#d9480f", "#2b8a3e", "#9c36b5", "#b08900", "#0b7285")


class Curve(NamedTuple):
    """Hit rate (a share) over slots per layer; bounds are drawn dashed and gray."""

    name: str
    points: Sequence[tuple[int, float]]
    is_bound: bool = False


class Figure(NamedTuple):
    title: str
    note: str
    curves: Sequence[Curve]
    marked: int
    """The chosen capacity."""


def check_plot(path: str) -> None:
    """ConfigError for a path that cannot be plotted to, before the sweep begins."""
    target = Path(path)
    if target.suffix not in (".html", ".png"):
        raise ConfigError(f"--plot {path}: the name must end in .html or .png.")
    if target.suffix == ".png" and find_spec("matplotlib") is None:
        raise ConfigError(f"--plot {path}: PNG needs matplotlib; 'pip install matplotlib', or use a name in .html.")
    if not target.parent.is_dir():
        raise ConfigError(f"--plot {path}: the folder does not exist; create it first.")


def write_plot(path: str, figure: Figure) -> None:
    """Write the figure, whole or not at all."""
    target = Path(path)
    try:
        with replacing(target) as temporary:
            if target.suffix == ".png":
                _png(temporary, figure)
            else:
                temporary.write_text(page(figure), encoding="utf-8")
    except OSError as error:
        raise OffmoeError(f"cannot write {path}: {error.strerror}. Free space or choose another path.") from error


def page(figure: Figure) -> str:
    """The figure as an HTML page."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(figure.title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --ink: #1c1e21; --faint: #8a9099; --line: #d9dce1; --paper: #ffffff; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e8eb; --faint: #8d949e; --line: #33373d; --paper: #15171a; }} }}
body {{ background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: {WIDTH}px; padding: 0 1rem; }}
h1 {{ font-size: 1.25rem; margin: 0; }}
p {{ color: var(--faint); margin: .3rem 0 1rem; }}
svg {{ width: 100%; height: auto; display: block; }}
svg text {{ font: 12px system-ui, sans-serif; fill: var(--ink); }}
svg text.faint {{ fill: var(--faint); }}
svg .grid {{ stroke: var(--line); }}
svg .bound {{ stroke: var(--faint); stroke-dasharray: 5 4; }}
svg .mark {{ stroke: var(--faint); stroke-dasharray: 2 3; }}
svg circle.bound {{ fill: var(--faint); stroke: none; }}
svg text.label {{ font-weight: 600; }}
</style></head><body>
<h1>{escape(figure.title)}</h1>
<p>{escape(figure.note)}</p>
{_svg(figure)}
</body></html>
"""


def _svg(figure: Figure) -> str:
    slots = sorted({n for curve in figure.curves for n, _ in curve.points})
    low, high = slots[0], max(slots[-1], slots[0] + 1)

    def x(n: float) -> float:
        return LEFT + (n - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(rate: float) -> float:
        return TOP + (1.0 - rate) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(figure.title)}">']
    for tenth in range(0, 11, 2):
        level = y(tenth / 10)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text class="faint" x="{LEFT - 8}" y="{level + 4:.1f}" text-anchor="end">{tenth * 10} %</text>')
    shown = -1e9
    for n in slots:
        if x(n) - shown >= 22:  # omit labels that would touch
            shown = x(n)
            parts.append(
                f'<text class="faint" x="{x(n):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{n}</text>'
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="faint" x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">slots per layer</text>')
    at = x(figure.marked)
    parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text class="faint" x="{at + 5:.1f}" y="{HEIGHT - BOTTOM - 8}">{figure.marked} slots</text>')
    colors = iter(COLORS * (1 + len(figure.curves) // len(COLORS)))
    labels = []
    for curve in figure.curves:
        color = "" if curve.is_bound else f' style="stroke:{(own := next(colors))}"'
        dots = "" if curve.is_bound else f' style="fill:{own}"'
        kind = ' class="bound"' if curve.is_bound else ""
        line = " ".join(f"{x(n):.1f},{y(rate):.1f}" for n, rate in curve.points)
        parts.append(f'<polyline{kind} points="{line}" fill="none" stroke-width="2"{color}/>')
        for n, rate in curve.points:
            hint = f"{escape(curve.name)}, {n} slots: {100 * rate:.1f} %"
            parts.append(f'<circle{kind} cx="{x(n):.1f}" cy="{y(rate):.1f}" r="3"{dots}><title>{hint}</title></circle>')
        labels.append((_rate_at(curve, figure.marked), curve.name, "" if curve.is_bound else own))
    parts += _legend(labels, figure.marked)
    return "\n".join([*parts, "</svg>"])


def _legend(labels: list[tuple[float, str, str]], marked: int) -> list[str]:
    """Names of the curves with their hit rates at the chosen capacity, best first."""
    left = WIDTH - RIGHT + 16
    parts = [f'<text class="faint" x="{left}" y="{TOP + 8}">at {marked} slots</text>']
    for row, (rate, name, color) in enumerate(sorted(labels, reverse=True)):
        level = TOP + 32 + 22 * row
        style = f' style="stroke:{color}"' if color else ' class="bound"'
        parts.append(f'<line x1="{left}" x2="{left + 18}" y1="{level - 4}" y2="{level - 4}" stroke-width="2"{style}/>')
        parts.append(f'<text class="label" x="{left + 25}" y="{level}">{escape(name)}</text>')
        parts.append(f'<text x="{WIDTH - 8}" y="{level}" text-anchor="end">{100 * rate:.1f}</text>')
    return parts


def _rate_at(curve: Curve, slots: int) -> float:
    """The hit rate at the nearest point that is not above `slots`, else at the first."""
    return max((point for point in curve.points if point[0] <= slots), default=curve.points[0])[1]


def _png(path: Path, figure: Figure) -> None:
    canvas: Any = import_module("matplotlib.backends.backend_agg")
    drawing: Any = import_module("matplotlib.figure").Figure(figsize=(9, 5.5), layout="constrained")
    canvas.FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    dashes = cycle(("--", "-.", ":"))  # lines carry no labels, so the bounds differ by their dashes
    for curve in figure.curves:
        style = {"linestyle": next(dashes), "color": "0.4"} if curve.is_bound else {"marker": "o"}
        axes.plot([n for n, _ in curve.points], [100 * r for _, r in curve.points], label=curve.name, **style)
    axes.axvline(figure.marked, color="0.7", linestyle=":")
    axes.set(xlabel="slots per layer", ylabel="hit rate, %", title=figure.title, ylim=(0, 100))
    axes.legend()
    drawing.savefig(path, format="png", dpi=150)
