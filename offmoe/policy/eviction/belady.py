"""Belady's MIN: the optimum, which knows the future. It runs on recorded traces only and has no registered name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offmoe.policy.eviction.base import NEVER, ScoredPolicy
from offmoe.types import Demand


class Belady(ScoredPolicy):
    """Evicts the key whose next access is the farthest away.

    It is the upper bound for caches that prefetch nothing and give every demanded expert a slot. Scores fall here,
    which the other policies' never do.
    """

    def __init__(self, accesses: Mapping[int, Sequence[int]]):
        """accesses: by key of the pool, the ascending indices of the pool's accesses that demand the key."""
        super().__init__({key: -float(indices[0]) if indices else NEVER for key, indices in accesses.items()})
        self._accesses = accesses
        self._next = dict.fromkeys(accesses, 0)
        self._now = -1

    def on_access(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._now += 1
        for key in keys:
            indices, following = self._accesses[key], self._next[key] + 1
            assert indices[following - 1] == self._now, "accesses differ from those Belady was built for"
            self._next[key] = following
            self.scores[key] = -float(indices[following]) if following < len(indices) else NEVER
            if key in self._residents:
                self.push(key)
