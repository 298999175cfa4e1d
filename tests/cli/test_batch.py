"""offmoe batch: files in and out, exit statuses, and a process that is killed in mid-run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome

pytest.importorskip("starlette", reason="the extra offmoe[serve] is not installed")
pytest.importorskip("openai", reason="the extra offmoe[serve] is not installed")


def write(path: Path, *requests: object) -> Path:
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def test_the_exit_status_tells_whether_all_lines_have_answers(tmp_path: Path, offmoe: Callable[..., Outcome]) -> None:
    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, {"prompt": "And the LORD said", "temperature": 0, "max_tokens": 3}, {"prompt": "x", "best_of": 3})
    command = ("batch", "demo", source, "-o", results, "--no-state", "--device", "cpu", "--json")
    outcome = offmoe(*command)
    assert (outcome.status, outcome.json["lines"], outcome.json["new_tokens"]) == (1, 2, 3)
    assert "1 of 2 lines have an error" in outcome.err
    write(source, {"prompt": "And the LORD said", "temperature": 0, "max_tokens": 3})
    assert offmoe(*command).status == 2  # the file holds a result of a line that is gone
    results.unlink()
    outcome = offmoe(*command)
    assert (outcome.status, outcome.json["new_tokens"]) == (0, 3)
    outcome = offmoe(*command)
    assert (outcome.status, outcome.json["lines"], outcome.json["new_tokens"]) == (0, 0, 0)
    outcome = offmoe(*command, "--max-new-tokens", 7)
    assert outcome.status == 2
    assert "other options" in outcome.err


def test_files_that_cannot_be_used_are_refused_before_the_model_is_loaded(
    tmp_path: Path, offmoe: Callable[..., Outcome]
) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "x"})
    os.link(source, tmp_path / "linked")
    for options, words in (
        ((source, "-o", tmp_path / "linked"), "the same file"),
        ((tmp_path / "absent", "-o", tmp_path / "out"), "cannot be read"),
        ((source, "-o", source), "the same file"),
        ((source, "-o", tmp_path / "no" / "out"), "does not exist"),
        ((source, "-o", tmp_path), "is a folder"),
    ):
        outcome = offmoe("batch", "demo", *options, "--no-state")
        assert outcome.status == 2
        assert words in outcome.err.splitlines()[-1]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_file(tmp_path: Path) -> None:
    requests = [{"prompt": f"Chapter {i}", "temperature": 0.8, "seed": i, "max_tokens": 4 + i} for i in range(30)]
    source = write(tmp_path / "in.jsonl", *requests)
    os.utime(source, (7, 7))

    def start(results: Path) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "offmoe",
            "batch",
            "demo",
            str(source),
            "-o",
            str(results),
            "--batch-size",
            "4",
        ]
        return subprocess.Popen([*command, "--no-state"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert start(whole).wait() == 0
    with start(killed) as process:
        while process.poll() is None and not (killed.exists() and killed.read_bytes().count(b"\n") >= 5):
            time.sleep(0.01)
        process.kill()
    assert 5 <= killed.read_bytes().count(b"\n") < 30
    assert start(killed).wait() == 0
    assert killed.read_bytes() == whole.read_bytes()
