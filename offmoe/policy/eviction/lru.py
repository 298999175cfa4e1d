"""LRU: evict the least recently used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offmoe.policy.eviction.base import Pool, ScoredPolicy, warm_scores
from offmoe.types import Demand


class LRU(ScoredPolicy):
    """Evicts the key whose last access is the longest ago. Experts of one access are equally recent.

    With counts of an earlier run, the more popular of two experts that were never accessed stays.
    """

    def __init__(self, earlier: Mapping[int, float] | None = None) -> None:
        """earlier: scores of keys before their first access, below 1."""
        super().__init__(earlier)
        self._now = 0.0

    @classmethod
    def for_pool(cls, pool: Pool) -> LRU:
        return cls(warm_scores(pool))

    def on_access(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._now = now = self._now + 1.0
        scores = self.scores
        for key in keys:
            scores[key] = now
