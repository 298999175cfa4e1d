"""The curves of `offmoe tune --plot`: a self-contained HTML page with inline SVG, or a PNG if matplotlib is installed.

The page needs no script, font or network. Texts of a trace are foreign input and are escaped. matplotlib is no
dependency of offmoe.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from offmoe.errors import ConfigError, OffmoeError
from offmoe.files import check_folder, replacing
from offmoe.text import percent

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
    check_folder(target, f"--plot {path}")


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
    template = Template(files("offmoe.cli").joinpath("plot.html").read_text(encoding="utf-8"))
    title, note, drawing = escape(figure.title), escape(figure.note), "\n".join(_drawing(figure))
    return template.substitute(title=title, note=note, drawing=drawing, width=WIDTH, height=HEIGHT)


def _drawing(figure: Figure) -> list[str]:
    """The elements of the SVG: grid and axes, the chosen capacity, the curves, the legend."""
    slots = sorted({n for curve in figure.curves for n, _ in curve.points})
    low, high = slots[0], max(slots[-1], slots[0] + 1)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def x(n: float) -> float:
        return LEFT + (n - low) / (high - low) * (right - LEFT)

    def y(rate: float) -> float:
        return TOP + (1.0 - rate) * (bottom - TOP)

    parts = []
    for rate in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(_line(LEFT, y(rate), right, y(rate), 'class="grid"'))
        parts.append(_text(LEFT - 8, y(rate) + 4, f"{100 * rate:.0f} %", anchor="end"))
    shown = -1e9
    for n in slots:
        if x(n) - shown >= 22:  # omit labels that would touch
            shown = x(n)
            parts.append(_text(x(n), bottom + 20, str(n), anchor="middle"))
    parts.append(_text((LEFT + right) / 2, HEIGHT - 12, "slots per layer", anchor="middle"))
    chosen = x(figure.marked)
    parts.append(_line(chosen, TOP, chosen, bottom, 'class="mark"'))
    parts.append(_text(chosen + 5, bottom - 8, f"{figure.marked} slots"))
    colors = cycle(COLORS)
    labels = []
    for curve in figure.curves:
        look = 'class="bound"' if curve.is_bound else f'class="curve" style="color:{next(colors)}"'
        line = " ".join(f"{x(n):.1f},{y(rate):.1f}" for n, rate in curve.points)
        parts.append(f'<polyline {look} points="{line}"/>')
        for n, rate in curve.points:
            hint = f"<title>{escape(curve.name)}, {n} slots: {percent(rate)}</title>"
            parts.append(f'<circle {look} cx="{x(n):.1f}" cy="{y(rate):.1f}" r="3">{hint}</circle>')
        labels.append((_rate_at(curve, figure.marked), curve.name, look))
    return parts + _legend(sorted(labels, reverse=True), figure.marked)


def _legend(labels: list[tuple[float, str, str]], marked: int) -> list[str]:
    """Names of the curves with their hit rates at the chosen capacity, best first."""
    left = WIDTH - RIGHT + 16
    parts = [_text(left, TOP + 8, f"at {marked} slots")]
    for row, (rate, name, look) in enumerate(labels):
        level = TOP + 32 + 22 * row
        parts.append(_line(left, level - 4, left + 18, level - 4, look))
        parts.append(_text(left + 25, level, name, kind="label"))
        parts.append(_text(WIDTH - 8, level, f"{100 * rate:.1f}", kind="rate", anchor="end"))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, look: str) -> str:
    return f'<line {look} x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str = "faint", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


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
