"""LRU-K for K = 2 (O'Neil et al., SIGMOD 1993): evict by the access before the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offmoe.policy.eviction.base import Pool, ScoredPolicy, warm_scores
from offmoe.types import Demand


class LRU2(ScoredPolicy):
    """Evicts the key whose last access but one is the longest ago; keys accessed once go first.

    Accesses are remembered across evictions. A step of many tokens is one access, but an expert that several of its
    tokens are routed to counts as accessed more than once. With counts of an earlier run, an expert has been accessed
    twice before the first access, the later the more popular it was.
    """

    def __init__(self, earlier: Mapping[int, float] | None = None) -> None:
        """earlier: scores of keys before their first access, below 1."""
        super().__init__(earlier)
        self._last_access: dict[int, float] = {}
        self._now = 0.0

    @classmethod
    def for_pool(cls, pool: Pool) -> LRU2:
        return cls(warm_scores(pool))

    def on_access(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._now = now = self._now + 1.0
        scores, last_access = self.scores, self._last_access
        for key, demand in zip(keys, demands, strict=True):
            scores[key] = last_access.get(key, scores[key]) if demand.tokens == 1 else now
            last_access[key] = now
