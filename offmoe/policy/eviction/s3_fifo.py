"""S3-FIFO (Yang et al., SOSP 2023): a small queue for new keys, a main queue, and ghosts of evicted keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from offmoe.policy.eviction.base import RecencyScore
from offmoe.types import Demand


class S3FIFO(RecencyScore):
    """Evicts from a small queue of new keys first, then from the main queue.

    The small queue holds a tenth of the residents. A key that was accessed twice there, or that returns soon after its
    eviction, enters the main queue, where each access (at most three count) buys another round. Finding a victim only
    looks; promotions and rounds happen in `on_evict`. Protected keys are passed over and lose nothing. Cost: O(1) per
    access; a victim costs as many steps as accesses are spent in finding it.
    """

    MOST_ACCESSES = 3
    """Accesses of a key that count; two bits in the paper."""
    SMALL_SHARE = 10
    """The small queue has one in ten of the residents, as in the paper."""

    def __init__(self) -> None:
        super().__init__()
        self._accesses: dict[int, int] = {}  # of residents
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._victim, self._rounds = -1, 0
        self._promoted: list[int] = []
        self._passed: list[int] = []
        self._following: list[int] = []

    def on_access(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._touch(keys)
        accesses = self._accesses
        for key in keys:
            if accesses.get(key, self.MOST_ACCESSES) < self.MOST_ACCESSES:
                accesses[key] += 1

    def on_insert(self, key: int) -> None:
        self._accesses[key] = 0
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = None
        else:
            self._small[key] = None

    def choose_victim(self, protected: Collection[int]) -> int:
        small, main, accesses = self._small, self._main, self._accesses
        enough = max(1, (len(small) + len(main)) // self.SMALL_SHARE)
        promoted: list[int] = []
        self._promoted, self._passed, self._following, self._rounds = promoted, [], [], 0
        for key in small:
            if len(small) - len(promoted) < enough and (main or promoted):
                break
            if key in protected:
                continue
            if accesses[key] <= 1:
                self._victim = key
                return key
            promoted.append(key)
        candidates: list[int] = []
        rounds: list[int] = []  # that each candidate may still stay
        for key in main:
            if key not in protected:
                candidates.append(key)
                rounds.append(accesses[key])
                if accesses[key] == 0:
                    break
        else:
            candidates += promoted
            rounds += [0] * len(promoted)
        if candidates:
            i = rounds.index(min(rounds))
            self._rounds, self._passed, self._following = rounds[i], candidates[:i], candidates[i + 1 :]
            self._victim = candidates[i]
        else:  # the main queue holds protected keys only
            self._victim = next(key for key in small if key not in protected)
        return self._victim

    def on_evict(self, key: int) -> None:
        small, main = self._small, self._main
        if key == self._victim:
            self._spend()
        del self._accesses[key]
        if key in small:
            del small[key]
            self._ghosts[key] = None
            if len(self._ghosts) > len(small) + len(main) + 1:
                self._ghosts.popitem(last=False)
        else:
            del main[key]

    def _spend(self) -> None:
        """Promote, and take from the keys of the main queue the rounds that finding the victim took."""
        for key in self._promoted:
            del self._small[key]
            self._main[key] = None
            self._accesses[key] = 0
        for key in self._passed:
            self._accesses[key] -= self._rounds + 1
            self._main.move_to_end(key)
        for key in self._following:
            self._accesses[key] -= self._rounds
        self._victim = -1
