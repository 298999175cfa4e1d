"""Residency against a small oracle, under random accesses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmoe.policy.eviction.aged_lfu import AgedLFU
from offmoe.policy.eviction.lru import LRU
from offmoe.policy.residency import REMEMBERED, Residency
from offmoe.types import Demand
from tests.policy.invariants import check_residency

KEYS = 9


class Oracle:
    """What a residency holds, in 20 lines: scores are recomputed, victims searched for."""

    def __init__(self, slots: int):
        self.slots = slots
        self.held: dict[int, int] = {}
        self.pending: set[int] = set()
        self.last: dict[int, int] = {}

    def used(self, keys, now):
        self.last.update(dict.fromkeys(keys, now))

    def admit(self, key, protected, pending):
        evicted = None
        if len(self.held) < self.slots:
            slot = min(set(range(self.slots)) - set(self.held.values()))
        else:
            free = [k for k in self.held if k not in protected]
            if not free:
                return None
            evicted = min(free, key=lambda k: (self.last.get(k, -1), k))
            slot = self.held.pop(evicted)
            self.pending.discard(evicted)
        self.held[key] = slot
        if pending:
            self.pending.add(key)
        return slot, evicted


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.sets(st.integers(0, KEYS - 1), min_size=1, max_size=4), st.booleans()), max_size=60),
)
def test_agrees_with_the_oracle(slots, steps):
    policy = LRU()
    residency, oracle = Residency(KEYS, range(slots), policy), Oracle(slots)
    for now, (wanted, pending) in enumerate(steps):
        keys = sorted(wanted)
        if not pending:
            policy.on_access(keys, [Demand(k, 1, 1) for k in keys], 1)
            oracle.used(keys, now)
        for key in keys:
            if key not in residency.slot_of:
                assert key not in oracle.held
                got = residency.admit(key, keys, pending=pending)
                want = oracle.admit(key, keys, pending)
                assert got == want
            elif not pending:
                residency.on_access([key])
                oracle.pending.discard(key)
        assert residency.slot_of == oracle.held
        resident, _, num_pending = residency.split(range(KEYS))
        assert set(resident[len(resident) - num_pending :]) == oracle.pending
        check_residency(residency)


def test_a_policy_of_scores_is_not_asked_for_a_victim_that_is_named(monkeypatch):
    """A search costs as much as all else; queues are asked, because they may spend what a search passes over."""
    policy = AgedLFU()
    residency = Residency(6, range(3), policy)
    for key in range(3):
        policy.on_access([key], [Demand(key, 1, 1)], 1)
        residency.admit(key, ())
    monkeypatch.setattr(policy, "choose_victim", None)
    assert residency.admit(3, [0, 3], named=1) == (1, 1)
    monkeypatch.undo()
    assert residency.admit(4, [3, 4]) == (0, 0), "the search passes over what was evicted without it"
    check_residency(residency)


def test_every_change_of_holders_is_counted():
    residency = Residency(4, range(2), AgedLFU())
    counts = [residency.changes]
    residency.admit(0, ())
    counts.append(residency.changes)
    residency.fill(1)
    counts.append(residency.changes)
    residency.admit(2, [0])
    counts.append(residency.changes)
    residency.resize(range(1))
    counts.append(residency.changes)
    assert len(set(counts)) == len(counts)


def test_admit_changes_nothing_when_all_residents_are_protected():
    residency = Residency(4, range(2), AgedLFU())
    assert residency.admit(0, ())
    assert residency.admit(1, ())
    assert residency.admit(2, [0, 1]) is None
    assert residency.slot_of == {0: 0, 1: 1}
    assert residency.admit(2, [0]) == (1, 1)


def test_complete_means_nothing_can_miss():
    residency = Residency(2, range(2), LRU())
    assert not residency.complete
    residency.admit(0, ())
    residency.admit(1, ())
    assert residency.complete


def test_check_finds_a_broken_state():
    residency = Residency(3, range(2), LRU())
    residency.admit(0, ())
    residency.slot_of[1] = residency.slot_of[0]
    with pytest.raises(AssertionError):
        check_residency(residency)


@given(st.lists(st.tuples(st.sampled_from(["admit", "fill", "resize"]), st.integers(0, KEYS - 1)), max_size=150))
def test_what_has_changed_is_known(steps):
    residency = Residency(KEYS, range(3), LRU())
    seen = [(0, dict(residency.slot_of))]
    for what, key in steps:
        if what == "resize":
            residency.resize(range(1 + key % 4))
        elif key not in residency.slot_of:
            residency.admit(key, ()) if what == "admit" else residency.fill(key)
        seen.append((residency.changes, dict(residency.slot_of)))
    for changes, then in seen:
        changed = residency.changed_since(changes)
        now = residency.slot_of
        moved = {key for key in then.keys() | now.keys() if then.get(key) != now.get(key)}
        assert changed is None or moved <= changed
        if changes == residency.changes:
            assert changed == set()
        elif changed is None:
            assert residency.changes - changes > REMEMBERED or any(what == "resize" for what, _ in steps)
