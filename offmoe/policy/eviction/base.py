"""What an eviction policy is, and the base class of those that evict the key with the lowest score.

A policy decides from accesses alone: it never sees tensors, clocks or files, so that the same object runs in the
runtime and in the simulator. It costs O(log n) per access and per victim, amortized, and never scans the slots: a
scanning LFU cost 2.9 ms per layer at 1,500 slots.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from offmoe.config import CacheOptions
from offmoe.types import CacheShape, Demand

NEVER = -math.inf
"""Score of a key that was never accessed."""
SPARE_ENTRIES = 64
"""Stale heap entries that are kept beyond four per resident before the heap is rebuilt."""


class Pool(NamedTuple):
    """The experts that share slots, for which one policy decides.

    keys: those of one MoE layer (scope="layer") or of all (scope="model"). num_layers: the MoE layers among them.
    """

    keys: range
    num_layers: int
    options: CacheOptions
    shape: CacheShape


def warm_scores(pool: Pool) -> dict[int, float]:
    """By key, log2 of the share of the tokens that the expert served in an earlier run; {} without one.

    At most 0, so that a policy which numbers accesses from 1 keeps what was accessed since. Of gpt-oss-20b's first 64
    tokens after a background fill, LRU-2 hits 0.0 to 0.7 points more with them than without at 6 to 24 of 32 slots, LRU
    up to 0.3. S3-FIFO and SIEVE gained nothing (docs/log.md).
    """
    counts = pool.options.warm_counts_of(pool.shape)
    if counts is None:
        return {}
    shares = list(chain.from_iterable(counts))
    return {key: math.log2(min(1.0, shares[key])) for key in pool.keys if shares[key] > 0}


class EvictionPolicy(ABC):
    """Chooses which resident expert gives up its slot. Subclass it to write a policy of your own.

    One instance serves one pool of slots. It sees keys: small ints, one per expert of the model (`first_key[layer] +
    expert` of `CacheShape`). The planner calls `on_access` for every access, then `on_insert` and `on_evict` for every
    key that gets or loses a slot. A policy must be deterministic: the same calls give the same victims.
    """

    ranks_by_score = False
    """Whether the next victims are the resident keys of the lowest scores. An access that demands none of them, and
    evicts nothing, leaves them the next victims then, in the same order."""

    @classmethod
    def for_pool(cls, pool: Pool) -> EvictionPolicy:
        """The policy of one pool. Override it if the policy depends on options or on the shape of the model."""
        return cls()

    @abstractmethod
    def on_access(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        """A layer demands experts in one step.

        Args:
            keys: ascending, resident or not.
            demands: demands[i] says how many tokens are routed to keys[i].
            tail: rows of the step that `tail_tokens` are counted in; 1 when a single token is decoded.
        """

    @abstractmethod
    def on_insert(self, key: int) -> None:
        """A key has been given a slot."""

    @abstractmethod
    def on_evict(self, key: int) -> None:
        """A key has lost its slot."""

    @abstractmethod
    def choose_victim(self, protected: Collection[int]) -> int:
        """The resident key to evict.

        Asking changes nothing: the planner also asks to compare, and evicts nothing then. What a policy does because
        it evicts (moving a hand, spending a second chance), it does in `on_evict`.

        Args:
            protected: keys that must not be chosen. At least one resident key is not among them.
        """

    def rank_victims(self, count: int) -> list[int]:
        """The keys that `choose_victim` gives one after the other, if each is protected from then on.

        Asking changes nothing.

        Args:
            count: at most the number of resident keys.
        """
        chosen: dict[int, None] = {}
        while len(chosen) < count:
            chosen[self.choose_victim(chosen)] = None
        return list(chosen)

    @abstractmethod
    def score(self, key: int) -> float:
        """The value of a key, resident or not; compared with scores of this policy only.

        A step that needs more experts than there are slots keeps those with the highest scores. A score changes only
        in `on_access` of its own key, and only rises there.
        """


class ScoredPolicy(EvictionPolicy):
    """Evicts the resident key with the lowest score; among equal scores the lowest key.

    A subclass writes `self.scores[key]` in `on_access` and needs nothing else. Since scores rise, a lazy heap is
    enough: it holds one entry per resident that is not above its score, and an entry that lags behind is corrected when
    it reaches the top.
    """

    ranks_by_score = True

    def __init__(self, scores: Mapping[int, float] | None = None):
        """scores: by key, of keys that are worth something before their first access; others score NEVER."""
        self.scores: defaultdict[int, float] = defaultdict(lambda: NEVER, scores or {})
        self._residents: set[int] = set()
        self._heap: list[tuple[float, int]] = []

    def score(self, key: int) -> float:
        return self.scores[key]

    def on_insert(self, key: int) -> None:
        assert key not in self._residents
        self._residents.add(key)
        self.push(key)

    def on_evict(self, key: int) -> None:
        self._residents.remove(key)
        if self._heap[0][1] == key:  # a victim is on top
            heapq.heappop(self._heap)

    def push(self, key: int) -> None:
        """Enter the score of a resident key anew, as is needed after it has fallen."""
        heap, scores = self._heap, self.scores
        if len(heap) > SPARE_ENTRIES + 4 * len(self._residents):
            heap[:] = [(scores[resident], resident) for resident in self._residents]
            heapq.heapify(heap)
        else:
            heapq.heappush(heap, (scores[key], key))

    def choose_victim(self, protected: Collection[int]) -> int:
        heap, scores, passed_over = self._heap, self.scores, []
        while True:
            score, key = heap[0]
            if key not in self._residents:
                heapq.heappop(heap)
            elif scores[key] != score:
                heapq.heapreplace(heap, (scores[key], key))
            elif key in protected:
                passed_over.append(heapq.heappop(heap))
            else:
                break
        for entry in passed_over:
            heapq.heappush(heap, entry)
        return key

    def rank_victims(self, count: int) -> list[int]:
        heap, scores = self._heap, self.scores
        ranked: dict[int, tuple[float, int]] = {}  # by key, its entry
        while len(ranked) < count:
            score, key = heap[0]
            if key not in self._residents or key in ranked:  # a key that came back may have two entries
                heapq.heappop(heap)
            elif scores[key] != score:
                heapq.heapreplace(heap, (scores[key], key))
            else:
                ranked[key] = heapq.heappop(heap)
        for entry in ranked.values():
            heapq.heappush(heap, entry)
        return list(ranked)


class RecencyScore(EvictionPolicy):
    """Base of the queue policies: a key scores the number of its last access.

    A queue says little about keys that are not in it, so wide steps compare keys by recency.
    """

    def __init__(self) -> None:
        self._last_access: dict[int, float] = {}
        self._now = 0.0

    def score(self, key: int) -> float:
        return self._last_access.get(key, NEVER)

    def _touch(self, keys: Sequence[int]) -> None:
        self._now = now = self._now + 1.0
        for key in keys:
            self._last_access[key] = now
