"""Which caches are kept, found again and evicted. The caches themselves are small."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from offmoe.serve.kept import CROP, EXACT, NOTHING, NUMERIC, OFF, SNAPSHOT, Kept, KeptCaches, crop


def cache_of(tokens: int) -> DynamicCache:
    cache = DynamicCache()
    states = torch.arange(float(tokens)).reshape(1, 1, tokens, 1)
    for layer in range(2):
        cache.update(states, states, layer)
    return cache


def kept_of(*ids: int) -> Kept:
    return Kept(tuple(ids), cache_of(len(ids)))


def keep(caches: KeptCaches, *ids: int) -> None:
    caches.begin(ids, len(ids))
    caches.end(len(ids), kept_of(*ids))


def test_the_longest_beginning_is_found_in_whole_chunks() -> None:
    caches = KeptCaches(100, chunk=4, mode=EXACT, kind=CROP)
    keep(caches, *range(8))
    keep(caches, *range(100, 112))
    found = caches.begin((0, 1, 2, 3, 4, 5, 99, 7, 8), 20)
    assert found is not None
    assert found.ids == (0, 1, 2, 3)
    assert found.cache.get_seq_length() == 4
    assert caches.conversations == 2  # what is kept has more than the answer uses, so the answer got a copy


def test_one_token_is_always_computed() -> None:
    exact, numeric = (KeptCaches(100, chunk=4, mode=mode, kind=CROP) for mode in (EXACT, NUMERIC))
    for caches, expected in ((exact, 4), (numeric, 7)):
        keep(caches, *range(8))
        found = caches.begin(tuple(range(8)), 8)
        assert found is not None
        assert len(found.ids) == expected


def test_a_longer_conversation_takes_the_place_of_its_beginning() -> None:
    caches = KeptCaches(100, chunk=4, mode=EXACT, kind=CROP)
    keep(caches, *range(4))
    keep(caches, *range(8))
    assert (caches.conversations, caches.kept) == (1, 8)


def test_the_least_recently_used_makes_room() -> None:
    caches = KeptCaches(20, chunk=4, mode=EXACT, kind=CROP)
    for first in (0, 100, 200):
        keep(caches, *range(first, first + 4))
    caches.begin((*range(4), 9), 5)  # used, and taken
    assert caches.kept == 8
    caches.end(5, kept_of(*range(4)))
    caches.begin(tuple(range(300, 314)), 14)
    assert [kept.ids[0] for kept in caches._kept] == [0]
    assert caches.running + caches.kept <= 20


def test_running_answers_are_never_evicted() -> None:
    caches = KeptCaches(10, chunk=4, mode=EXACT, kind=CROP)
    caches.begin((1, 2), 8)
    assert caches.has_room(2)
    assert not caches.has_room(3)
    caches.end(8, None)
    assert caches.has_room(10)


def test_snapshots_are_reused_whole_or_not_at_all() -> None:
    caches = KeptCaches(100, chunk=4, mode=EXACT, kind=SNAPSHOT)
    assert caches.needs_snapshot
    keep(caches, *range(8))
    assert caches.begin((*range(6), 50, 51, 52), 9) is None
    found = caches.begin((*range(8), 50), 9)
    assert found is not None
    assert len(found.ids) == 8


@pytest.mark.parametrize(("mode", "kind"), [(OFF, CROP), (EXACT, NOTHING)])
def test_nothing_is_kept(mode: str, kind: str) -> None:
    caches = KeptCaches(100, chunk=4, mode=mode, kind=kind)
    keep(caches, *range(8))
    assert (caches.kept, caches.boundary(9), caches.begin(tuple(range(9)), 9)) == (0, 0, None)


def test_crops_layers_that_a_broken_pass_left_at_different_lengths() -> None:
    cache = cache_of(6)
    more = torch.ones(1, 1, 2, 1)
    cache.update(more, more, 0)
    assert crop(cache, 4)
    assert [cache.get_seq_length(layer) for layer in range(2)] == [4, 4]
    assert not crop(cache, 5)
