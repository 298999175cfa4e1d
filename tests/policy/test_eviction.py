"""What every eviction policy promises, and what each of them is for."""

from __future__ import annotations

import math
import random

import pytest

from offmoe.policy.eviction import LRU, LRU2, NEVER, AgedLFU, Belady, Static
from offmoe.types import Demand


def single(keys):
    return [Demand(k, 1, 1) for k in keys]


class PolicyContract:
    """Inherited by the tests of every policy."""

    def policy(self, keys):
        raise AssertionError("each policy makes its own")

    def check_victim(self, policy, victim, candidates):
        """What else a policy promises about its victim."""

    def test_victim_is_resident_unprotected_and_the_same_when_asked_again(self):
        rng = random.Random(0)
        policy, twin, resident = self.policy(12), self.policy(12), set()
        for _ in range(400):
            keys = sorted(rng.sample(range(12), 3))
            policy.used(keys, single(keys), 1)
            twin.used(keys, single(keys), 1)
            for key in keys:
                if key not in resident:
                    if len(resident) == 6:
                        policy.victim([keys[0]])  # asking changes nothing: the twin is asked once
                        policy.victim(())
                        victim = policy.victim(keys)
                        assert victim in resident
                        assert victim not in keys
                        assert policy.victim(frozenset(keys)) == victim == twin.victim(keys)
                        self.check_victim(policy, victim, resident - set(keys))
                        policy.forgotten(victim)
                        twin.forgotten(victim)
                        resident.remove(victim)
                    policy.admitted(key)
                    twin.admitted(key)
                    resident.add(key)

    def test_a_key_can_be_forgotten_and_come_back(self):
        policy = self.policy(3)
        for _ in range(100):
            for key in range(3):
                policy.admitted(key)
            assert {policy.victim({0, 1}), policy.victim({1, 2}), policy.victim({0, 2})} == {0, 1, 2}
            for key in (1, 0, 2):
                policy.forgotten(key)

    def test_only_one_key_is_not_protected(self):
        rng = random.Random(1)
        policy = self.policy(8)
        for key in range(8):
            policy.admitted(key)
        for _ in range(100):
            free = rng.randrange(8)
            assert policy.victim([key for key in range(8) if key != free]) == free
            policy.forgotten(free)
            policy.admitted(free)

    def test_first_come_is_first_to_go_where_nothing_is_known(self):
        policy = self.policy(5)
        for key in (2, 3, 4):
            policy.admitted(key)
        assert policy.victim(()) == 2
        assert policy.victim({2}) == 3


class ScoreContract(PolicyContract):
    """Policies that forget the lowest score."""

    def check_victim(self, policy, victim, candidates):
        assert victim == min(candidates, key=lambda k: (policy.score(k), k))

    def test_never_used_keys_go_first_and_ties_go_to_the_lowest_id(self):
        policy = self.policy(5)
        for key in (4, 2, 3):
            policy.admitted(key)
        assert policy.victim(()) == 2
        assert policy.victim({2}) == 3


class TestLRU(ScoreContract):
    def policy(self, keys):
        return LRU(keys)

    def test_experts_of_one_access_are_equally_recent(self):
        policy = LRU(4)
        for key in range(4):
            policy.admitted(key)
        policy.used([2, 3], single([2, 3]), 1)
        policy.used([0, 1], single([0, 1]), 1)
        assert policy.victim(()) == 2


class TestLRU2(ScoreContract):
    def policy(self, keys):
        return LRU2(keys)

    def test_the_use_before_the_last_decides(self):
        policy = LRU2(3)
        for key in range(3):
            policy.admitted(key)
        for key in (0, 0, 1, 2, 2, 1):
            policy.used([key], single([key]), 1)
        assert policy.victim(()) == 0
        policy.used([0], single([0]), 1)
        assert policy.victim(()) == 0  # its use before the last is the first ones': older than those of 1 and 2
        policy.used([0], single([0]), 1)
        assert policy.victim(()) == 1

    def test_used_once_goes_before_used_twice(self):
        policy = LRU2(2)
        policy.admitted(0)
        policy.admitted(1)
        policy.used([0], [Demand(0, 5, 5)], 5)
        policy.used([1], single([1]), 1)
        assert policy.victim(()) == 1


class TestStatic(ScoreContract):
    def policy(self, keys):
        return Static([1.0] * keys)

    def test_use_changes_nothing(self):
        policy = Static([3, 1, 2])
        for key in range(3):
            policy.admitted(key)
        for _ in range(9):
            policy.used([1], single([1]), 1)
        assert policy.victim(()) == 1
        assert policy.victim({1}) == 2


class TestAgedLFU(ScoreContract):
    def policy(self, keys):
        return AgedLFU(keys)

    def test_score_is_the_aged_count(self):
        policy, counts, decay = AgedLFU(6, half_life=16), [0.0] * 6, 0.5 ** (1 / 16)
        rng = random.Random(1)
        for step in range(1, 300):
            keys = rng.sample(range(6), 2)
            policy.used(keys, single(keys), 1)
            counts = [c * decay for c in counts]
            for key in keys:
                counts[key] += 1
            for key in range(6):
                if counts[key]:
                    assert math.isclose(2 ** (policy.score(key) - step / 16), counts[key], rel_tol=1e-9)

    def test_counts_survive_eviction(self):
        policy = AgedLFU(3)
        for _ in range(10):
            policy.used([0], single([0]), 1)
        policy.admitted(0)
        policy.forgotten(0)
        policy.used([1], single([1]), 1)
        policy.admitted(0)
        policy.admitted(1)
        assert policy.victim(()) == 1

    def test_a_prompt_leaves_behind_what_its_tail_used(self):
        policy = AgedLFU(3)
        policy.used([0, 1], [Demand(0, 500, 2), Demand(1, 70, 40)], 64)
        assert policy.score(1) > policy.score(0) > policy.score(2) == NEVER

    def test_a_step_of_n_rows_ages_like_n_accesses(self):
        single_rows, one_step = AgedLFU(2), AgedLFU(2)
        for _ in range(8):
            single_rows.used([0], single([0]), 1)
        one_step.used([0], [Demand(0, 8, 8)], 8)
        assert math.isclose(single_rows.score(0), one_step.score(0), rel_tol=1e-12)

    def test_a_million_accesses_do_not_overflow(self):
        policy = AgedLFU(2, half_life=1.0)
        policy.used([1], single([1]), 1)
        for _ in range(5000):
            policy.used([0], single([0]), 64)
        assert math.isfinite(policy.score(0))
        assert policy.score(0) > policy.score(1)


class TestBelady(ScoreContract):
    def policy(self, keys):
        rng = random.Random(0)  # the accesses of the contract's test
        uses = [[] for _ in range(keys)]
        if keys == 12:
            for i in range(400):
                for key in sorted(rng.sample(range(12), 3)):
                    uses[key].append(i)
        return Belady(uses)

    def test_forgets_the_farthest_next_use(self):
        policy = Belady([[0, 1], [0, 5], [2], []])
        for key in range(4):
            policy.admitted(key)
        assert policy.victim(()) == 3
        policy.used([0, 1], single([0, 1]), 1)
        assert policy.victim({3}) == 1

    def test_refuses_accesses_it_was_not_built_for(self):
        with pytest.raises(AssertionError):
            Belady([[1], [0]]).used([0], single([0]), 1)
