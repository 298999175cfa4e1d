"""How many sequences are decoded in step: as many as pay, while the KV cache has room.

A step of more sequences demands more experts, but fewer per token, and computes more. How throughput rises with the
number of sequences is measured in the first steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

FIRST = 16
"""Sequences to begin with. Prompts that begin together are prefilled together, which reads each expert once."""
MOST = 256
STEPS = 6
"""Steps whose median is compared."""
GAIN = 1.05
"""Throughput that twice as many sequences must reach. Steps of one width differ by up to 4 %."""


class WidthRate(NamedTuple):
    """What steps of one width gave: tokens per second, and experts demanded per token over all layers."""

    tokens_per_s: float
    experts_per_token: float


class BatchWidth:
    """The number of sequences to decode in step.

    Args:
        fixed: The number asked for; None: by measuring.
        most: Sequences that there are at most.
    """

    def __init__(self, fixed: int | None, most: int):
        self.limit = max(1, min(fixed or FIRST, most))
        """Sequences that may be under way now."""
        self._most = min(most, MOST)
        self._settled = fixed is not None
        self._steps: list[tuple[float, int]] = []
        self._best: tuple[float, int] = (0.0, self.limit)
        self.curve: dict[int, WidthRate] = {}
        """What was measured, by number of sequences."""

    def step(self, rows: int, seconds: float, demands: int) -> None:
        """Note a step in which nothing was prefilled.

        Args:
            rows: Sequences, which is also the number of tokens.
            seconds: What it took.
            demands: Experts that its layers demanded.
        """
        if rows != self.limit:
            self._steps.clear()
            return
        self._steps.append((seconds, demands))
        if len(self._steps) < STEPS:
            return
        rate = rows / max(statistics.median(s for s, _ in self._steps), 1e-9)
        if rows not in self.curve:
            self.curve[rows] = WidthRate(rate, sum(d for _, d in self._steps) / (rows * len(self._steps)))
        self._steps.clear()
        if not self._settled:
            self._choose(rate)

    def _choose(self, rate: float) -> None:
        if rate >= GAIN * self._best[0]:
            self._best = rate, self.limit
            self._settled = self.limit >= self._most
            self.limit = min(self._most, 2 * self.limit)
        else:
            self.limit, self._settled = self._best[1], True


Clock = Callable[[], float]
