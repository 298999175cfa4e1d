"""Eviction policies made of queues: SIEVE and S3-FIFO.

Nothing moves. Bound: O(1) per use; a victim costs as many steps as uses are spent in finding it, plus the protected
keys passed over: O(1) amortised. Must never see tensors, clocks or files, like every policy (eviction.py).

Finding a victim spends the second chances of the keys it passes. That happens in `forgotten`, not in `victim`: asking
alone changes nothing. Protected keys are passed over without losing anything. A queue says little about keys that are
not in it, so the score, which only steps with more experts than slots ask for, is the last use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from itertools import chain

from offmoe.policy.eviction import NEVER
from offmoe.types import Demand


class _LastUse:
    """When every key was used last, in accesses."""

    def __init__(self, keys: int):
        self._last = [NEVER] * keys
        self._now = 0.0

    def score(self, key: int) -> float:
        return self._last[key]

    def _use(self, keys: Sequence[int]) -> None:
        self._now = now = self._now + 1.0
        for key in keys:
            self._last[key] = now


class Sieve(_LastUse):
    """SIEVE (NSDI 2024): a hand moves from the oldest key to the newest, then again from the oldest, and forgets the
    first that was not used since it passed. New keys are the newest.

    The queue is kept in two parts that meet at the hand: what it has passed in this round, and what is ahead."""

    def __init__(self, keys: int):
        super().__init__(keys)
        self._resident = bytearray(keys)
        self._spared = bytearray(keys)
        self._passed: OrderedDict[int, None] = OrderedDict()
        self._ahead: OrderedDict[int, None] = OrderedDict()
        self._victim, self._steps = -1, 0
        self._spent: list[int] = []

    def used(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._use(keys)
        for key in keys:
            self._spared[key] = self._resident[key]

    def admitted(self, key: int) -> None:
        self._resident[key] = 1
        self._ahead[key] = None

    def victim(self, protected: Collection[int]) -> int:
        spent: list[int] = []
        first, at = -1, 0
        for steps, key in enumerate(chain(self._ahead, self._passed)):
            if key in protected:
                continue
            if first < 0:
                first, at = key, steps
            if not self._spared[key]:
                first, at = key, steps
                break
            spent.append(key)
        # Where all had been used the hand goes round once, and then stops at the first.
        self._victim, self._steps, self._spent = first, at, spent
        return first

    def forgotten(self, key: int) -> None:
        self._resident[key] = 0
        if key == self._victim:
            for spent in self._spent:
                self._spared[spent] = 0
            for _ in range(self._steps):
                self._turn()
                self._passed[self._ahead.popitem(last=False)[0]] = None
            self._victim = -1
        self._spared[key] = 0
        self._ahead.pop(key, None)
        self._passed.pop(key, None)
        self._turn()

    def _turn(self) -> None:
        """The hand at the end of the queue is the hand at its beginning."""
        if not self._ahead:
            self._ahead, self._passed = self._passed, self._ahead


class S3FIFO(_LastUse):
    """S3-FIFO (SOSP 2023): new keys pass a small queue of a tenth of the slots; used twice there, or back soon after,
    they enter the main queue, where every use (at most three) is worth another round."""

    MOST_USES = 3

    def __init__(self, keys: int):
        super().__init__(keys)
        self._uses = [0] * keys
        self._resident = bytearray(keys)
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._victim, self._rounds = -1, 0
        self._promoted: list[int] = []
        self._before: list[int] = []
        self._after: list[int] = []

    def used(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._use(keys)
        for key in keys:
            if self._resident[key] and self._uses[key] < self.MOST_USES:
                self._uses[key] += 1

    def admitted(self, key: int) -> None:
        self._resident[key] = 1
        self._uses[key] = 0
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = None
        else:
            self._small[key] = None

    def victim(self, protected: Collection[int]) -> int:
        small, main, uses = self._small, self._main, self._uses
        enough = max(1, (len(small) + len(main)) // 10)
        promoted: list[int] = []
        self._promoted, self._before, self._after, self._rounds = promoted, [], [], 0
        for key in small:
            if len(small) - len(promoted) < enough and (main or promoted):
                break
            if key in protected:
                continue
            if uses[key] <= 1:
                self._victim = key
                return key
            promoted.append(key)
        passed: list[int] = []
        left: list[int] = []
        for key in main:
            if key not in protected:
                passed.append(key)
                left.append(uses[key])
                if uses[key] == 0:
                    break
        else:
            passed += promoted
            left += [0] * len(promoted)
        if passed:
            at = left.index(min(left))
            self._rounds, self._before, self._after = left[at], passed[:at], passed[at + 1 :]
            self._victim = passed[at]
        else:  # the main queue holds protected keys only
            self._victim = next(key for key in small if key not in protected)
        return self._victim

    def forgotten(self, key: int) -> None:
        small, main = self._small, self._main
        if key == self._victim:
            self._spend()
        self._resident[key] = 0
        if key in small:
            del small[key]
            self._ghosts[key] = None
            if len(self._ghosts) > len(small) + len(main) + 1:
                self._ghosts.popitem(last=False)
        else:
            del main[key]

    def _spend(self) -> None:
        """What finding the victim cost the keys before it, and those behind it when it took several rounds."""
        for key in self._promoted:
            del self._small[key]
            self._main[key] = None
            self._uses[key] = 0
        for key in self._before:
            self._uses[key] -= self._rounds + 1
            self._main.move_to_end(key)
        for key in self._after:
            self._uses[key] -= self._rounds
        self._victim = -1
