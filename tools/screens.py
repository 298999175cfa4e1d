#!/usr/bin/env python3
"""Make the pictures and the table of the README from real runs.

    .venv/bin/python tools/screens.py [screen] [fits] [cards] [plot]    (the plot needs matplotlib: pip install ...)

Writes docs/images/generate.svg (a run of `offmoe generate demo` as a terminal shows it), docs/images/hit-rate.svg (the
sweep of `offmoe tune` on the gpt-oss-20b recording of the tests) with its figures in docs/data/policies.csv, and
docs/data/fits.csv (what `offmoe inspect` plans for four models and five sizes of memory) and docs/data/cards.csv (what
it predicts for them on four graphics cards), with the tables between the markers in README.md.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

IMAGES = ROOT / "docs" / "images"
FITS = ROOT / "docs" / "data" / "fits.csv"
RATES = ROOT / "docs" / "data" / "policies.csv"
README = ROOT / "README.md"
CARDS = ROOT / "docs" / "data" / "cards.csv"

GENERATE = [
    *("generate", "demo", "And the LORD said unto", "--slots-per-layer", "4", "--max-new-tokens", "48", "--no-state"),
    *("--temperature", "0.7", "--seed", "3"),
]
TRACE = "tests/data/gptoss20b_6req.npz"
MODELS = {
    "Mixtral 8x7B": ("mixtral-8x7b", "native", "bf16"),
    "Mixtral 8x7B, int4": ("mixtral-8x7b", "int4", "int4"),
    "Qwen3-30B-A3B": ("qwen3-30b-a3b", "native", "bf16"),
    "Qwen3-30B-A3B, int4": ("qwen3-30b-a3b", "int4", "int4"),
    "gpt-oss-120b": ("gpt-oss-120b", "native", "MXFP4"),
    "DeepSeek-V3": ("deepseek-v3", "native", "FP8"),
}
FORMS = {
    "Mixtral 8x7B": ("mixtral-8x7b", {"bf16": "native bitwise", "int8": "int8 numeric", "int4": "int4 numeric"}),
    "Qwen3-30B-A3B": ("qwen3-30b-a3b", {"bf16": "native bitwise", "int8": "int8 numeric", "int4": "int4 numeric"}),
    "gpt-oss-120b": ("gpt-oss-120b", {"MXFP4": "native bitwise", "MXFP4, by kernels": "native numeric"}),
    "DeepSeek-V3": ("deepseek-v3", {"FP8": "native bitwise", "FP8, by kernels": "native numeric"}),
}
"""Models, their configurations, and the forms of their experts: name -> experts and exactness."""
GRAPHICS = {
    "8 GiB (RTX 4060)": "rtx-4060-8g",
    "12 GiB (RTX 3060)": "rtx-3060-12g",
    "16 GiB (RTX 4060 Ti)": "rtx-4060-ti-16g",
    "24 GiB (RTX 3090)": "rtx-3090-24g",
}
BESIDE = "ddr4-3200-64g+nvme-gen4"
"""RAM and disk of the machines with these cards."""
CARD_CONTEXT_TOKENS = 4096
MEMORY_GIB = (8, 12, 16, 24, 48)
CONTEXT_TOKENS = 2048
RAM_ONLY = "ddr4-3200"
"""A machine without a GPU, so that nothing is probed. Its RAM follows from the memory that is asked for."""


def offmoe(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "offmoe", *arguments]


def terminal(arguments: list[str], columns: int) -> str:
    """What a command writes to a terminal of this width, escape sequences included."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "60"}
    process = subprocess.Popen(
        offmoe(*arguments), stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=environment, close_fds=True
    )
    os.close(slave)
    written = io.BytesIO()
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux reports the closed terminal as EIO
            break
        if not piece:
            break
        written.write(piece)
    os.close(master)
    if process.wait() != 0:
        raise SystemExit(written.getvalue().decode(errors="replace"))
    return written.getvalue().decode().replace("\r\n", "\n")


def screen(arguments: list[str], target: Path, columns: int = 118) -> None:
    """A run as an SVG picture of a terminal."""
    from rich.console import Console
    from rich.text import Text

    shown = " ".join(f'"{part}"' if " " in part else part for part in arguments)
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ offmoe {shown}", style="bold"))
    console.print(Text.from_ansi(terminal(arguments, columns)))
    drawing = console.export_svg(title="offmoe", unique_id="screen")
    drawing = re.sub(r"@font-face \{.*?\}\n", "", drawing, flags=re.DOTALL)  # they would be fetched from elsewhere
    target.write_text(drawing, encoding="utf-8")


