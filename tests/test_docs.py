"""The documents are true: links lead somewhere, paths exist, figures that a script wrote are in place, one version."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

import offmoe

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_PATH = re.compile(r"`((?:offmoe|tests|tools|docs|examples)/[\w./-]+\.(?:py|md|csv|npz|json))`")


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=ids(TEXTS))
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = path if not name else path.parent / name
        assert file.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target} names no heading"


@pytest.mark.parametrize("path", TEXTS, ids=ids(TEXTS))
def test_named_files_exist(path: Path) -> None:
    names = set(NAMED_PATH.findall(path.read_text(encoding="utf-8")))
    assert not [
        name for name in sorted(names) if "NAME" not in name and "VERB" not in name and not (ROOT / name).exists()
    ]


def test_files_to_open_are_few() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Files to open")[1]
    limits = {"evicted": 3, "copy issued": 4, "Mixtral": 6, "device_memory": 5, "quantized format": 4}
    for word, limit in limits.items():
        row = next(line for line in table.splitlines() if word in line)
        assert len(NAMED_PATH.findall(row)) <= limit, row


@pytest.mark.parametrize("name", ["fits", "cards"])
def test_tables_are_those_that_were_written(name: str) -> None:
    with (ROOT / "docs" / "data" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert rows
    for row in rows:
        assert "| " + " | ".join(row.values()) + " |" in readme


def test_one_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {offmoe.__version__}\n" in citation
    assert f"\n## {offmoe.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert not re.search(r"^version = \"", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", TEXTS, ids=ids(TEXTS))
def test_lines_are_short(path: Path) -> None:
    """Rows of tables, generated pages and docs/quantized.md apart."""
    if path.name in ("families.md", "options.md", "cli.md", "quantized.md"):
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]
