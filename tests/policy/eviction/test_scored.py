"""The policies that evict the lowest score: the contract, and what each of them is for."""

from __future__ import annotations

import math
import random

import pytest

from offmoe.config import CacheOptions
from offmoe.policy.eviction.aged_lfu import AgedLFU
from offmoe.policy.eviction.base import NEVER, Pool
from offmoe.policy.eviction.belady import Belady
from offmoe.policy.eviction.lru import LRU
from offmoe.policy.eviction.lru_k import LRU2
from offmoe.policy.eviction.static import Static
from offmoe.types import CacheShape, Demand
from tests.policy.eviction.contract import ScoreContract, single


class TestLRU(ScoreContract):
    def policy(self, num_keys):
        return LRU()

    def test_experts_of_one_access_are_equally_recent(self):
        policy = LRU()
        for key in range(4):
            policy.on_insert(key)
        policy.on_access([2, 3], single([2, 3]), 1)
        policy.on_access([0, 1], single([0, 1]), 1)
        assert policy.choose_victim(()) == 2


class TestLRU2(ScoreContract):
    def policy(self, num_keys):
        return LRU2()

    def test_the_use_before_the_last_decides(self):
        policy = LRU2()
        for key in range(3):
            policy.on_insert(key)
        for key in (0, 0, 1, 2, 2, 1):
            policy.on_access([key], single([key]), 1)
        assert policy.choose_victim(()) == 0
        policy.on_access([0], single([0]), 1)
        assert policy.choose_victim(()) == 0  # its use before the last is the first ones': older than those of 1 and 2
        policy.on_access([0], single([0]), 1)
        assert policy.choose_victim(()) == 1

    def test_used_once_goes_before_used_twice(self):
        policy = LRU2()
        policy.on_insert(0)
        policy.on_insert(1)
        policy.on_access([0], [Demand(0, 5, 5)], 5)
        policy.on_access([1], single([1]), 1)
        assert policy.choose_victim(()) == 1


@pytest.mark.parametrize("kind", [LRU, LRU2])
@pytest.mark.parametrize("layers", [1, 2])
class TestWarm:
    """With counts of an earlier run, recency policies know which of the filled experts was the more popular."""

    def policy(self, kind, layers, counts):
        options = CacheOptions(slots_per_layer=3, scope="model", warm_counts=(counts,) * layers)
        shape = CacheShape((len(counts),) * layers, (1,) * layers, (1,) * layers)
        policy = kind.for_pool(Pool(range(layers * len(counts)), layers, options, shape))
        for key in range(len(counts)):
            policy.on_insert(key)
        return policy

    def test_the_less_popular_goes_first(self, kind, layers):
        policy = self.policy(kind, layers, (1.0, 0.25, 0.0, 0.5))
        order = []
        for _ in range(4):
            order.append(policy.choose_victim(()))
            policy.on_evict(order[-1])
        assert order == [2, 1, 3, 0]

    def test_what_is_accessed_stays_longer_and_no_score_falls(self, kind, layers):
        policy = self.policy(kind, layers, (0.25, 0.5, 1.0))
        before = [policy.score(key) for key in range(3)]
        policy.on_access([0], single([0]), 1)
        assert [policy.score(key) for key in range(3)] >= before
        policy.on_access([0], single([0]), 1)
        assert policy.choose_victim(()) == 1


class TestStatic(ScoreContract):
    def policy(self, num_keys):
        return Static(dict.fromkeys(range(num_keys), 1.0))

    def test_use_changes_nothing(self):
        policy = Static({0: 3, 1: 1, 2: 2})
        for key in range(3):
            policy.on_insert(key)
        for _ in range(9):
            policy.on_access([1], single([1]), 1)
        assert policy.choose_victim(()) == 1
        assert policy.choose_victim({1}) == 2


class TestAgedLFU(ScoreContract):
    def policy(self, num_keys):
        return AgedLFU()

    def test_score_is_the_aged_count(self):
        policy, counts, decay = AgedLFU(half_life=16), [0.0] * 6, 0.5 ** (1 / 16)
        rng = random.Random(1)
        for step in range(1, 300):
            keys = rng.sample(range(6), 2)
            policy.on_access(keys, single(keys), 1)
            counts = [c * decay for c in counts]
            for key in keys:
                counts[key] += 1
            for key in range(6):
                if counts[key]:
                    assert math.isclose(2 ** (policy.score(key) - step / 16), counts[key], rel_tol=1e-9)

    @pytest.mark.parametrize("layers", [1, 3])
    def test_shares_of_an_earlier_run_are_the_counts_that_they_tend_to(self, layers):
        """An expert of every second step scores before the first access as it would after a thousand."""
        shape = CacheShape((2,) * layers, (1,) * layers, (1,) * layers)
        options = CacheOptions(slots_per_layer=1, scope="model", warm_counts=((0.5, 0.0),) * layers)
        warm = AgedLFU.for_pool(Pool(range(2 * layers), layers, options, shape))
        assert warm.score(1) == NEVER
        cold = AgedLFU(half_life=16.0 * layers)
        for step in range(1000):
            for layer in range(layers):
                cold.on_access([2 * layer + step % 2], single([0]), 1)
        for key in range(0, 2 * layers, 2):
            assert warm.score(key) == pytest.approx(cold.score(key) - 1000 / 16, abs=0.1)

    def test_counts_survive_eviction(self):
        policy = AgedLFU()
        for _ in range(10):
            policy.on_access([0], single([0]), 1)
        policy.on_insert(0)
        policy.on_evict(0)
        policy.on_access([1], single([1]), 1)
        policy.on_insert(0)
        policy.on_insert(1)
        assert policy.choose_victim(()) == 1

    def test_a_prompt_leaves_behind_what_its_tail_used(self):
        policy = AgedLFU()
        policy.on_access([0, 1], [Demand(0, 500, 2), Demand(1, 70, 40)], 64)
        assert policy.score(1) > policy.score(0) > policy.score(2) == NEVER

    def test_a_step_of_n_rows_ages_like_n_accesses(self):
        single_rows, one_step = AgedLFU(), AgedLFU()
        for _ in range(8):
            single_rows.on_access([0], single([0]), 1)
        one_step.on_access([0], [Demand(0, 8, 8)], 8)
        assert math.isclose(single_rows.score(0), one_step.score(0), rel_tol=1e-12)

    def test_a_million_accesses_do_not_overflow(self):
        policy = AgedLFU(half_life=1.0)
        policy.on_access([1], single([1]), 1)
        for _ in range(5000):
            policy.on_access([0], single([0]), 64)
        assert math.isfinite(policy.score(0))
        assert policy.score(0) > policy.score(1)


class TestBelady(ScoreContract):
    def policy(self, num_keys):
        rng = random.Random(0)  # the accesses of the contract's test
        uses = [[] for _ in range(num_keys)]
        if num_keys == 12:
            for i in range(400):
                for key in sorted(rng.sample(range(12), 3)):
                    uses[key].append(i)
        return Belady(dict(enumerate(uses)))

    def test_forgets_the_farthest_next_use(self):
        policy = Belady({0: [0, 1], 1: [0, 5], 2: [2], 3: []})
        for key in range(4):
            policy.on_insert(key)
        assert policy.choose_victim(()) == 3
        policy.on_access([0, 1], single([0, 1]), 1)
        assert policy.choose_victim({3}) == 1

    def test_refuses_accesses_it_was_not_built_for(self):
        with pytest.raises(AssertionError):
            Belady({0: [1], 1: [0]}).on_access([0], single([0]), 1)
