"""Which resident expert to forget: policies that order keys and own no slots.

Nothing moves. Bound: O(log n) per access and per victim, no scan over slots (a scanning LFU cost 2.9 ms per layer at
1,500 slots). Must never see tensors, clocks or files: the same objects run in the runtime and in the simulator.

Every policy here is "forget the key with the lowest score, ties by the lowest key", where a score changes only when
its own key is used. That makes a heap with outdated entries enough: a key's latest entry is the one whose score
matches."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Sequence
from typing import Protocol

from offmoe.types import Demand

NEVER = -math.inf
"""Score of a key that was never used."""


class EvictionPolicy(Protocol):
    """Orders the keys of one residency. Keys are small ints; the owner says which are resident."""

    def used(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        """One access: `keys` were demanded, for `demands[i]` tokens each, by a step with `tail` rows in its tail."""

    def score(self, key: int) -> float:
        """Worth of a key now; comparable between keys of this policy only."""

    def admitted(self, key: int) -> None:
        """`key` became resident."""

    def forgotten(self, key: int) -> None:
        """`key` is no longer resident."""

    def victim(self, protected: Collection[int]) -> int:
        """The resident key to forget, none of `protected`; there must be one. Changes nothing."""


class _ScoreOrder:
    """The heap: resident keys by (score, key)."""

    def __init__(self, keys: int):
        self._scores = [NEVER] * keys
        self._resident = bytearray(keys)
        self._heap: list[tuple[float, int]] = []
        self._residents = 0

    def score(self, key: int) -> float:
        return self._scores[key]

    def _set(self, key: int, score: float) -> None:
        self._scores[key] = score
        if self._resident[key]:
            self._push(key)

    def admitted(self, key: int) -> None:
        assert not self._resident[key]
        self._resident[key] = 1
        self._residents += 1
        self._push(key)

    def forgotten(self, key: int) -> None:
        assert self._resident[key]
        self._resident[key] = 0
        self._residents -= 1

    def _push(self, key: int) -> None:
        heap = self._heap
        if len(heap) > 64 + 4 * self._residents:
            heap[:] = [
                (self._scores[k], k) for k, here in enumerate(self._resident) if here
            ]  # amortised over the pushes
            heapq.heapify(heap)
        else:
            heapq.heappush(heap, (self._scores[key], key))

    def victim(self, protected: Collection[int]) -> int:
        heap, aside = self._heap, []
        while True:
            score, key = heap[0]
            if not self._resident[key] or self._scores[key] != score:
                heapq.heappop(heap)
            elif key in protected:
                aside.append(heapq.heappop(heap))
            else:
                break
        for entry in aside:
            heapq.heappush(heap, entry)
        return key


class LRU(_ScoreOrder):
    """Forget the least recently used; experts of one access are equally recent."""

    def __init__(self, keys: int):
        super().__init__(keys)
        self._now = 0.0

    def used(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._now += 1.0
        for key in keys:
            self._set(key, self._now)


class AgedLFU(_ScoreOrder):
    """Forget the least used, where a use counts half after `half_life` single-token accesses; counts survive eviction.

    Half-life 16 is the flat optimum over real traces (8-32): never below LRU, 20-32 % of the gap to the optimum on
    gpt-oss-20b (routing.md section D). Ageing multiplies all counts alike, so it never changes their order: what is
    stored is log2 of the count as seen from access 0, log2(sum of 2^(t_i / half_life)), which changes only when the
    key is used.

    A step of many tokens ages as its tail of n <= 64 rows would one by one. Its counts say how many tokens of the
    tail used an expert, not which: each counts the mean of the ages 0..n-1. Tokens before the tail count a sixteenth
    of that, their age being 64 or more."""

    def __init__(self, keys: int, half_life: float = 16.0):
        super().__init__(keys)
        self._now = 0.0
        self._step = 1.0 / half_life

    def used(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._now = now = self._now + tail * self._step
        scores = self._scores
        decay = 2.0**-self._step
        mean_age = 1.0 if tail <= 1 else (1.0 - decay**tail) / (tail * (1.0 - decay))
        for key, demand in zip(keys, demands, strict=True):
            use = now
            if tail > 1:
                use += math.log2(mean_age * (demand.tail_tokens + (demand.tokens - demand.tail_tokens) / 16.0))
            old = scores[key]
            high, low = (use, old) if use >= old else (old, use)
            self._set(key, high + math.log2(1.0 + 2.0 ** (low - high)))


class Belady(_ScoreOrder):
    """Forget the key whose next use is farthest away: MIN, the bound for prefetch 0 and forced admission. Offline only.

    uses[key]: ascending indices of the accesses (of this residency) that demand the key.
    """

    def __init__(self, uses: Sequence[Sequence[int]]):
        super().__init__(len(uses))
        self._uses = uses
        self._next = [0] * len(uses)
        self._access = -1
        for key in range(len(uses)):
            self._refresh(key)

    def used(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._access += 1
        for key in keys:
            assert self._uses[key][self._next[key]] == self._access, "accesses differ from those Belady was built for"
            self._next[key] += 1
            self._refresh(key)

    def _refresh(self, key: int) -> None:
        uses, i = self._uses[key], self._next[key]
        self._set(key, -float(uses[i]) if i < len(uses) else NEVER)
