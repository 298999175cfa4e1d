"""Which experts of one layer stay in RAM, the tier between disk and device.

An expert that is read from disk may stay in RAM on its way to the device. Nothing is ever written back, so an expert
that the device evicts is in RAM only if its copy was kept. A copy of an expert that the device does not hold is worth
the expert's score in the device's eviction policy. A copy of one that it does hold is not needed before the device
evicts it: it is worth as much as the device's next victim, and less the farther the expert is from being the victim.

Of gpt-oss-20b's misses with 8 slots on the device and 8 in RAM, 52 % are read from disk. It would be 82 % if RAM kept
the best experts whatever the device holds, 58 % without the distance, and 30 % if the device could write back.

Cost: O(log n) per read and per access, amortized, and one `choose_victim` of the device's policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush, heapreplace

from offmoe.policy.eviction.base import NEVER, EvictionPolicy

DISTANCE = 0.5
"""Worth that a copy loses per point of score between its expert and the device's victim; flat from 0.2 to 1."""
SPARE_ENTRIES = 64
"""Stale heap entries that are kept beyond four per slot before a heap is rebuilt."""


class HostTier:
    """The RAM slots of one layer. It sees every access of the layer, and what the device evicts.

    Two heaps order the copies. `_ram_only` has those that the device does not hold, the lowest score first; an entry is
    corrected when it reaches the top, since scores only rise. `_on_both` has those that the device holds as well, the
    highest score first; every access adds an entry.
    """

    def __init__(self, keys: range, slots: Sequence[int], policy: EvictionPolicy, on_device: Mapping[int, int]):
        """keys: of the layer. policy: of the pool in which these keys have slots on the device. on_device:
        `Residency.slot_of` of that pool."""
        self._keys, self._policy, self._on_device = keys, policy, on_device
        self.slots = tuple(slots)
        self._slot_of: dict[int, int] = {}
        self._free = list(reversed(slots))  # the lowest slot is given first
        self._ram_only: list[tuple[float, int]] = []  # (score, key)
        self._on_both: list[tuple[float, int]] = []  # (-score, key)
        self._changed: set[int] = set()  # keys whose entry in _on_both may be out of date
        self._most_entries = SPARE_ENTRIES + 4 * len(slots)

    def on_access(self, keys: Iterable[int]) -> None:
        """The layer demands these keys, and the policy knows it already."""
        self._changed.update(keys)

    def on_evict(self, key: int) -> None:
        """The device has evicted a key."""
        if key in self._slot_of:
            heappush(self._ram_only, (self._policy.score(key), key))
            if len(self._ram_only) > self._most_entries:
                self._rebuild(self._ram_only, on_device=False)

    def place(self, key: int) -> tuple[int | None, bool]:
        """Give a key that is fetched now a slot in RAM, if its copy is worth one. The host computes a key that has not
        just been given a slot on the device.

        Returns:
            (slot, whether the expert must be read from disk first). (None, True): it is read past RAM, because every
            copy in RAM is worth more than its own.
        """
        slot_of = self._slot_of
        if key in slot_of:
            self._changed.add(key)
            return slot_of[key], False
        if self._free:
            slot = self._free.pop()
        else:
            dropped = self._least_worth(key)
            if dropped is None:
                return None, True
            slot = slot_of.pop(dropped)
        slot_of[key] = slot
        self._changed.add(key)
        if key not in self._on_device:
            self.on_evict(key)
        return slot, True

    def fill(self, key: int, slot: int | None = None) -> bool:
        """Give a free slot to a key of which RAM has no copy; no copy is dropped for it.

        Args:
            slot: One that is free. None: the one that `place` would give last.

        Returns:
            Whether the key got a slot. It does not if it has one already, or if no slot is free.
        """
        if key in self._slot_of or not self._free:
            return False
        if slot is None:
            slot = self._free[0]
        self._free.remove(slot)
        self._slot_of[key] = slot
        self._changed.add(key)
        if key not in self._on_device:
            self.on_evict(key)
        return True

    @property
    def free_slots(self) -> tuple[int, ...]:
        """Slots that hold no copy, in the reverse of the order in which `place` gives them."""
        return tuple(self._free)

    @property
    def slot_of(self) -> Mapping[int, int]:
        """By key of which RAM has a copy, its slot."""
        return self._slot_of

    @property
    def keys_held(self) -> frozenset[int]:
        """The keys of which RAM has a copy."""
        return frozenset(self._slot_of)

    def resize(self, slots: Sequence[int]) -> dict[int, int]:
        """Go on with other slots. If they are fewer, the copies that are worth least are dropped, ties the lowest key.

        Args:
            slots: numbers of the new slots, ascending.
        Returns:
            By new slot, the old slot of the copy that is in it now.
        """
        policy, on_device = self._policy, self._on_device
        threshold = policy.score(policy.choose_victim(())) if on_device else NEVER

        def worth(key: int) -> tuple[float, int]:
            score = policy.score(key)
            return (_worth(score, threshold) if key in on_device else score), key

        staying = sorted(self._slot_of, key=worth)[max(0, len(self._slot_of) - len(slots)) :]
        copies = sorted((self._slot_of[key], key) for key in staying)
        self._slot_of = {key: new for new, (_, key) in zip(slots, copies, strict=False)}
        self.slots, self._free = tuple(slots), list(reversed(slots[len(copies) :]))
        self._most_entries = SPARE_ENTRIES + 4 * len(slots)
        self._changed.clear()
        self._rebuild(self._ram_only, on_device=False)
        self._rebuild(self._on_both, on_device=True)
        return {new: old for new, (old, _) in zip(slots, copies, strict=False)}

    def holds(self, key: int) -> bool:
        """Whether RAM has a copy."""
        return key in self._slot_of

    def _least_worth(self, newcomer: int) -> int | None:
        """The copy that is worth least, ties the lowest key; None if that is no less than the newcomer's worth."""
        policy, on_device = self._policy, self._on_device
        least, least_key = policy.score(newcomer), None
        threshold = policy.score(policy.choose_victim(())) if on_device else least  # score of the device's next victim
        if newcomer in on_device:
            least = _worth(least, threshold)
        if least == NEVER:
            return None
        single = self._lowest_in_ram_only()
        if single is not None and single[0] < least:
            least, least_key = single
        doubled = self._highest_on_both()
        if doubled is not None:
            score, key = -doubled[0], doubled[1]
            worth = _worth(score, threshold)
            if threshold == NEVER or score <= threshold:  # all such copies are worth the same: the lowest key goes
                key = next(k for k in self._keys if k in self._slot_of and k in on_device)
            if worth < least or (worth == least and least_key is not None and key < least_key):
                least_key = key
        return least_key

    def _lowest_in_ram_only(self) -> tuple[float, int] | None:
        """(score, key) of the copy with the lowest score that the device does not hold."""
        heap, slot_of, on_device = self._ram_only, self._slot_of, self._on_device
        while heap:
            entry, key = heap[0]
            if key in on_device or key not in slot_of:
                heappop(heap)
                continue
            score = self._policy.score(key)
            if score == entry:
                return heap[0]
            heapreplace(heap, (score, key))
        return None

    def _highest_on_both(self) -> tuple[float, int] | None:
        """(-score, key) of the copy with the highest score that the device holds as well."""
        heap, slot_of, on_device, score = self._on_both, self._slot_of, self._on_device, self._policy.score
        if self._changed:
            for key in self._changed:
                if key in on_device and key in slot_of:
                    heappush(heap, (-score(key), key))
            self._changed.clear()
            if len(heap) > self._most_entries:
                self._rebuild(heap, on_device=True)
        while heap:
            entry, key = heap[0]
            if key in on_device and key in slot_of and score(key) == -entry:
                return heap[0]
            heappop(heap)
        return None

    def _rebuild(self, heap: list[tuple[float, int]], *, on_device: bool) -> None:
        """One entry for each copy that belongs in the heap."""
        sign = -1.0 if on_device else 1.0
        heap[:] = [
            (sign * self._policy.score(key), key) for key in self._slot_of if (key in self._on_device) == on_device
        ]
        heapify(heap)


def _worth(score: float, threshold: float) -> float:
    """Worth of a copy that the device holds as well. threshold: score of the device's next victim."""
    if threshold == NEVER or score <= threshold:
        return threshold
    return threshold - DISTANCE * (score - threshold)
