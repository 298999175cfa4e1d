"""Cases that cover every pair of values of several factors: far fewer than their product."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def product(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool]) -> list[Case]:
    """Every case that is allowed."""
    cases = (dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values()))
    return [case for case in cases if allowed(case)]


def pairwise(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool]) -> list[Case]:
    """Few cases that together cover every pair that some allowed case covers; always the same ones."""
    numbers: dict[object, int] = {}

    def covers(case: Case) -> int:
        """A bit for each pair of values."""
        return sum(1 << numbers.setdefault(pair, len(numbers)) for pair in itertools.combinations(case.items(), 2))

    every = [(case, covers(case)) for case in product(factors, allowed)]
    left = (1 << len(numbers)) - 1
    chosen = []
    while left:
        best, covered = max(every, key=lambda each: (each[1] & left).bit_count())  # the first of equals
        left &= ~covered
        chosen.append(best)
    return chosen
