"""The number of sequences in step follows the throughput that was measured."""

from __future__ import annotations

from collections.abc import Callable

from offmoe.rows.width import FIRST, STEPS, BatchWidth


def measured(width: BatchWidth, seconds: Callable[[int], float], rounds: int = 12) -> list[int]:
    """The limits after each round of steps that take `seconds(rows)`."""
    limits = []
    for _ in range(rounds):
        rows = width.limit
        for _ in range(STEPS):
            width.step(rows, seconds(rows), demands=3 * rows)
        limits.append(width.limit)
    return limits


def test_width_doubles_while_throughput_rises() -> None:
    """Reading costs 1 s a step however many rows there are; computing 10 ms per row."""
    limits = measured(BatchWidth(None, 10_000), lambda rows: 1.0 + 0.01 * rows)
    assert limits[:3] == [2 * FIRST, 4 * FIRST, 8 * FIRST]
    assert max(limits) == limits[-1] == 256


def test_width_goes_back_when_computing_binds() -> None:
    width = BatchWidth(None, 10_000)
    limits = measured(width, lambda rows: 0.01 * rows)
    assert limits == [2 * FIRST] + [FIRST] * 11
    assert sorted(width.curve) == [FIRST, 2 * FIRST]
    assert width.curve[FIRST].experts_per_token == 3


def test_a_number_that_was_asked_for_stays() -> None:
    assert measured(BatchWidth(5, 100), lambda rows: 1.0) == [5] * 12


def test_there_are_no_more_rows_than_prompts() -> None:
    assert BatchWidth(None, 3).limit == 3
    assert BatchWidth(64, 3).limit == 3


def test_steps_that_are_not_full_say_nothing() -> None:
    width = BatchWidth(None, 100)
    for _ in range(10 * STEPS):
        width.step(FIRST - 1, 1.0, 1)
    assert width.limit == FIRST
    assert width.curve == {}
