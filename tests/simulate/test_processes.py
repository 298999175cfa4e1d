"""Tasks over processes: results keep their order, errors reach the caller, and no process stays behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from offmoe.errors import ConfigError, OffmoeError
from offmoe.simulate.processes import run_tasks


@dataclass(frozen=True)
class Times:
    by: int

    def __call__(self, material: list[int]) -> int:
        return material[0] * self.by


class Refuse:
    def __call__(self, material: list[int]) -> int:
        raise ConfigError("not with me")


class Die:
    def __call__(self, material: list[int]) -> int:
        os._exit(1)


def doubled(raw: int) -> list[int]:
    return [2 * raw]


@pytest.mark.parametrize("jobs", [1, 3])
def test_results_keep_their_order(jobs):
    assert run_tasks(doubled, 5, [Times(n) for n in range(7)], jobs) == [10 * n for n in range(7)]
    assert run_tasks(doubled, 5, [], jobs) == []
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("task", "error", "says"), [(Refuse(), ConfigError, "not with me"), (Die(), OffmoeError, "died")]
)
def test_failures_are_raised_and_nobody_stays(task, error, says):
    with pytest.raises(error, match=says):
        run_tasks(doubled, 5, [Times(1), task, Times(2)], 2)
    assert not multiprocessing.active_children()


class Interrupt:
    def __call__(self, material: list[int]) -> int:
        os.kill(os.getppid(), signal.SIGINT)
        return 0


class Sleep:
    def __call__(self, material: list[int]) -> int:
        time.sleep(60)
        return 0


def test_an_interrupt_ends_the_tasks_under_way():
    # A test run in the background inherits "ignored".
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_tasks(doubled, 5, [Sleep(), Interrupt(), Sleep()], 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 55, "the tasks would sleep for 60 s"
    assert not multiprocessing.active_children()


def unprepared(raw: int) -> list[int]:
    raise ConfigError("no material")


def test_an_error_of_preparing_is_raised():
    with pytest.raises(ConfigError, match="no material"):
        run_tasks(unprepared, 5, [Times(1), Times(2)], 2)


SWEEP = """
from tests.simulate.test_processes import Announce, doubled
from offmoe.simulate.processes import run_tasks
if __name__ == "__main__":
    run_tasks(doubled, 5, [Announce(), Announce()], 2)
"""


class Announce:
    def __call__(self, material: list[int]) -> int:
        os.write(1, f"{os.getpid()}\n".encode())
        time.sleep(60)
        return 0


def test_a_killed_parent_takes_its_processes_along(tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(SWEEP)
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    ) as parent:
        assert parent.stdout is not None
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
        parent.stdout.read()  # ends when no worker holds the pipe any more
    assert len(set(workers)) == 2
