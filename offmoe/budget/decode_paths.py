"""What decoding on a GPU would take without a host in its way: predicted, for paths of which only the first exists.

The paths differ in what the host does for each token. In the *eager* path host and device take turns: the host waits
for the ids of every MoE layer, plans, and launches. With victims named one step ahead (*lag 1*) it launches the same
operators, waits for nothing, and runs ahead of the device: a token takes the longer of both. In a *captured* graph
nothing is launched from the host, and each small kernel costs what the device takes for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from offmoe.budget.memory_plan import MemoryPlan
from offmoe.budget.predict import (
    OPERATIONS_PER_LAYER,
    OPERATIONS_PER_TOKEN,
    STOCK_MOE_OPERATIONS,
    ExpertForm,
    Rates,
    predict,
)
from offmoe.config import OffloadConfig
from offmoe.policy.victims import NamedVictims
from offmoe.types import CacheShape

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


def decode_paths(
    shape: CacheShape, config: OffloadConfig, plan: MemoryPlan, form: ExpertForm, rates: Rates
) -> DecodePaths | None:
    """Price the three paths at the hit rate of equally likely experts.

    Args:
        shape: experts and top_k of each MoE layer.
        config: the options, resolved.
        plan: the division of memory.
        form: of the experts.
        rates: of a machine.

    Returns:
        None where victims cannot be named ahead, or no kernels of offmoe's own would compute: on a CPU, for bitwise
        results, in a pool of all layers or with fewer than 2 top_k slots per layer, and where dense layers move.
    """
    if rates.link_gb_s is None or not form.by_kernels or config.scope == "model" or plan.offloaded:
        return None
    lagged = replace(config.cache(), prefetch=0, on_miss="fetch", miss_costs=None, lag=1)
    if not NamedVictims(lagged, shape).holds_everywhere:
        return None
    fetching = config.resolved(on_miss="fetch", miss_costs=None)

    kernels = OPERATIONS_PER_TOKEN + form.layers * OPERATIONS_PER_LAYER
    kernels += form.moe_layers * (STOCK_MOE_OPERATIONS + ROUTED_LAUNCHES)
    costs = replace(rates, operation_us=0.0).costs(form)
    costs = replace(costs, dense_us_per_token=costs.dense_us_per_token + kernels * SMALL_KERNEL_US)
    eager = predict(shape, fetching, plan, rates.costs(form)).tokens_per_s
    captured = predict(shape, fetching, plan, costs).tokens_per_s
    return DecodePaths(eager, min(captured, 1e6 / (kernels * rates.operation_us)), captured)
