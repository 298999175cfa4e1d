"""Which experts of one layer stay in RAM, the tier between disk and device.

Nothing moves. What is read from disk may stay in RAM on its way; what is on the device need not. Nothing is ever
written back (rule R3), so an expert that the device forgets is in RAM only if its copy was kept. A copy of an expert
that the device does not hold is worth what the device's own policy says of the expert. One that the device does hold
will not be asked for until it is forgotten there: it is worth as much as the first that would be forgotten, and less
the farther it is from that. Of gpt-oss-20b's misses at 8 slots on the device and 8 in RAM, 52 % go to the disk; 82 % if
RAM keeps the best whatever the device holds, 58 % without the distance, 30 % if the device could write back.

Bound: the slots of one layer, looked through once per read from disk when all are taken. Must never see where bytes
are, and never decide from anything but scores and what is resident (rule R1)."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Sequence

from offmoe.policy.eviction import NEVER, EvictionPolicy
from offmoe.policy.residency import Residency
from offmoe.types import Demand, Lookup

DISTANCE = 0.5
"""How much less a copy is worth for each point of score by which the device's is safe; flat between 0.2 and 1."""


class HostTier:
    """RAM slots of one layer."""

    def __init__(self, experts: int, slots: Sequence[int], device: Residency, policy: EvictionPolicy, first_key: int):
        """device, policy: those of the pool that the layer's experts have slots in, as keys from `first_key`."""
        self._order = _Worth(device, policy, first_key)
        self._residency = Residency(experts, slots, self._order)

    def place(self, expert: int) -> tuple[int | None, bool]:
        """Of an expert that the device has just given a slot: its slot in RAM, and whether it must be read from disk
        first. (None, True): it is read past RAM, because every copy there is worth more than its own.
        """
        residency = self._residency
        if residency.lookup(expert) != Lookup.MISS:
            return residency.slot(expert), False
        if residency.full and not self._order.choose(expert):
            return None, True
        admission = residency.admit(expert, ())
        assert admission is not None, "nothing is protected here"
        return admission.slot, True

    def holds(self, expert: int) -> bool:
        """Whether there is a copy."""
        return self._residency.lookup(expert) != Lookup.MISS

    def check(self) -> None:
        """Assert the invariants."""
        self._residency.check()


class _Worth:
    """Orders copies by what they are worth now; keeps nothing but which there are."""

    def __init__(self, device: Residency, policy: EvictionPolicy, first_key: int):
        self._device, self._policy, self._first = device, policy, first_key
        self._keys: list[int] = []  # of the device's pool, ascending
        self._chosen = -1

    def choose(self, newcomer: int) -> bool:
        """Choose the copy to drop for another, ties the lowest expert; False if that is worth no more than any."""
        score = self._policy.score
        first = self._device.victim(())  # what the device would forget first
        threshold = NEVER if first is None else score(first)

        def worths(keys: Sequence[int]) -> list[float]:
            return [
                own if not held else threshold - DISTANCE * (own - threshold) if own > threshold else threshold
                for own, held in zip(map(score, keys), self._device.holds(keys), strict=True)
            ]

        of_copies = worths(self._keys)
        least = min(of_copies)
        self._chosen = self._keys[of_copies.index(least)] - self._first
        return least < worths((self._first + newcomer,))[0]

    def victim(self, protected: Collection[int]) -> int:
        return self._chosen

    def admitted(self, key: int) -> None:
        insort(self._keys, self._first + key)

    def forgotten(self, key: int) -> None:
        self._keys.remove(self._first + key)

    def used(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        """Uses are told to the device's policy."""

    def score(self, key: int) -> float:
        return self._policy.score(self._first + key)
