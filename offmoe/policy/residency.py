"""Which key holds which slot of one pool: the free list and the state of each key, nothing about bytes.

A slot is free or held by one key. A key that was prefetched and has not been demanded since is *pending*. Whether its
copy has landed is a matter of time, which decisions do not see; the transfer engine waits for it. A protected key is
never evicted: the same forward pass still needs its weights, and would silently compute with wrong ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from offmoe.policy.eviction.base import EvictionPolicy
from offmoe.types import Lookup


class Admission(NamedTuple):
    """The slot that a key was given, and the key that was evicted for it (None: the slot was free)."""

    slot: int
    evicted: int | None


class Residency:
    """The slots of one pool. `admit` is atomic: it gives a slot, evicting a victim if needed, or changes nothing."""

    def __init__(self, num_keys: int, slots: Sequence[int], policy: EvictionPolicy):
        self.capacity = len(slots)
        self._num_keys = num_keys
        self._policy = policy
        self._slots = tuple(slots)
        self._slot_of: dict[int, int] = {}
        self._pending: set[int] = set()
        self._free = list(reversed(slots))  # the lowest slot is given first

    def lookup(self, key: int) -> Lookup:
        """Where a key is. Changes nothing."""
        if key not in self._slot_of:
            return Lookup.MISS
        return Lookup.PENDING if key in self._pending else Lookup.HIT

    def split(self, keys: Sequence[int]) -> tuple[list[int], list[int], int]:
        """(resident keys with pending ones last, missing keys, number of pending keys)."""
        slot_of, pending_keys = self._slot_of, self._pending
        missing = [key for key in keys if key not in slot_of]
        resident = [key for key in keys if key in slot_of] if missing else list(keys)
        if not pending_keys:
            return resident, missing, 0
        pending = [key for key in resident if key in pending_keys]
        if pending:
            resident = [key for key in resident if key not in pending_keys] + pending
        return resident, missing, len(pending)

    def slots_of(self, keys: Iterable[int]) -> list[int]:
        """Slots of resident keys."""
        slot_of = self._slot_of
        return [slot_of[key] for key in keys]

    def on_access(self, key: int) -> None:
        """A resident key is demanded: it is pending no more."""
        self._pending.discard(key)

    def admit(self, key: int, protected: Collection[int], *, pending: bool = False) -> Admission | None:
        """Give a slot to a key that is not resident; None if every resident key is protected."""
        assert key not in self._slot_of
        evicted = None
        if self._free:
            slot = self._free.pop()
        elif self._all_protected(protected):
            return None
        else:
            evicted = self._policy.choose_victim(protected)
            slot = self._slot_of.pop(evicted)
            self._pending.discard(evicted)
            self._policy.on_evict(evicted)
        self._slot_of[key] = slot
        if pending:
            self._pending.add(key)
        self._policy.on_insert(key)
        return Admission(slot, evicted)

    def victim(self, protected: Collection[int]) -> int | None:
        """The key that `admit` would evict if no slot were free; None if every resident key is protected."""
        return None if self._all_protected(protected) else self._policy.choose_victim(protected)

    def _all_protected(self, protected: Collection[int]) -> bool:
        num_residents = len(self._slot_of)
        return num_residents <= len(protected) and len(self._slot_of.keys() & set(protected)) == num_residents

    @property
    def num_free(self) -> int:
        """Slots that no key holds."""
        return len(self._free)

    @property
    def complete(self) -> bool:
        """Every key is resident, so nothing will ever miss."""
        return len(self._slot_of) == self._num_keys

    def resident_keys(self) -> list[int]:
        """Ascending."""
        return sorted(self._slot_of)

    def check(self) -> None:
        """Assert that every slot is free or held by exactly one key, and that pending keys are resident."""
        assert sorted([*self._slot_of.values(), *self._free]) == sorted(self._slots)
        assert self._pending <= self._slot_of.keys()
