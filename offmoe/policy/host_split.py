"""Which missed experts the host computes while the others travel to a device with memory of its own.

Device, link and host work at once, and both ways should end together. Heavy experts travel first, since the host pays
for every token and the link does not; then those likeliest to be demanded again, since what travels stays. Every cut
through that order is tried. The time of a cut is weighed against what it leaves in the slots: an expert that displaces
a likelier one costs a later miss, an expert that is likelier than its victim saves one.

Costs are constants of the run and recorded with its trace, so that a replay decides the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from offmoe.policy.admission import AdmissionPolicy
from offmoe.policy.layer_cache import LayerCache
from offmoe.profile import MissCosts

REFILL_CHANCE = 0.6
"""Chance of being demanded before its victim from which an expert that the host computed is prefetched afterwards."""


class Missed(NamedTuple):
    """A missed expert: its key, the tokens routed to it, and the chance that it is demanded before its victim."""

    key: int
    tokens: int
    chance: float


def split_misses(
    cache: LayerCache,
    admission: AdmissionPolicy,
    costs: MissCosts,
    missing: Sequence[int],
    tokens: Mapping[int, int],
    protected: Collection[int],
) -> dict[int, float]:
    """Divide the missing keys of one access between link and host. What fits into free slots travels.

    Args:
        tokens: by key of the access, the tokens routed to it.
        protected: every key of the access.

    Returns:
        The keys for the host, ascending, each with the chance that it is demanded before what it would replace.
    """
    residency, score = cache.residency, cache.policy.score
    chances = {}
    for key in cache.best_first(missing)[residency.num_free :]:
        victim = residency.victim(protected)
        chances[key] = 0.5 if victim is None else admission.chance(key, victim, score(key), score(victim))
    if not admission.evicts:
        return dict(sorted(chances.items()))
    missed = [Missed(key, tokens[key], chance) for key, chance in chances.items()]
    computed = for_host(missed, len(tokens) - len(missing), costs, cache.byte_scale)
    return {key: chances[key] for key in computed}


def for_host(missed: Iterable[Missed], num_hits: int, costs: MissCosts, byte_scale: float) -> list[int]:
    """Keys for the host to compute, ascending.

    Args:
        num_hits: experts that the device computes in any case.
        byte_scale: bytes of one expert of this layer relative to those that `costs` are for.
    """
    order = sorted(missed, key=lambda m: (-m.tokens, -m.chance, m.key))
    later_miss_s = min(costs.link_us, costs.host_us) * byte_scale * 1e-6
    best, best_cost_s, regret_s = 0, 0.0, 0.0
    for cut in range(len(order) + 1):  # order[:cut] travels
        if cut:
            regret_s += later_miss_s * (1.0 - 2.0 * order[cut - 1].chance)
        link_us = cut * costs.link_us * byte_scale
        device_s = (num_hits + cut) * costs.device_us * byte_scale * 1e-6
        # The last expert that travels is computed after it and the host's results have arrived.
        last_s = costs.device_us * byte_scale * 1e-6 if cut else 0.0
        on_host = order[cut:]
        host_s = costs.host_s([m.tokens for m in on_host], link_us, byte_scale) if on_host else 0.0
        cost_s = max(device_s, max(link_us * 1e-6, host_s) + last_s) + regret_s
        if cut == 0 or cost_s <= best_cost_s:
            best, best_cost_s = cut, cost_s
    return sorted(m.key for m in order[best:])


def best_refill(cache: LayerCache, computed: Mapping[int, float]) -> int | None:
    """The likeliest of the keys that the host computes, if RAM holds it and it is likely enough to be worth a slot."""
    tier = cache.host_tier
    worthy = [key for key, chance in computed.items() if chance >= REFILL_CHANCE]
    in_ram = [key for key in worthy if tier is not None and tier.holds(key)]
    return max(in_ram, key=lambda key: (computed[key], -key), default=None)
