"""Carries out one plan: starts its fetches, computes its waves on the device and the rest on the host.

It decides nothing and waits for nothing: the planner has decided, and the transfer engine waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offmoe.compute.compute import ExpertCompute, LayerInput
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.runtime.host_experts import HostExperts
from offmoe.runtime.rows import ExpertOutputs
from offmoe.transfer.engine import TransferEngine
from offmoe.types import Plan, Wave


class PlanRunner:
    """Carries out plans of one model, for the thread that runs it."""

    def __init__(self, compute: ExpertCompute, transfer: TransferEngine, host: HostExperts | None) -> None:
        """host: computes what plans leave to the host; None: they leave nothing to it."""
        self._compute, self._transfer, self._host = compute, transfer, host

    def token(self, layer: ExpertLayer, plan: Plan, routed: Sequence[int], hidden: torch.Tensor) -> torch.Tensor | None:
        """Carry out a plan for one token whose experts are all hits, in one call of the compute.

        Args:
            routed: the experts in router order, each once.
            hidden: [1, H].
        Returns:
            Rows [k, H], unweighted; None if it takes more than one call. Nothing has happened then.
        """
        transfer, slot_of = self._transfer, dict(plan.waves[0].experts)
        slots = [slot_of[expert] for expert in routed]
        if not transfer.is_resident(slots):  # the background fill is still on its way there
            return None
        rows = self._compute.token(layer, slots, hidden)
        if rows is not None:
            transfer.computed(slots)
            transfer.read_ahead(plan.read_ahead)
            if plan.prefetches:
                transfer.prefetch(plan.prefetches)
        return rows

    def run(self, layer: ExpertLayer, plan: Plan, outputs: ExpertOutputs) -> None:
        """Carry out any plan; its rows are added to `outputs`."""
        inputs = outputs.inputs
        with self._compute.surround(layer):
            received = self._start(plan, inputs)
            is_only = len(plan.waves) == 1
            for wave in plan.waves:
                self._compute_wave(layer, wave, outputs, is_only)
                if received is not None and self._host is not None:  # while the device computes its first wave
                    for pair, rows in self._host.run(layer, plan.on_host, received, inputs):
                        outputs.add((pair,), rows)
                    received = None
        if plan.prefetches:
            self._transfer.prefetch(plan.prefetches)

    def _start(self, plan: Plan, inputs: LayerInput) -> torch.Tensor | None:
        """Start every fetch of the plan; gives the rows for the host's experts, in RAM."""
        transfer, received = self._transfer, None
        if plan.on_host:
            assert self._host is not None
            received = self._host.receive(plan.on_host, inputs)
            # The first wave's experts come first: later, readers may wait for the host to free its scratch slots.
            transfer.demand([slot for _, slot in plan.waves[0].experts])
            transfer.stream(plan.on_host)
        transfer.stream(plan.waves)
        transfer.read_ahead(plan.read_ahead)
        return received

    def _compute_wave(self, layer: ExpertLayer, wave: Wave, outputs: ExpertOutputs, is_only: bool) -> None:
        for computed, rows in self._compute.wave(layer, wave.experts, outputs.inputs, self._transfer):
            outputs.add(computed, rows)
            if not is_only:  # at once: experts of a later wave may be waiting for these slots
                self._transfer.computed([slot for _, slot in computed])
        if is_only:
            self._transfer.computed([slot for _, slot in wave.experts])
