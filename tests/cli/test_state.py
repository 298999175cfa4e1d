"""`generate` begins where the last run of the same model ended, in a file of the user's cache folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from offmoe.cli.state_file import user_cache_folder
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
CPU = ("--device", "cpu", "--slots-per-layer", "4", "--max-new-tokens", "4", "--json")


def states(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.json"))


def test_one_state_per_model_is_kept_and_goes_on(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    first = offmoe("generate", checkpoint, "Once", *CPU)
    (path,) = states(tmp_path)
    assert path.parent == user_cache_folder() / "offmoe" / "state"
    assert path.name.startswith("mixtral-")
    tokens = json.loads(path.read_text())["tokens"]
    second = offmoe("generate", checkpoint, "Once", *CPU)
    assert second.json["text"] == first.json["text"]
    assert json.loads(path.read_text())["tokens"] > tokens
    assert states(tmp_path) == [path]
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    assert offmoe("generate", copy, "Once", *CPU).status == 0
    assert len(states(tmp_path)) == 2
    assert offmoe("generate", copy, "Once", *CPU, "--revision", "v2").status == 0
    assert len(states(tmp_path)) == 3


def test_the_fill_is_in_the_output(offmoe: Run, checkpoint: Path) -> None:
    fill = offmoe("generate", checkpoint, "Once", *CPU).json["fill"]
    assert fill.keys() == {"experts", "nbytes", "total_experts", "total_bytes", "running", "error"}
    assert 0 <= fill["experts"] <= fill["total_experts"] <= 12
    assert fill["error"] is None
    shown = offmoe("generate", checkpoint, "Once", *CPU[:-1])
    assert "in the background" in shown.err


def test_no_state_leaves_nothing(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    assert offmoe("generate", checkpoint, "Once", *CPU, "--no-state").status == 0
    assert states(tmp_path) == []


def test_another_file_may_hold_the_state(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    assert offmoe("generate", checkpoint, "Once", *CPU, "--state", tmp_path / "mine.json").status == 0
    assert json.loads((tmp_path / "mine.json").read_text())["format"] == "offmoe-state"
    assert states(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--state", "/no/such/folder/s.json"), "does not exist"),
        (("--state", "."), "is a folder"),
        (("--state", ""), "--state: the name of a file is missing"),
        (("--state", "s.json", "--no-state"), "use one of them"),
    ],
)
def test_options_that_cannot_be_used(offmoe: Run, checkpoint: Path, options: tuple[str, ...], message: str) -> None:
    outcome = offmoe("generate", checkpoint, "Once", *CPU, *options)
    assert (outcome.status, outcome.out) == (2, "")
    assert message in outcome.err


def test_a_damaged_state_is_said_in_one_line_and_replaced(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text("{")
    outcome = offmoe("generate", checkpoint, "Once", *CPU, "--state", path)
    assert outcome.status == 0
    assert outcome.err.count("is damaged") == 1
    assert json.loads(path.read_text())["version"] == 1


def test_a_file_that_is_no_state_is_never_replaced(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    for name, text in (("notes.txt", "hello"), ("other.json", '{"format": "something"}')):
        path = tmp_path / name
        path.write_text(text)
        outcome = offmoe("generate", checkpoint, "Once", *CPU, "--state", path)
        assert (outcome.status, outcome.out) == (2, "")
        assert "exists and is no state" in outcome.err
        assert path.read_text() == text


def test_a_state_that_cannot_be_kept_is_only_said(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    outcome = offmoe("generate", checkpoint, "Once", *CPU)
    assert outcome.status == 0
    assert "the state for the next run is not kept" in outcome.err


@pytest.mark.parametrize("verb", ["trace", "bench", "calibrate", "inspect"])
def test_verbs_that_measure_have_no_state(offmoe: Run, verb: str) -> None:
    outcome = offmoe(verb, "demo", "--state", "s.json")
    assert outcome.status == 2
    assert "--state" in outcome.err


def test_trace_depends_on_no_earlier_run(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    assert offmoe("generate", checkpoint, "Once", *CPU).status == 0
    (tmp_path / "prompts.txt").write_text("Once\n")
    stats = [
        offmoe("trace", checkpoint, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "t.npz", *CPU).json["stats"]
        for _ in range(2)
    ]
    for counts in stats:
        assert counts["filled"] == 0
    assert stats[0]["misses"] == stats[1]["misses"]


def test_where_the_cache_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache_folder() == tmp_path / ".cache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache_folder() == tmp_path / ".cache"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert user_cache_folder() == tmp_path / "Library" / "Caches"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    assert user_cache_folder() == tmp_path / "Local"


def test_simulate_says_what_the_fill_did(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    ran = offmoe("generate", checkpoint, "Once upon a time", *CPU, "--trace", path)
    filled = ran.json["stats"]["filled"]
    same = offmoe("simulate", path, "--json")
    assert same.json["stats"]["filled"] == filled
    assert same.json["stats"]["misses"] == ran.json["stats"]["misses"]
    if filled:
        assert f"{filled} slots were filled in the background" in same.err
        other = offmoe("simulate", path, "--json", "--slots-per-layer", "3")
        assert "another configuration is replayed without that" in other.err
