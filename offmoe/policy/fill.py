"""Where the background fill brings which expert: free slots and free RAM slots are divided among experts by an order.

A fill never evicts, and it takes effect between two accesses only (`Planner.fill`, `Planner.fill_ram`). A recording
holds every fill that took effect, so that a replay decides the same. Which fills have landed by then is a matter of
time, which nothing in this package sees.

The most popular experts get the slots that demands take last. A demand that needs a slot for itself then displaces the
least popular fill that is still on its way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from offmoe.policy.planner import Planner
from offmoe.types import CacheShape, ExpertKey, Fill


def plan_fills(planner: Planner, order: Iterable[ExpertKey]) -> list[Fill]:
    """The experts that free slots are to be filled with.

    An expert goes into a free device slot of its pool, else into a free RAM slot of its layer. Where RAM has room for
    every expert of a layer, an expert with a device slot gets a copy in RAM by the same read; elsewhere RAM slots that
    are still free get copies at the end.

    Args:
        planner: Its residency is read and not changed.
        order: The experts in the order in which they should come, each at most once.

    Returns:
        The fills in the order in which they should be read.
    """
    order = list(order)
    pools = {id(cache.residency): [*reversed(cache.residency.free_slots)] for cache in planner.layers}
    ram = [[] if cache.host_tier is None else [*reversed(cache.host_tier.free_slots)] for cache in planner.layers]
    fills: list[Fill] = []
    later: list[ExpertKey] = []
    for expert in order:
        cache = planner.layers[expert.layer]
        key, slots, ram_slots = cache.keys[expert.expert], pools[id(cache.residency)], ram[expert.layer]
        tier = cache.host_tier
        in_ram = tier is not None and tier.holds(key)
        if cache.is_resident(key):
            if not in_ram:
                later.append(expert)
        elif slots:
            both = tier is not None and not in_ram and len(tier.slots) >= len(cache.keys)
            fills.append(Fill(expert, slots.pop(), ram_slots.pop() if both and ram_slots else None))
            if not in_ram and not both:
                later.append(expert)
        elif ram_slots and not in_ram:
            fills.append(Fill(expert, None, ram_slots.pop()))
    for expert in later:
        if ram[expert.layer]:
            fills.append(Fill(expert, None, ram[expert.layer].pop()))
    return fills


def fill_order(
    shape: CacheShape,
    positions: Mapping[ExpertKey, tuple[int, int]],
    counts: Sequence[Sequence[float]] | None = None,
    residents: Collection[ExpertKey] = (),
) -> list[ExpertKey]:
    """All experts of a model, the most popular first.

    Args:
        shape: The model.
        positions: By expert, where it is at rest: (shard, byte).
        counts: Per MoE layer, uses of each expert. None: file order.
        residents: Experts that had a slot at the end of the run that was counted; they win ties.
    """
    experts = [ExpertKey(layer, expert) for layer, count in enumerate(shape.experts) for expert in range(count)]
    if counts is None:
        return sorted(experts, key=lambda key: positions[key])
    held = frozenset(residents)
    return sorted(experts, key=lambda key: (-counts[key.layer][key.expert], key not in held, positions[key]))
