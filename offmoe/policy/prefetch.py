"""Which predictions to act on, how many, and when to stop.

Nothing moves. A prefetch that is not demanded by the next access of its layer was a wasted read and may have cost a
useful resident, so "auto" watches how many of its prefetches are used and pauses when too few are. Counts only, no
clocks (rule R1): replay takes the same decisions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol


class PrefetchPolicy(Protocol):
    def limit(self, layer: int) -> int:
        """How many experts may be fetched ahead for `layer` now."""

    def issued(self, layer: int, experts: Collection[int]) -> None:
        """These prefetches were started for the next access of `layer`."""

    def demanded(self, layer: int, experts: Collection[int]) -> None:
        """`layer` demands these experts now."""


class FixedPrefetch:
    """At most `count` experts per layer, always; 0 is off."""

    def __init__(self, count: int):
        self._count = count

    def limit(self, layer: int) -> int:
        return self._count

    def issued(self, layer: int, experts: Collection[int]) -> None:
        pass

    def demanded(self, layer: int, experts: Collection[int]) -> None:
        pass


class AutoPrefetch:
    """At most top_k experts per layer while at least half of the recent prefetches were used.

    After `WINDOW` prefetches their used share decides: below `PAYS` nothing is prefetched for `PAUSE` accesses, then
    it is tried again. Half is where a prefetch saves as many reads from the critical path as it wastes beside it."""

    WINDOW = 64
    PAUSE = 512
    PAYS = 0.5

    def __init__(self, top_k: tuple[int, ...]):
        self._top_k = top_k
        self._issued: list[frozenset[int]] = [frozenset()] * len(top_k)
        self._judged = 0
        self._used = 0
        self._pause = 0

    def limit(self, layer: int) -> int:
        return 0 if self._pause else self._top_k[layer]

    def issued(self, layer: int, experts: Collection[int]) -> None:
        self._issued[layer] = frozenset(experts)

    def demanded(self, layer: int, experts: Collection[int]) -> None:
        if self._pause:
            self._pause -= 1
        waiting = self._issued[layer]
        if not waiting:
            return
        self._issued[layer] = frozenset()
        self._judged += len(waiting)
        self._used += len(waiting.intersection(experts))
        if self._judged >= self.WINDOW:
            if self._used < self.PAYS * self._judged:
                self._pause = self.PAUSE
            self._judged = self._used = 0


def build_prefetch(option: int | str, top_k: tuple[int, ...]) -> PrefetchPolicy:
    """Of the option `prefetch`: a number, or "auto"."""
    return AutoPrefetch(top_k) if isinstance(option, str) else FixedPrefetch(option)
