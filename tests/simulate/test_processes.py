"""Work over processes: results in order, errors raised here, nobody left behind."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass

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
