"""Every example runs on the demo model and prints what its first line promises."""

from __future__ import annotations

import importlib.util
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the `main` of an example with these arguments; returns what it printed."""

    def call(name: str, *arguments: str) -> str:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        module.main()
        return capsys.readouterr().out

    return call


def test_generate(run: Run) -> None:
    out = run("generate", "--new-tokens", "4")
    assert out.startswith("And the LORD said unto")
    assert re.search(r"hit rate \d+\.\d%, \d+ misses, \d+\.\d MB read", out)


def test_chat_loop(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("And the LORD said\nunto\n"))
    out = run("chat_loop", "--new-tokens", "4")
    assert len(re.findall(r"\[hit rate \d+\.\d%, waited \d+\.\d\d s for experts\]", out)) == 2


def test_tune(run: Run) -> None:
    out = run("tune", "--new-tokens", "4")
    recorded = re.search(r"recorded: \d+ tokens, hit rate (\d+\.\d%)", out)
    replayed = re.search(r"replayed: hit rate (\d+\.\d%)", out)
    assert recorded is not None
    assert replayed is not None
    assert recorded[1] == replayed[1]
    assert re.search(r"^6 slots: aged-lfu .*%, lru .*%, optimum .*%$", out, re.MULTILINE)


def test_several_prompts(run: Run) -> None:
    out = run("several_prompts", "--new-tokens", "4")
    assert "And the LORD said unto" in out
    assert "def read(self, size=-1):" in out
    assert re.search(r"\d+ misses for 3 prompts, \d+\.\d MB read", out)


def test_every_example_is_tested() -> None:
    tested = set(re.findall(r'run\("(\w+)"', Path(__file__).read_text()))
    elsewhere = {"custom_policy"}  # tests/examples/test_custom_policy.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} - elsewhere == tested
