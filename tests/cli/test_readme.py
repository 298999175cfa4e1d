"""The README's commands and its Python, run as they stand: only placeholders are filled in."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from offmoe.cli import VERBS
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PLACEHOLDERS = {"MODEL": "demo", "PROMPT": "And the LORD", "FILE": "prompts.txt", "OUT": "packed"}
LONG = {
    "calibrate": ("--seconds", "1"),
    "bench": ("--rounds", "1", "--new-tokens", "4", "--device-memory", "40MiB"),
    "verify": ("--new-tokens", "1", "--only", "stock,few-slots"),
    **dict.fromkeys(("batch", "chat", "generate", "trace"), ("--max-new-tokens", "8")),
}
"""Per verb that would take long, options that make it short."""


def calls() -> list[list[str]]:
    """The words of every command `offmoe ...` in a block, without the explanation behind it."""
    out = []
    for line in (line for language, block in BLOCKS if not language for line in block.splitlines()):
        if match := re.match(r"(?:tools/)?offmoe (\w+)(?: {1,6}(\S.*))?", line):
            verb, rest = match[1], re.split(r" {2,}", match[2] or "")[0]
            words = [PLACEHOLDERS.get(word, word) for word in shlex.split(rest)]
            out.append([verb, *words, *LONG.get(verb, ())])
    return out


def test_every_verb_is_shown() -> None:
    assert {call[0] for call in calls()} == set(VERBS)


def test_commands_run_one_after_the_other(offmoe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one folder, since later ones read what earlier ones write."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("And the LORD said unto\n")
    (tmp_path / "IN.jsonl").write_text('{"prompt": "And the LORD"}\n')
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for call in calls():
        if call[0] == "serve":  # does not end; tests/cli/test_serve.py runs it
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO("And the LORD\n"))
        outcome = offmoe(*call)
        assert outcome.status == 0, (call, outcome.err)


def test_python_runs() -> None:
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
