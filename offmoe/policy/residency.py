"""Which key holds which slot of one tier: states, the free list, and nothing about bytes.

Slots go FREE -> RESIDENT -> forgotten; a resident that was prefetched and not demanded since is *pending*. Whether
its copy has landed is time, which decisions do not see (rule R1); the transfer engine waits for it. State is flat
integer lists that a device kernel could mirror. Must never pick a protected victim: evicting what the same forward
still needs gives silently wrong weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from offmoe.policy.eviction import EvictionPolicy
from offmoe.types import Lookup

EMPTY = -1


class Admission(NamedTuple):
    """Slot given to a key, and the key it held before (None: it was free)."""

    slot: int
    evicted: int | None


class Residency:
    """Keys 0..keys-1 in `slots`; `admit` is atomic: it gives a slot, forgetting a victim if needed, or changes
    nothing.
    """

    def __init__(self, keys: int, slots: Sequence[int], policy: EvictionPolicy):
        self.capacity = len(slots)
        self._policy = policy
        self._slots = tuple(slots)
        self._slot_of = [EMPTY] * keys
        self._pending = bytearray(keys)
        self._free = list(reversed(slots))  # lowest slot first
        self._residents = 0

    def lookup(self, key: int) -> Lookup:
        """Where a key is; mutates nothing."""
        if self._slot_of[key] == EMPTY:
            return Lookup.MISS
        return Lookup.PENDING if self._pending[key] else Lookup.HIT

    def split(self, keys: Sequence[int]) -> tuple[list[int], list[int], int]:
        """Which of the keys are resident, pending ones last, which are not, and how many are pending."""
        slot_of, waiting = self._slot_of, self._pending
        missing = [key for key in keys if slot_of[key] < 0]
        here = [key for key in keys if slot_of[key] >= 0] if missing else list(keys)
        late = [key for key in here if waiting[key]]
        if late:
            here = [key for key in here if not waiting[key]] + late
        return here, missing, len(late)

    def holds(self, keys: Iterable[int]) -> list[bool]:
        """For each key whether it is resident."""
        slot_of = self._slot_of
        return [slot_of[key] >= 0 for key in keys]

    def slot(self, key: int) -> int:
        """Slot of a resident key."""
        slot = self._slot_of[key]
        assert slot != EMPTY
        return slot

    def slots_of(self, keys: Iterable[int]) -> list[int]:
        """Slots of resident keys."""
        slot_of = self._slot_of
        slots = [slot_of[key] for key in keys]
        assert EMPTY not in slots
        return slots

    def demanded(self, key: int) -> None:
        """A resident key was used: it is pending no more."""
        self._pending[key] = 0

    def admit(self, key: int, protected: Collection[int], *, pending: bool = False) -> Admission | None:
        """A slot for a key that is not resident; None when every resident is protected."""
        assert self._slot_of[key] == EMPTY
        evicted = None
        if self._free:
            slot = self._free.pop()
            self._residents += 1
        elif self._residents <= len(protected) and self._all_protected(protected):
            return None
        else:
            evicted = self._policy.victim(protected)
            slot = self._slot_of[evicted]
            self._slot_of[evicted] = EMPTY
            self._pending[evicted] = 0
            self._policy.forgotten(evicted)
        self._slot_of[key] = slot
        self._pending[key] = pending
        self._policy.admitted(key)
        return Admission(slot, evicted)

    def victim(self, protected: Collection[int]) -> int | None:
        """What an admission would forget if no slot were free; None if it could forget nothing."""
        if self._residents <= len(protected) and self._all_protected(protected):
            return None
        return self._policy.victim(protected)

    def _all_protected(self, protected: Collection[int]) -> bool:
        return sum(self._slot_of[key] != EMPTY for key in set(protected)) == self._residents

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    @property
    def full(self) -> bool:
        """Every slot is taken."""
        return not self._free

    @property
    def complete(self) -> bool:
        """Every key is resident: nothing will ever miss."""
        return self._residents == len(self._slot_of)

    def resident_keys(self) -> list[int]:
        return [key for key, slot in enumerate(self._slot_of) if slot != EMPTY]

    def check(self) -> None:
        """Assert that every slot is free or held by exactly one key, and pending keys are resident."""
        held = [slot for slot in self._slot_of if slot != EMPTY]
        assert sorted(held + self._free) == sorted(self._slots)
        assert self._residents == len(held)
        assert all(self._slot_of[key] != EMPTY for key, pending in enumerate(self._pending) if pending)
