"""Carries out one plan for several callers whose rows are to have the bits that each of them gets alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from offmoe.compute.compute import ExpertCompute
from offmoe.runtime.calls import LayerCall
from offmoe.runtime.rows import ExpertOutputs, layer_input
from offmoe.transfer.engine import TransferEngine
from offmoe.types import CacheShape, Plan, count_demands


def carry_out_apart(
    plan: Plan,
    calls: Sequence[LayerCall],
    host_ids: np.ndarray,
    shape: CacheShape,
    compute: ExpertCompute,
    transfer: TransferEngine,
) -> list[torch.Tensor]:
    """Compute one caller's rows after the other, expert by expert.

    Args:
        plan: of one access for all of them.
        host_ids: [T, k] of all callers.

    Returns:
        Per caller, rows [T * k, H] in router order.
    """
    assert not plan.on_host, "rows that the host computes are computed together"
    outputs, needs, start = [], [], 0
    for call in calls:
        ids = host_ids[start : start + len(call.ids)]  # [tokens of the caller, k]
        start += len(ids)
        demands, _ = count_demands(ids, shape.experts[call.layer.index])
        inputs = layer_input(call.hidden, call.ids, ids, demands, call.layer.order)
        outputs.append(ExpertOutputs(inputs, ids.size))
        needs.append([demand.expert for demand in demands])
    with compute.surround(calls[0].layer):
        transfer.stream(plan.waves)
        transfer.read_ahead(plan.read_ahead)
        for expert, slot in [pair for wave in plan.waves for pair in wave.experts]:
            for call, output, need in zip(calls, outputs, needs, strict=True):
                if expert in need:
                    for computed, rows in compute.wave(call.layer, [(expert, slot)], output.inputs, transfer):
                        output.add(computed, rows)
            transfer.computed((slot,))
    if plan.prefetches:
        transfer.prefetch(plan.prefetches)
    return [
        output.in_router_order() if need else call.hidden.new_zeros(call.ids.numel(), call.hidden.shape[-1])
        for call, output, need in zip(calls, outputs, needs, strict=True)
    ]
