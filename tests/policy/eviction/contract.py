"""What every eviction policy promises, as tests to inherit; for a policy of your own, too.

    class TestMine(PolicyContract):
        def policy(self, num_keys):
            return Mine()

Run pytest on the file from a checkout of offmoe.
"""

from __future__ import annotations

import random

from offmoe.types import Demand


def single(keys):
    return [Demand(k, 1, 1) for k in keys]


class PolicyContract:
    """Inherited by the tests of every policy."""

    def policy(self, num_keys):
        """A new policy; the tests use the keys 0 to num_keys - 1."""
        raise NotImplementedError

    def check_victim(self, policy, victim, candidates):
        """What else a policy promises about its victim."""

    def test_victim_is_resident_unprotected_and_the_same_when_asked_again(self):
        rng = random.Random(0)
        policy, twin, resident = self.policy(12), self.policy(12), set()
        for _ in range(400):
            keys = sorted(rng.sample(range(12), 3))
            policy.on_access(keys, single(keys), 1)
            twin.on_access(keys, single(keys), 1)
            for key in keys:
                if key not in resident:
                    if len(resident) == 6:
                        policy.choose_victim([keys[0]])  # asking changes nothing: the twin is asked once
                        policy.choose_victim(())
                        victim = policy.choose_victim(keys)
                        assert victim in resident
                        assert victim not in keys
                        assert policy.choose_victim(frozenset(keys)) == victim == twin.choose_victim(keys)
                        self.check_victim(policy, victim, resident - set(keys))
                        policy.on_evict(victim)
                        twin.on_evict(victim)
                        resident.remove(victim)
                    policy.on_insert(key)
                    twin.on_insert(key)
                    resident.add(key)

    def test_victims_are_ranked_as_they_are_chosen(self):
        rng = random.Random(0)
        policy, twin, resident = self.policy(12), self.policy(12), set()
        for step in range(200):
            keys = sorted(rng.sample(range(12), 3))
            for each in (policy, twin):
                each.on_access(keys, single(keys), 1)
            for key in keys:
                if key in resident:
                    continue
                if len(resident) == 7:
                    ranked = policy.rank_victims(step % 8)
                    chosen = []
                    while len(chosen) < len(ranked):
                        chosen.append(twin.choose_victim(chosen))
                    assert ranked == chosen
                    victim = policy.choose_victim(keys)  # ranking changes nothing: the twin chooses the same
                    assert victim == twin.choose_victim(keys)
                    resident.remove(victim)
                    for each in (policy, twin):
                        each.on_evict(victim)
                for each in (policy, twin):
                    each.on_insert(key)
                resident.add(key)

    def test_a_key_can_be_forgotten_and_come_back(self):
        policy = self.policy(3)
        for _ in range(100):
            for key in range(3):
                policy.on_insert(key)
            assert {policy.choose_victim({0, 1}), policy.choose_victim({1, 2}), policy.choose_victim({0, 2})} == {
                0,
                1,
                2,
            }
            for key in (1, 0, 2):
                policy.on_evict(key)

    def test_only_one_key_is_not_protected(self):
        rng = random.Random(1)
        policy = self.policy(8)
        for key in range(8):
            policy.on_insert(key)
        for _ in range(100):
            free = rng.randrange(8)
            assert policy.choose_victim([key for key in range(8) if key != free]) == free
            policy.on_evict(free)
            policy.on_insert(free)

    def test_first_come_is_first_to_go_where_nothing_is_known(self):
        policy = self.policy(5)
        for key in (2, 3, 4):
            policy.on_insert(key)
        assert policy.choose_victim(()) == 2
        assert policy.choose_victim({2}) == 3


class ScoreContract(PolicyContract):
    """Policies that forget the lowest score."""

    def check_victim(self, policy, victim, candidates):
        assert victim == min(candidates, key=lambda k: (policy.score(k), k))

    def test_never_used_keys_go_first_and_ties_go_to_the_lowest_id(self):
        policy = self.policy(5)
        for key in (4, 2, 3):
            policy.on_insert(key)
        assert policy.choose_victim(()) == 2
        assert policy.choose_victim({2}) == 3
