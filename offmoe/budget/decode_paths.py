"""What decoding on a GPU would take without a host in its way: predicted, since none of it has run on one.

The paths differ in what the host does for each token. In the *eager* path host and device take turns: the host waits
for the ids of every MoE layer, plans, and launches. With victims named one step ahead (*lag 1*) it launches the same
operators, waits for nothing, and runs ahead of the device: a token takes the longer of both. In a *captured* graph
nothing is launched from the host, and each small kernel costs what the device takes for it.
"""

from __future__ import annotations

from dataclasses import replace

from offmoe.budget.memory_plan import MemoryPlan
from offmoe.budget.predict import ExpertForm, Rates, predict
from offmoe.config import OffloadConfig
from offmoe.policy.victims import NamedVictims
from offmoe.simulate.decode_prices import SMALL_KERNEL_US, DecodePaths, kernels_per_token
from offmoe.types import CacheShape


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

    kernels = kernels_per_token(form.layers, form.moe_layers)
    costs = replace(rates, operation_us=0.0).costs(form)
    costs = replace(costs, dense_us_per_token=costs.dense_us_per_token + kernels * SMALL_KERNEL_US)
    eager = predict(shape, fetching, plan, rates.costs(form)).tokens_per_s
    captured = predict(shape, fetching, plan, costs).tokens_per_s
    return DecodePaths(eager, min(captured, 1e6 / (kernels * rates.operation_us)), captured)
