"""Which resident expert to forget: policies that order keys and own no slots.

Nothing moves. Bound: O(log n) per access and per victim, amortised, no scan over slots (a scanning LFU cost 2.9 ms per
layer at 1,500 slots). Must never see tensors, clocks or files: the same objects run in the runtime and in the
simulator.

Every policy here is "forget the key with the lowest score, ties by the lowest key", where a score changes only when
its own key is used. A score that only rises makes a lazy heap enough: a use writes the score and nothing else, and an
entry that lags behind is put right when it comes to the top. Policies made of queues are in queues.py."""

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
        """Worth of a key now, resident or not; comparable between keys of this policy only. A step that needs more
        experts than there are slots leaves those of the highest scores behind."""

    def admitted(self, key: int) -> None:
        """`key` became resident."""

    def forgotten(self, key: int) -> None:
        """`key` is no longer resident."""

    def victim(self, protected: Collection[int]) -> int:
        """The resident key to forget, none of `protected`; there must be one. Asking decides nothing: what a policy
        does in forgetting a victim, it does in `forgotten`."""


class _ScoreOrder:
    """The heap: resident keys by (score, key). Every resident has an entry that is not above its score."""

    def __init__(self, scores: Sequence[float]):
        self._scores = list(scores)
        self._resident = bytearray(len(scores))
        self._heap: list[tuple[float, int]] = []
        self._residents = 0

    def score(self, key: int) -> float:
        return self._scores[key]

    def admitted(self, key: int) -> None:
        assert not self._resident[key]
        self._resident[key] = 1
        self._residents += 1
        self._push(key)

    def forgotten(self, key: int) -> None:
        assert self._resident[key]
        self._resident[key] = 0
        self._residents -= 1
        if self._heap[0][1] == key:  # as a victim's is
            heapq.heappop(self._heap)

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
        heap, scores, aside = self._heap, self._scores, []
        while True:
            score, key = heap[0]
            if not self._resident[key]:
                heapq.heappop(heap)
            elif scores[key] != score:
                heapq.heapreplace(heap, (scores[key], key))
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
        super().__init__([NEVER] * keys)
        self._now = 0.0

    def used(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._now = now = self._now + 1.0
        scores = self._scores
        for key in keys:
            scores[key] = now


class LRU2(_ScoreOrder):
    """Forget the key whose last use but one is longest ago; keys used once go first. Uses count across eviction.

    A step of many tokens is one access, but an expert that several of its tokens use has been used more than once.
    """

    def __init__(self, keys: int):
        super().__init__([NEVER] * keys)
        self._last = [NEVER] * keys
        self._now = 0.0

    def used(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._now = now = self._now + 1.0
        scores, last = self._scores, self._last
        for key, demand in zip(keys, demands, strict=True):
            scores[key] = last[key] if demand.tokens == 1 else now
            last[key] = now


class Static(_ScoreOrder):
    """Forget the least popular, by a popularity that was counted beforehand and never changes.

    The published versions pin the popular and let the rest pass by; a slot here must take what is demanded, so at
    least one slot changes hands. popularity: one number per key, higher stays."""

    def __init__(self, popularity: Sequence[float]):
        super().__init__([float(value) for value in popularity])

    def used(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        pass


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
        super().__init__([NEVER] * keys)
        self._now = 0.0
        self._step = 1.0 / half_life
        self._decay: float = 2.0**-self._step

    def used(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._now = now = self._now + tail * self._step
        scores, log2 = self._scores, math.log2
        if tail <= 1:
            for key in keys:
                old = scores[key]  # below `now` unless the key has been used far above average
                scores[key] = (
                    now + log2(1.0 + 2.0 ** (old - now)) if old <= now else old + log2(1.0 + 2.0 ** (now - old))
                )
            return
        mean_age = (1.0 - self._decay**tail) / (tail * (1.0 - self._decay))
        for key, demand in zip(keys, demands, strict=True):
            use = now + log2(mean_age * (demand.tail_tokens + (demand.tokens - demand.tail_tokens) / 16.0))
            old = scores[key]
            high, low = (use, old) if use >= old else (old, use)
            scores[key] = high + log2(1.0 + 2.0 ** (low - high))


class Belady(_ScoreOrder):
    """Forget the key whose next use is farthest away: MIN, the bound for prefetch 0 and forced admission. Offline only.

    A use lowers the score, so every use is an entry in the heap.

    uses[key]: ascending indices of the accesses (of this residency) that demand the key.
    """

    def __init__(self, uses: Sequence[Sequence[int]]):
        super().__init__([-float(indices[0]) if indices else NEVER for indices in uses])
        self._uses = uses
        self._next = [0] * len(uses)
        self._access = -1

    def used(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._access += 1
        for key in keys:
            uses, i = self._uses[key], self._next[key] + 1
            assert uses[i - 1] == self._access, "accesses differ from those Belady was built for"
            self._next[key] = i
            self._scores[key] = -float(uses[i]) if i < len(uses) else NEVER
            if self._resident[key]:
                self._push(key)