def hit_rates(target: Path) -> None:
    """Hit rate over slots per layer, for every policy and the optimum, as `offmoe tune` finds them."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    sizes = (4, 6, 8, 12, 16, 24)
    listed = ",".join(map(str, sizes))
    command = ("tune", TRACE, "--capacities", listed, "--scope", "layer", "--on-miss", "fetch", "--prefetch", "0")
    run = subprocess.run(offmoe(*command, "--json"), cwd=ROOT, check=True, capture_output=True, text=True)
    facts = json.loads(run.stdout.splitlines()[-1])
    curves: dict[str, list[tuple[int, float]]] = {}
    for candidate in facts["candidates"]:
        if isinstance(candidate["slots_per_layer"], int):  # a list is a candidate with unequal quotas
            point = (candidate["slots_per_layer"], 100 * candidate["hit_rate"])
            curves.setdefault(candidate["eviction"], []).append(point)
    optimum = [(bound["slots_per_layer"], 100 * bound["belady"]) for bound in facts["bounds"]]
    bypass = [(bound["slots_per_layer"], 100 * bound["belady_bypass"]) for bound in facts["bounds"]]
    uniform = [(bound["slots_per_layer"], 100 * bound["uniform"]) for bound in facts["bounds"]]
    write_rates({**curves, "belady": optimum, "belady-bypass": bypass})

    matplotlib.rcParams.update({"svg.hashsalt": "offmoe", "font.size": 10, "axes.spines.top": False})
    figure, axes = pyplot.subplots(figsize=(7.2, 3.8), layout="constrained")
    axes.spines["right"].set_visible(False)
    axes.plot(*zip(*optimum, strict=True), color="black", linestyle="--", linewidth=1.2, label="optimum (Belady)")
    for name in ("aged-lfu", "s3-fifo", "lru-2", "sieve", "lru", "static"):
        strong = name == "aged-lfu"
        axes.plot(
            *zip(*sorted(curves[name]), strict=True),
            marker="o",
            markersize=4 if strong else 3,
            linewidth=2.4 if strong else 1.1,
            alpha=1.0 if strong else 0.75,
            label=f"{name} (default)" if strong else name,
        )
    axes.plot(*zip(*uniform, strict=True), color="gray", linestyle=":", linewidth=1.2, label="if routing were uniform")
    axes.set(xlabel="slots per layer, of 32 experts", ylabel="hit rate, %", xticks=sizes, ylim=(0, 100))
    axes.set_title("gpt-oss-20b, top-4 of 32 experts, 24 layers, 2,636 decoded tokens", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(target, metadata={"Date": None})


def write_rates(curves: dict[str, list[tuple[int, float]]]) -> None:
    with RATES.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("routing", "policy", "slots", "experts", "hit_rate"))
        for name, points in curves.items():
            writer.writerows(("gpt-oss-20b", name, slots, 32, f"{rate:.1f}") for slots, rate in sorted(points))


def inspected(config: str, *options: str) -> dict[str, Any]:
    """The JSON object of `offmoe inspect`, in this process: a new one would take longer to start than to inspect."""
    from offmoe.cli import main

    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(io.StringIO()):
        main(["inspect", str(ROOT / "tests" / "data" / "configs" / f"{config}.json"), *options, "--json"])
    facts: dict[str, Any] = json.loads(said.getvalue().splitlines()[-1])  # written also where the model does not fit
    return facts


def fits() -> list[dict[str, str]]:
    """What fits, for every model and size of memory: one row per model, as `offmoe inspect` plans it for a CPU."""
    rows = []
    for name, (config, experts, form) in MODELS.items():
        row = {"model": name, "experts": form}
        for gib in MEMORY_GIB:
            memory = ("--device-memory", f"{gib}GiB", "--max-context", str(CONTEXT_TOKENS))
            facts = inspected(config, "--experts", experts, "--machine", RAM_ONLY, *memory)
            row["size"] = gibibytes(facts["expert_bytes_total"] + facts["dense_bytes"])
            row["smallest"] = gibibytes(facts["smallest_device_memory"], 1)
            if facts["plan"] is None:
                row[f"{gib} GiB"] = "no"
                continue
            plan = facts["plan"]
            slots = plan["slots_per_layer"]
            share = sum(slots) / (len(slots) * facts["experts"])
            row[f"{gib} GiB"] = f"{share:.0%}" + (f" ({plan['parked_layers']} L)" if plan["parked_layers"] else "")
        rows.append(row)
    return rows


def cards() -> list[dict[str, str]]:
    """Predicted speeds of every model, form and card: one row per model and form, as `offmoe inspect` predicts them."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, (config, forms) in FORMS.items():
        for column, card in GRAPHICS.items():
            machine = ("--machine", f"{card}+{BESIDE}", "--max-context", str(CARD_CONTEXT_TOKENS))
            ways = inspected(config, *machine)["choices"]
            by_form = {f"{way['experts']} {way['exactness']}": way for way in ways}
            for form, key in forms.items():
                row = rows.setdefault((name, form), {"model": name, "experts": form})
                row[column] = cell(by_form[key])
    return list(rows.values())


def cell(way: dict[str, Any]) -> str:
    """A prediction in short: tokens/s, those without misses, and the share of resident experts."""
    if not way["fits"]:
        return f"needs {gibibytes(way['smallest_device_memory'], 1)}"
    speed, most = way["predicted_tokens_per_s"], way["predicted_most_tokens_per_s"]
    ends = dict.fromkeys((f"{speed:.2g}", f"{most:.2g}"))
    return f"{' to '.join(ends)} ({way['resident']:.0%})"


def gibibytes(size: int, digits: int = 0) -> str:
    return f"{size / 2**30:.{digits}f} GiB"


def write_table(rows: list[dict[str, str]], target: Path, headings: dict[str, str]) -> None:
    """Write rows as CSV, and into README.md between the markers that are named after the file."""
    columns = list(rows[0])
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        "| " + " | ".join(headings.get(column, column) for column in columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row[column] for column in columns) + " |" for row in rows),
    ]
    begin, close = f"<!-- {target.stem}: written by tools/screens.py -->", f"<!-- {target.stem}: end -->"
    text = README.read_text(encoding="utf-8")
    start, end = text.index(begin) + len(begin), text.index(close)
    README.write_text(text[:start] + "\n" + "\n".join(lines) + "\n" + text[end:], encoding="utf-8")


PARTS = {
    "screen": lambda: screen(GENERATE, IMAGES / "generate.svg"),
    "fits": lambda: write_table(fits(), FITS, {"size": "whole model", "smallest": "needs at least"}),
    "cards": lambda: write_table(cards(), CARDS, {}),
    "plot": lambda: hit_rates(IMAGES / "hit-rate.svg"),
}


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    FITS.parent.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
