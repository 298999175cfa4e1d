"""Static: evict the least popular, by counts of an earlier run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from offmoe.policy.eviction.base import Pool, ScoredPolicy
from offmoe.types import Demand


class Static(ScoredPolicy):
    """Evicts the key with the lowest popularity, which never changes during a run.

    Published systems pin the popular experts and pass the others through a buffer. Here every demanded expert takes a
    slot (on_miss="fetch"), so at least one slot of a pool changes hands.
    """

    def __init__(self, popularity: Mapping[int, float]):
        """popularity: by key; the higher the number, the longer the key stays."""
        super().__init__({key: float(value) for key, value in popularity.items()})

    @classmethod
    def for_pool(cls, pool: Pool) -> Static:
        popularity = list(chain.from_iterable(pool.options.popularity_of(pool.shape)))
        return cls({key: popularity[key] for key in pool.keys})

    def on_access(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        pass
