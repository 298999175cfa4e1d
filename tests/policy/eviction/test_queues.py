"""SIEVE and S3-FIFO against their textbook forms, which forget at once and know no protection."""

from __future__ import annotations

import random
from collections import OrderedDict, deque

import pytest

from offmoe.policy.eviction.s3_fifo import S3FIFO
from offmoe.policy.eviction.sieve import Sieve
from tests.policy.eviction.contract import PolicyContract, single


class TestSieve(PolicyContract):
    def policy(self, num_keys):
        return Sieve()

    def test_protection_costs_no_second_chance(self):
        policy = Sieve()
        for key in range(3):
            policy.on_insert(key)
        policy.on_access([0, 1], single([0, 1]), 1)
        assert policy.choose_victim({0}) == 2
        policy.on_evict(2)  # the hand spent the chance of 1 and passed 0 by
        policy.on_insert(2)
        assert policy.choose_victim({2}) == 1


class TestS3FIFO(PolicyContract):
    def policy(self, num_keys):
        return S3FIFO()

    def test_what_comes_back_soon_enters_the_main_queue(self):
        policy = S3FIFO()
        for key in (0, 1):
            policy.on_insert(key)
        assert policy.choose_victim(()) == 0
        policy.on_evict(0)
        policy.on_insert(2)
        assert policy.choose_victim(()) == 1
        policy.on_evict(1)
        policy.on_insert(0)  # a ghost: passes the small queue by
        assert policy.choose_victim(()) == 2


class TextbookSieve:
    def __init__(self, capacity):
        self.capacity, self.queue, self.visited, self.hand = capacity, [], {}, 0

    def access(self, key):
        """Whether it was there, and what it threw out."""
        if key in self.visited:
            self.visited[key] = True
            return True, None
        victim = None
        if len(self.queue) == self.capacity:
            while True:
                self.hand %= len(self.queue)
                victim = self.queue[self.hand]
                if not self.visited[victim]:
                    break
                self.visited[victim] = False
                self.hand += 1
            self.queue.pop(self.hand)
            if self.hand == len(self.queue):
                self.hand = 0
            del self.visited[victim]
        self.queue.append(key)
        self.visited[key] = False
        return False, victim


class TextbookS3FIFO:
    def __init__(self, capacity):
        self.capacity, self.enough = capacity, max(1, capacity // 10)
        self.small, self.main, self.ghosts, self.uses = deque(), deque(), OrderedDict(), {}

    def access(self, key):
        if key in self.uses:
            self.uses[key] = min(3, self.uses[key] + 1)
            return True, None
        victim = self.evict() if len(self.uses) == self.capacity else None
        self.uses[key] = 0
        if self.ghosts.pop(key, False):
            self.main.append(key)
        else:
            self.small.append(key)
        return False, victim

    def evict(self):
        while len(self.small) >= self.enough or not self.main:
            key = self.small.popleft()
            if self.uses[key] > 1:
                self.uses[key] = 0
                self.main.append(key)
            else:
                self.ghosts[key] = True
                if len(self.ghosts) > self.capacity:
                    self.ghosts.popitem(last=False)
                del self.uses[key]
                return key
        while True:
            key = self.main.popleft()
            if self.uses[key] == 0:
                del self.uses[key]
                return key
            self.uses[key] -= 1
            self.main.append(key)


@pytest.mark.parametrize(("make", "textbook"), [(Sieve, TextbookSieve), (S3FIFO, TextbookS3FIFO)])
@pytest.mark.parametrize("capacity", [1, 2, 5, 24])
def test_agrees_with_the_textbook(make, textbook, capacity):
    rng = random.Random(capacity)
    policy, book, resident = make(), textbook(capacity), set()
    for _ in range(4000):
        key = min(int(rng.expovariate(0.12)), 39)
        was_there, thrown_out = book.access(key)
        assert was_there == (key in resident)
        policy.on_access([key], single([key]), 1)
        if was_there:
            continue
        if thrown_out is not None:
            assert policy.choose_victim((key,)) == thrown_out
            policy.on_evict(thrown_out)
            resident.remove(thrown_out)
        policy.on_insert(key)
        resident.add(key)
