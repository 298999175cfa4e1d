"""SIEVE (Zhang et al., NSDI 2024): a queue with a hand that gives accessed keys one second chance."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from itertools import chain

from offmoe.policy.eviction.base import RecencyScore
from offmoe.types import Demand


class Sieve(RecencyScore):
    """Evicts the first key from the hand on that was not accessed since the hand passed it.

    The hand moves from the oldest key to the newest, then again from the oldest. New keys are the newest. The queue is
    kept in two parts that meet at the hand. Finding a victim only looks; the second chances it found are spent in
    `on_evict`. Protected keys are passed over and keep theirs. Cost: O(1) per access, O(1) amortized per victim.
    """

    def __init__(self) -> None:
        super().__init__()
        self._accessed: set[int] = set()
        self._behind: OrderedDict[int, None] = OrderedDict()
        self._before: OrderedDict[int, None] = OrderedDict()
        self._victim, self._steps = -1, 0
        self._spent: list[int] = []

    def on_access(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._touch(keys)
        self._accessed.update(keys)

    def on_insert(self, key: int) -> None:
        self._accessed.discard(key)  # accesses before the key had a slot do not count
        self._before[key] = None

    def choose_victim(self, protected: Collection[int]) -> int:
        spent: list[int] = []
        victim, victim_steps = -1, 0
        for steps, key in enumerate(chain(self._before, self._behind)):
            if key in protected:
                continue
            if victim < 0:
                victim, victim_steps = key, steps
            if key not in self._accessed:
                victim, victim_steps = key, steps
                break
            spent.append(key)
        # If all were accessed, the hand goes round once and stops at the first.
        self._victim, self._steps, self._spent = victim, victim_steps, spent
        return victim

    def on_evict(self, key: int) -> None:
        if key == self._victim:
            self._accessed.difference_update(self._spent)
            for _ in range(self._steps):
                self._wrap()
                self._behind[self._before.popitem(last=False)[0]] = None
            self._victim = -1
        self._accessed.discard(key)
        self._before.pop(key, None)
        self._behind.pop(key, None)
        self._wrap()

    def _wrap(self) -> None:
        """A hand at the end of the queue stands at its beginning."""
        if not self._before:
            self._before, self._behind = self._behind, self._before
