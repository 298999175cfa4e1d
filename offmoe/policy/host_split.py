"""Which of a layer's missed experts the host computes while others travel to the device, so that both end together.

Nothing moves. Device, link and host work at once; disk reads are needed either way. Heavy experts travel first (the
host pays for every token, the link does not), then those likeliest to be wanted again, since what travels stays. Every
cut through that order is tried. A makespan is weighed against what the cut leaves in slots: an expert that displaces a
likelier one costs a later miss, one that is likelier than what it displaces saves one.

Costs are constants of the run, recorded with its trace (rule R1). Must never look at a clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from offmoe.profile import MissCosts


class Missed(NamedTuple):
    """An expert without a slot: key, tokens, and the chance that it is demanded before what it would replace."""

    key: int
    tokens: int
    chance: float


def on_host(missed: Sequence[Missed], hits: int, costs: MissCosts, scale: float) -> list[int]:
    """Keys for the host to compute, ascending. hits: experts that the device computes anyway. scale: bytes of an expert
    of this layer, in those that `costs` are of.
    """
    order = sorted(missed, key=lambda m: (-m.tokens, -m.chance, m.key))
    later_miss = min(costs.link_us, costs.host_us) * scale * 1e-6
    best, best_cost, regret = 0, 0.0, 0.0
    for cut in range(len(order) + 1):
        if cut:
            regret += later_miss * (1.0 - 2.0 * order[cut - 1].chance)
        link_us = cut * costs.link_us * scale
        device_s = (hits + cut) * costs.device_us * scale * 1e-6
        last_s = costs.device_us * scale * 1e-6 if cut else 0.0  # is computed once it and the host's results are there
        left = order[cut:]
        host_s = costs.host_s([m.tokens for m in left], link_us, scale) if left else 0.0
        cost = max(device_s, max(link_us * 1e-6, host_s) + last_s) + regret
        if cut == 0 or cost <= best_cost:
            best, best_cost = cut, cost
    return sorted(m.key for m in order[best:])
