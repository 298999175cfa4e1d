"""Counts and times of the engine, for /metrics and the live page."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from itertools import accumulate

TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Histogram:
    """Counts of values by upper bounds, as Prometheus has them."""

    def __init__(self, bounds: tuple[float, ...]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, int]]:
        """Each bound as text, with the number of values up to it; the last bound is "+Inf"."""
        names = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True))


class Meters:
    """What the engine has done since it began. Written by its threads, read by any."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.answers: Counter[str] = Counter()
        """Answers by how they ended."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.new_tokens = 0
        self.ttft_s = Histogram(TTFT_S)
        self.token_s = Histogram(TOKEN_S)

    def began(self, prompt: int, cached: int) -> None:
        with self.lock:
            self.prompt_tokens += prompt
            self.cached_tokens += cached

    def token(self, seconds: float, is_first: bool) -> None:
        """Count a token. seconds: since the request came for the first one, else since the token before."""
        with self.lock:
            self.new_tokens += 1
            (self.ttft_s if is_first else self.token_s).add(seconds)

    def ended(self, how: str) -> None:
        with self.lock:
            self.answers[how] += 1
