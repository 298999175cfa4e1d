"""What holds for every planner after every access, whatever was demanded."""

from __future__ import annotations

from offmoe.policy.host_tier import HostTier
from offmoe.policy.planner import Planner
from offmoe.policy.residency import Residency


def check_planner(planner: Planner) -> None:
    """Assert the invariants of every layer's slots on the device and in RAM."""
    for cache in planner.layers:
        check_residency(cache.residency)
        if cache.host_tier is not None:
            check_host_tier(cache.host_tier)


def check_residency(residency: Residency) -> None:
    """Assert that every slot is free or held by exactly one key, and that pending keys are resident."""
    assert sorted([*residency.slot_of.values(), *residency._free]) == sorted(residency._slots)
    assert residency._pending <= residency.slot_of.keys()


def check_host_tier(tier: HostTier) -> None:
    """Assert that each slot is free or holds one copy, and that each copy has an entry that leads to its score."""
    assert sorted([*tier._slot_of.values(), *tier._free]) == sorted(tier.slots)
    assert len(tier._ram_only) <= tier._most_entries
    assert len(tier._on_both) <= tier._most_entries
    for key in tier._slot_of:
        score = tier._policy.score(key)
        if key in tier._on_device:
            assert key in tier._changed or (-score, key) in tier._on_both
        else:
            assert any(other == key and entry <= score for entry, other in tier._ram_only)
