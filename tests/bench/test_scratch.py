"""Scratch folders: locked while they are used, removed at the end, or by the next run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import offmoe
from offmoe.bench import scratch
from offmoe.bench.scratch import LOCK, TERMINATED, ended_by_sigterm, scratch_folder

HOLD = """
import signal, sys
from offmoe.bench.scratch import ended_by_sigterm, scratch_folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands down "ignored"
with ended_by_sigterm(), scratch_folder("offmoe-test-", sys.argv[1]) as folder:
    (folder / "large").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""


def holding(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that has a folder, and the folder."""
    root = Path(offmoe.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process, folder = holding(tmp_path)
    assert (folder / "large").exists()
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (TERMINATED if number == signal.SIGTERM else -signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path) -> None:
    process, folder = holding(tmp_path)
    others = [tmp_path / "offmoe-test-notes", tmp_path / "else"]
    for other in others:
        other.mkdir()
    with scratch_folder("offmoe-test-", tmp_path) as mine:
        assert folder.exists(), "its process lives"
        assert mine != folder
    process.kill()
    process.communicate(timeout=30)
    with scratch_folder("offmoe-test-", tmp_path) as mine:
        assert sorted(tmp_path.iterdir()) == sorted([mine, *others])
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_without_locks_only_the_own_folder_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "offmoe-test-old"
    old.mkdir()
    (old / LOCK).touch()
    monkeypatch.setattr(scratch, "fcntl", None)
    with scratch_folder("offmoe-test-", tmp_path) as mine:
        (mine / "file").touch()
    assert list(tmp_path.iterdir()) == [old]


def test_a_handler_of_the_caller_stays() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ended_by_sigterm():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
