"""What decoding a recording on a GPU would take in three ways, at the costs of a profile. Predicted, never measured.

*Eager*: the host waits for the ids of every MoE layer, so host and device take turns. *Lag 1*: the host launches the
same operators and waits for nothing; a token takes the longer of both. *Captured*: nothing is launched from the host,
and each small kernel costs what the device takes for it. Misses and stalls are those of the replay.

A profile's costs were measured with launches. The device's part is what is left without them: so many operations, at
an assumed time for each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from offmoe.config import CacheOptions
from offmoe.policy.victims import NamedVictims
from offmoe.profile import CostModel
from offmoe.simulate.replay import Recording
from offmoe.simulate.sweep import Settings, evaluate

OPERATIONS_PER_TOKEN, OPERATIONS_PER_LAYER = 50, 46
"""Operations of torch, besides those inside of others: of one token without its layers, and of a decoder layer without
experts. torch's profiler counts 556 per token of the demo model, which has 6 layers and top-2."""
STOCK_MOE_OPERATIONS, OPERATIONS_PER_MOE_LAYER = 22, 60
"""The same of a MoE layer besides its experts: in stock transformers, and in offmoe, whose plans and bookkeeping in
Python take as long as some forty operations more."""
OPERATIONS_PER_LAUNCHED = 2
"""Operations of one expert of several that kernels compute in one launch."""
OPERATION_US = 6.0
"""Microseconds that one of them takes, Python included, where nothing was measured. The demo model takes 8.7 ms, 11 us
for each, on one thread of a 2.5 GHz Xeon (docs/measurements.md, "Overhead"); a desktop is assumed to be twice as fast.
"""
ROUTED_LAUNCHES = 4
"""Kernels of a MoE layer's experts: `assign`, `gather`, `gate_up_rows`, `down_reduced` (compute/kernels/routed.py)."""
SMALL_KERNEL_US = 1.6
"""Microseconds of the device for a kernel that has next to nothing to do, launched in a graph. Assumed: 0.1 ms for the
some 60 kernels of a layer; no graph of ours has run on a GPU."""


class DecodePaths(NamedTuple):
    """Predicted tokens/s of three ways of decoding, with the same misses."""

    eager: float
    lag_1: float
    captured: float

    def to_dict(self) -> dict[str, object]:
        """The prices for JSON; every key says that they are predicted."""
        return {f"predicted_{name}_tokens_per_s": value for name, value in self._asdict().items()}


def kernels_per_token(layers: int, moe_layers: int) -> int:
    """Launches of a token whose MoE layers need nothing of the host."""
    return OPERATIONS_PER_TOKEN + layers * OPERATIONS_PER_LAYER + moe_layers * (STOCK_MOE_OPERATIONS + ROUTED_LAUNCHES)


def decode_prices(recording: Recording, options: CacheOptions, costs: CostModel | None) -> DecodePaths | None:
    """Price the three ways for the steps of one token of a recording, as if every decoder layer had experts.

    Args:
        options: of the cache; every miss is fetched, and nothing ahead.
        costs: of a profile.

    Returns:
        None without costs, without a link to a device, and where victims cannot be named ahead.
    """
    shape = recording.trace.shape
    if costs is None or costs.h2d_gb_s is None:
        return None
    fetching = replace(options, prefetch=0, on_miss="fetch", miss_costs=None, lag=1)
    if not NamedVictims(fetching, shape).holds_everywhere:
        return None
    layers = shape.layers
    operations = OPERATIONS_PER_TOKEN + layers * (OPERATIONS_PER_LAYER + OPERATIONS_PER_MOE_LAYER)
    kernels = kernels_per_token(layers, layers)
    dense_us = max(0.0, costs.dense_us_per_token - operations * OPERATION_US) + kernels * SMALL_KERNEL_US
    expert_us = max(0.0, costs.expert_us_device - OPERATIONS_PER_LAUNCHED * OPERATION_US)
    on_device = replace(costs, dense_us_per_token=dense_us, expert_us_device=expert_us)
    eager = evaluate(recording, replace(fetching, lag=0), Settings(costs)).whole.tokens_per_s
    captured = evaluate(recording, fetching, Settings(on_device)).whole.tokens_per_s
    if eager is None or captured is None:
        return None
    return DecodePaths(eager, min(captured, 1e6 / (kernels * OPERATION_US)), captured)
