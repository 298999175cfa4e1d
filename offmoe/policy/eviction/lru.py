"""LRU: evict the least recently used."""

from __future__ import annotations

from collections.abc import Sequence

from offmoe.policy.eviction.base import ScoredPolicy
from offmoe.types import Demand


class LRU(ScoredPolicy):
    """Evicts the key whose last access is the longest ago. Experts of one access are equally recent."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def on_access(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._now = now = self._now + 1.0
        scores = self.scores
        for key in keys:
            scores[key] = now
