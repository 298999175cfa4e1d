"""Which experts of one layer stay in RAM, the tier between disk and device.

Nothing moves. What is read from disk may stay in RAM on its way; what is on the device need not. Nothing is ever
written back (rule R3), so an expert that the device forgets is in RAM only if its copy was kept. A copy of an expert
that the device does not hold is worth what the device's own policy says of the expert. One that the device does hold
will not be asked for until it is forgotten there: it is worth as much as the first that would be forgotten, and less
the farther it is from that. Of gpt-oss-20b's misses at 8 slots on the device and 8 in RAM, 52 % go to the disk; 82 % if
RAM keeps the best whatever the device holds, 58 % without the distance, 30 % if the device could write back.

Bound: O(log n) per read and per use, amortised, and asking the device's policy for its victim. Must never see where
bytes are, and never decide from anything but scores and what is resident (rule R1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush, heapreplace

from offmoe.policy.eviction import NEVER, EvictionPolicy
from offmoe.policy.residency import EMPTY

DISTANCE = 0.5
"""How much less a copy is worth for each point of score by which the device's is safe; flat between 0.2 and 1."""
SLACK = 64
"""Entries that a heap may have beyond four for each slot before those that say nothing any more are thrown out."""


class HostTier:
    """RAM slots of one layer. It is told of every use of an expert, and of all that the device takes in and forgets.

    Two heaps order the copies: those that the device does not hold, the least score first, which are put right when
    they come to the top, as a score only rises; and those that it holds, the highest score first, where every use is a
    new entry.
    """

    def __init__(self, experts: int, slots: Sequence[int], policy: EvictionPolicy, first_key: int):
        """policy: of the pool that the layer's experts have slots in, as keys from `first_key`."""
        self._policy, self._first = policy, first_key
        self._slots = tuple(slots)
        self._slot_of = [EMPTY] * experts
        self._free = list(reversed(slots))  # lowest slot first
        self._on_device = bytearray(experts)
        self._away: list[tuple[float, int]] = []  # score, expert
        self._both: list[tuple[float, int]] = []  # minus score, expert
        self._changed: set[int] = set()  # whose score may be another than their entry in _both says
        self._most = SLACK + 4 * len(slots)

    def used(self, experts: Iterable[int]) -> None:
        """These experts were used, of which their policy has been told."""
        self._changed.update(experts)

    def left(self, expert: int) -> None:
        """The device has forgotten an expert."""
        self._on_device[expert] = 0
        if self._slot_of[expert] >= 0:
            away = self._away
            heappush(away, (self._policy.score(self._first + expert), expert))
            if len(away) > self._most:
                self._clear_out(away, False)

    def place(self, expert: int, *, on_device: bool = True) -> tuple[int | None, bool]:
        """Of an expert that is wanted now: its slot in RAM, and whether it must be read from disk first. (None, True):
        it is read past RAM, because every copy there is worth more than its own.

        on_device: it has just been given a slot there; else the host computes it.
        """
        slot_of = self._slot_of
        self._on_device[expert] = on_device
        slot = slot_of[expert]
        if slot >= 0:
            self._changed.add(expert)
            return slot, False
        if self._free:
            slot = self._free.pop()
        else:
            dropped = self._least(expert)
            if dropped < 0:
                return None, True
            slot = slot_of[dropped]
            slot_of[dropped] = EMPTY
        slot_of[expert] = slot
        self._changed.add(expert)
        if not on_device:
            self.left(expert)
        return slot, True

    def holds(self, expert: int) -> bool:
        """Whether there is a copy."""
        return self._slot_of[expert] >= 0

    def _least(self, newcomer: int) -> int:
        """The copy that is worth least, ties the lowest expert; -1 if it is worth no less than that of the newcomer,
        which the device holds or the host computes.
        """
        score, first, slot_of, on_device = self._policy.score, self._first, self._slot_of, self._on_device
        own = score(first + newcomer)
        threshold = least = own
        if any(on_device):
            threshold = score(self._policy.victim(()))  # of what the device would forget first
        if on_device[newcomer]:
            least = threshold - DISTANCE * (own - threshold) if own > threshold else threshold
        found = -1
        if least == NEVER:
            return found
        away = self._away
        while away:
            entry, expert = away[0]
            if on_device[expert] or slot_of[expert] < 0:
                heappop(away)
                continue
            own = score(first + expert)
            if own == entry:
                if own < least:
                    found, least = expert, own
                break
            heapreplace(away, (own, expert))
        both = self._both
        if self._changed:
            for expert in self._changed:
                if on_device[expert] and slot_of[expert] >= 0:
                    heappush(both, (-score(first + expert), expert))
            self._changed.clear()
            if len(both) > self._most:
                self._clear_out(both, True)
        while both:
            entry, expert = both[0]
            if on_device[expert] and slot_of[expert] >= 0 and score(first + expert) == -entry:
                if threshold == NEVER or -entry <= threshold:  # then all copies there are worth the same
                    expert = next(e for e, slot in enumerate(slot_of) if slot >= 0 and on_device[e])
                    worth = threshold
                else:
                    worth = threshold + DISTANCE * (entry + threshold)
                if worth < least or (worth == least and expert < found):
                    found = expert
                break
            heappop(both)
        return found

    def _clear_out(self, heap: list[tuple[float, int]], on_device: bool) -> None:
        """Make a heap anew of the copies that belong there."""
        sign = -1.0 if on_device else 1.0
        heap[:] = [
            (sign * self._policy.score(self._first + expert), expert)
            for expert, slot in enumerate(self._slot_of)
            if slot >= 0 and self._on_device[expert] == on_device
        ]
        heapify(heap)

    def check(self, on_device: Sequence[bool]) -> None:
        """Assert that every slot is free or holds one copy, and every copy has an entry that leads to its score.

        on_device: of each expert whether the device holds it.
        """
        copies = {expert: slot for expert, slot in enumerate(self._slot_of) if slot != EMPTY}
        assert sorted([*copies.values(), *self._free]) == sorted(self._slots)
        assert list(self._on_device) == list(on_device)
        for expert in copies:
            score = self._policy.score(self._first + expert)
            if on_device[expert]:
                assert expert in self._changed or (-score, expert) in self._both
            else:
                assert any(e == expert and entry <= score for entry, e in self._away)
