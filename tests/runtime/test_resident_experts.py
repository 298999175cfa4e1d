"""The table of a layer's experts shows those that have landed, whatever has changed since the last look."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from offmoe.config import CacheOptions
from offmoe.policy.eviction.registry import build_eviction
from offmoe.policy.layer_cache import LayerCache, build_layers
from offmoe.runtime.resident_experts import ResidentExperts
from offmoe.types import CacheShape

EXPERTS, SLOTS, LAYERS = 6, 3, 2
SHAPE = CacheShape((EXPERTS,) * LAYERS, (2,) * LAYERS, (1,) * LAYERS)


class Slots:
    """Stands for the transfer engine and the compute: slots whose bytes are on their way, and what stands in others."""

    def __init__(self) -> None:
        self.coming: set[int] = set()
        self.looks = 0

    def is_resident(self, slots: tuple[int]) -> bool:
        self.looks += 1
        return slots[0] not in self.coming

    def prepared(self, layer: Any, slot: int) -> Any:
        return SimpleNamespace(address=1000 + slot)


def pointers(table: Any) -> list[int | None]:
    return [None] * EXPERTS if table is None else list(table._pointers)


def expected(cache: LayerCache, slots: Slots) -> list[int | None]:
    found = [cache.residency.slot_of.get(key) for key in cache.keys]
    return [None if slot is None or slot in slots.coming else 1000 + slot for slot in found]


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("seed", range(5))
def test_tables_of_changing_residents(scope: Any, seed: int) -> None:
    chance = random.Random(seed)
    slots: Any = Slots()
    layers = build_layers(SHAPE, CacheOptions(slots_per_layer=SLOTS, scope=scope), build_eviction)
    resident: Any = ResidentExperts(slots, slots)
    for _ in range(400):
        for _ in range(chance.choice([0, 1, 1, 3, 200])):
            cache = chance.choice(layers)
            key = chance.choice(cache.keys)
            if not cache.is_resident(key):
                admission = cache.residency.admit(key, ())
                assert admission is not None
                (slots.coming.add if chance.random() < 0.5 else slots.coming.discard)(admission[0])
        if slots.coming and chance.random() < 0.5:
            slots.coming.remove(chance.choice(sorted(slots.coming)))
        at = chance.randrange(LAYERS)
        assert pointers(resident.table(SimpleNamespace(index=at), layers[at])) == expected(layers[at], slots)


def test_a_look_at_what_has_not_changed_asks_nobody() -> None:
    slots: Any = Slots()
    (cache, _) = build_layers(SHAPE, CacheOptions(slots_per_layer=SLOTS), build_eviction)
    cache.residency.admit(2, ())
    resident: Any = ResidentExperts(slots, slots)
    table = resident.table(SimpleNamespace(index=0), cache)
    looks = slots.looks
    assert resident.table(SimpleNamespace(index=0), cache) is table
    assert slots.looks == looks
    cache.residency.admit(4, ())
    assert resident.table(SimpleNamespace(index=0), cache) is table
    assert slots.looks == looks + 1
    resident.slots_moved()
    assert resident.table(SimpleNamespace(index=0), cache) is not table


def test_an_interrupted_look_is_made_again() -> None:
    """A table must never name an expert that another one has replaced, whenever Ctrl-C comes."""
    slots: Any = Slots()
    (cache, _) = build_layers(SHAPE, CacheOptions(slots_per_layer=2), build_eviction)
    cache.residency.admit(0, ())
    cache.residency.admit(1, ())
    resident: Any = ResidentExperts(slots, slots)
    layer = SimpleNamespace(index=0)
    assert pointers(resident.table(layer, cache)) == expected(cache, slots)
    cache.residency.admit(3, ())
    prepared = slots.prepared

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    slots.prepared = interrupted
    with pytest.raises(KeyboardInterrupt):
        resident.table(layer, cache)
    slots.prepared = prepared
    assert pointers(resident.table(layer, cache)) == expected(cache, slots)
