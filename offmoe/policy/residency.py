"""Which key holds which slot of one pool: the free list and the state of each key, nothing about bytes.

A slot is free or held by one key. A key that was prefetched and has not been demanded since is *pending*. Whether its
copy has landed is a matter of time, which decisions do not see; the transfer engine waits for it. A protected key is
never evicted: the same forward pass still needs its weights, and would silently compute with wrong ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from itertools import islice

from offmoe.policy.eviction.base import EvictionPolicy

REMEMBERED = 64
"""Latest changes that are remembered. A token of 48 layers at a hit rate of 0.85 changes that many slots."""


class Residency:
    """The slots of one pool. `admit` is atomic: it gives a slot, evicting a victim if needed, or changes nothing.

    slot_of: by resident key, its slot. Others only read it.
    """

    def __init__(self, num_keys: int, slots: Sequence[int], policy: EvictionPolicy):
        self.capacity = len(slots)
        self._num_keys = num_keys
        self._policy = policy
        self._slots = tuple(slots)
        self.slot_of: dict[int, int] = {}
        self._pending: set[int] = set()
        self._free = list(reversed(slots))  # the lowest slot is given first
        self.changes = 0
        """Counts the times that a key was given or lost a slot."""
        self._latest: deque[tuple[int, ...] | None] = deque(maxlen=REMEMBERED)
        """The keys of each change, the last one last; None where all keys may have changed."""

    def changed_since(self, changes: int) -> set[int] | None:
        """The keys that were given or lost a slot since the count of changes was `changes`; None if that is unknown."""
        count = self.changes - changes
        if count > len(self._latest):
            return None
        changed = set[int]()
        for keys in islice(reversed(self._latest), count):
            if keys is None:
                return None
            changed.update(keys)
        return changed

    def _note(self, keys: tuple[int, ...] | None) -> None:
        self.changes += 1
        self._latest.append(keys)

    def split(self, keys: Sequence[int]) -> tuple[list[int], list[int], int]:
        """(resident keys with pending ones last, missing keys, number of pending keys)."""
        slot_of, pending_keys = self.slot_of, self._pending
        missing = [key for key in keys if key not in slot_of]
        resident = [key for key in keys if key in slot_of] if missing else list(keys)
        if not pending_keys:
            return resident, missing, 0
        pending = [key for key in resident if key in pending_keys]
        if pending:
            resident = [key for key in resident if key not in pending_keys] + pending
        return resident, missing, len(pending)

    def on_access(self, keys: Iterable[int]) -> None:
        """These keys are demanded: they are pending no more."""
        self._pending.difference_update(keys)

    def admit(
        self, key: int, protected: Collection[int], *, pending: bool = False, named: int | None = None
    ) -> tuple[int, int | None] | None:
        """Give a slot to a key that is not resident.

        Args:
            protected: keys that must keep their slots.
            pending: whether the key is prefetched.
            named: the resident key to evict if no slot is free; None: the policy chooses now.

        Returns:
            (slot, key that was evicted for it, None if the slot was free); None if every resident key is protected.
        """
        slot_of, policy, evicted = self.slot_of, self._policy, None
        assert key not in slot_of
        if self._free:
            slot = self._free.pop()
        else:
            if named is None or not policy.ranks_by_score:  # a queue may spend what its search for a victim passes over
                evicted = self.victim(protected)
                if evicted is None:
                    return None
            evicted = evicted if named is None else named
            assert evicted is not None
            slot = slot_of.pop(evicted)
            self._pending.discard(evicted)
            policy.on_evict(evicted)
        slot_of[key] = slot
        self._note((key,) if evicted is None else (key, evicted))
        if pending:
            self._pending.add(key)
        policy.on_insert(key)
        return slot, evicted

    def fill(self, key: int, slot: int | None = None) -> bool:
        """Give a free slot to a key that is not resident; nothing is evicted.

        Args:
            slot: One that is free. None: the one that `admit` would give last.

        Returns:
            Whether the key got a slot. It does not if it has one already, or if no slot is free.
        """
        if key in self.slot_of or not self._free:
            return False
        if slot is None:
            slot = self._free[0]
        self._free.remove(slot)
        self.slot_of[key] = slot
        self._note((key,))
        self._policy.on_insert(key)
        return True

    def resize(self, slots: Sequence[int]) -> tuple[dict[int, int], list[int]]:
        """Go on with other slots. If they are fewer, the policy's victims lose theirs, one by one.

        Args:
            slots: numbers of the new slots, ascending.
        Returns:
            (by new slot, the old slot of the key that holds it now; the keys that were evicted).
        """
        evicted = []
        while len(self.slot_of) > len(slots):
            evicted.append(victim := self._policy.choose_victim(()))
            del self.slot_of[victim]
            self._pending.discard(victim)
            self._policy.on_evict(victim)
        residents = sorted(self.slot_of.items(), key=lambda item: item[1])
        kept = {new: old for new, (_, old) in zip(slots, residents, strict=False)}
        self.slot_of.update({key: new for new, (key, _) in zip(slots, residents, strict=False)})
        self.capacity, self._slots = len(slots), tuple(slots)
        self._free = list(reversed(slots[len(residents) :]))
        self._note(None)
        return kept, evicted

    def victim(self, protected: Collection[int]) -> int | None:
        """The key that `admit` would evict if no slot were free; None if every resident key is protected."""
        if len(self.slot_of) <= len(protected) and self.slot_of.keys() <= set(protected):
            return None
        return self._policy.choose_victim(protected)

    def rank_victims(self, count: int) -> list[int]:
        """The `count` keys that the policy would evict next, in order; all keys if they are fewer. Changes nothing."""
        return self._policy.rank_victims(min(count, len(self.slot_of)))

    @property
    def slots(self) -> tuple[int, ...]:
        """All slots of the pool."""
        return self._slots

    @property
    def num_free(self) -> int:
        """Slots that no key holds."""
        return len(self._free)

    @property
    def free_slots(self) -> tuple[int, ...]:
        """Slots that no key holds, in the reverse of the order in which `admit` gives them."""
        return tuple(self._free)

    @property
    def complete(self) -> bool:
        """Every key is resident, so nothing will ever miss."""
        return len(self.slot_of) == self._num_keys
