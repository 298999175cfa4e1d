"""Another division into slots keeps the bytes that it is to keep, and moves no more than it must."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from offmoe.device import blocks as module
from offmoe.device.blocks import Place, Rearrangement, rearrange


@pytest.fixture(autouse=True)
def few_slots_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 40)


def sizes_of(old: list[list[int]], change: Rearrangement) -> list[list[int]]:
    return [*(old[block] for block in change.kept), *map(list, change.new)]


@pytest.mark.parametrize("seed", range(200))
def test_any_change_of_any_division(seed: int) -> None:
    rng = random.Random(seed)
    classes = [10] if seed % 2 else [10, 25, 60]
    old: list[list[int]] = []
    places: tuple[Place, ...] = ()
    content: dict[int, float] = {}
    for _ in range(6):
        wanted = [rng.choice(classes) for _ in range(rng.randrange(14))]
        before = {slot: old[place.block][place.position] for slot, place in enumerate(places)}
        keep: dict[int, int] = {}
        for slot, size in enumerate(wanted):
            free = [s for s, nbytes in before.items() if nbytes == size and s not in keep.values()]
            if free and rng.random() < 0.7:
                keep[slot] = rng.choice(free)
        change = rearrange(old, places, wanted, keep)
        new = sizes_of(old, change)
        assert Counter(size for block in new for size in block) == Counter(wanted), "no byte more than is wanted"
        assert len(set(change.places)) == len(wanted), "no two slots in one place"
        assert [new[place.block][place.position] for place in change.places] == wanted
        assert all(sum(block) <= 40 or len(block) == 1 for block in change.new)
        staying = [(slot, place) for slot, place in enumerate(places) if place.block in change.kept]
        at = {Place(change.kept.index(place.block), place.position): content[slot] for slot, place in staying}
        for from_place, to_place in change.moves:
            assert from_place.block not in change.kept, "only what is given back must move"
            at[to_place] = content[places.index(from_place)]
        for slot, kept in keep.items():
            assert at[change.places[slot]] == content[kept]
        content = {slot: at[change.places[slot]] if slot in keep else rng.random() for slot in range(len(wanted))}
        old, places = new, change.places


def test_growing_moves_nothing() -> None:
    places = (Place(0, 0), Place(0, 1))
    change = rearrange([[10, 10]], places, [10] * 9, {0: 0, 5: 1})
    assert (change.kept, change.moves) == ((0,), ())
    assert change.new == ((10,) * 4, (10,) * 3)
    assert (change.places[0], change.places[5]) == (Place(0, 0), Place(0, 1))


def test_blocks_without_kept_slots_are_given_back_first() -> None:
    places = tuple(Place(block, index) for block in range(3) for index in range(4))
    change = rearrange([[10] * 4] * 3, places, [10] * 4, {0: 5, 1: 6})
    assert (change.kept, change.new, change.moves) == ((1,), (), ())
