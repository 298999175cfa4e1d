"""How long the host takes for one expert, measured while a model is loaded: what is assumed may be off by a hundred.

Moves: nothing. The weights in the scratch slots are whatever stands there; kernels take as long for any.
Bound: half a second per number, or one call where a call takes longer.
Must never: decide anything, or replace what a profile has measured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch

from offmoe.compute.compute import ExpertCompute
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.profile import MissCosts

logger = logging.getLogger(__name__)

ROUNDS = 5
MOST_S = 0.5
"""Seconds after which no further round begins."""
COLD_BYTES = 64 << 20
"""Bytes that are written before each call, so that weights come from memory and not from a cache, as in a real step."""
DISAGREES = 2.0
"""A time is replaced if it is off by more than this factor; below that, decisions hardly change."""
TOKENS = 4
"""Rows of the second measurement, from which the cost of a further token follows."""


def probed_costs(
    costs: MissCosts, compute: ExpertCompute, layer: ExpertLayer, slots: Sequence[int], x: torch.Tensor
) -> MissCosts:
    """Assumed costs of a miss, with the host's times as they are on this machine where the two disagree.

    Args:
        costs: as assumed.
        compute: computes experts in `slots`.
        layer: the one with the largest experts, as they stand in `slots`.
        slots: scratch slots in RAM.
        x: [1, H] of the model's dtype, in RAM.

    Returns:
        `costs`, unless the host's time for one token is off by more than DISAGREES.
    """
    host_us = _expert_us(compute, layer, slots, x)
    if max(host_us, costs.host_us) <= DISAGREES * min(host_us, costs.host_us):
        return costs
    more_us = _expert_us(compute, layer, slots, x.expand(TOKENS, -1).contiguous())
    logger.warning(
        "the host computes one expert in %.0f us where %.0f us were assumed; misses are decided by what was measured. "
        "'offmoe calibrate' measures the rest.",
        host_us,
        costs.host_us,
    )
    return replace(
        costs,
        host_us=host_us,
        host_shared_us=host_us * costs.host_shared_us / costs.host_us,
        host_token_us=max(0.0, more_us - host_us) / (TOKENS - 1),
    )


def _expert_us(compute: ExpertCompute, layer: ExpertLayer, slots: Sequence[int], x: torch.Tensor) -> float:
    """Median microseconds of one expert on the rows x; of the first call alone if that took MOST_S."""
    began = time.perf_counter()
    for slot in slots:  # also maps the slots' pages and prepares the kernels' pointers
        compute.expert(layer, slot, x)
    if (warm := time.perf_counter() - began) > MOST_S:
        return warm / len(slots) * 1e6
    others, times = torch.empty(COLD_BYTES, dtype=torch.uint8), []
    began = time.perf_counter()
    for i in range(ROUNDS):
        others.fill_(i)
        start = time.perf_counter()
        compute.expert(layer, slots[i % len(slots)], x)
        times.append(time.perf_counter() - start)
        if time.perf_counter() - began > MOST_S:
            break
    return median(times) * 1e6
