"""Which rows of a layer's input each expert gets, and its output rows put together in router order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from offmoe.compute.compute import LayerInput, Slotted
from offmoe.compute.expert_layer import TokenOrder
from offmoe.compute.kernels.torch_ffn import autocast_enabled, concatenate
from offmoe.types import Demand


def layer_input(
    hidden: torch.Tensor, ids: torch.Tensor, host_ids: np.ndarray, demands: Sequence[Demand], order: TokenOrder
) -> LayerInput:
    """The input of one layer, divided among its demanded experts.

    Args:
        hidden: [T, H], or [T * k, H] a row for each (token, expert) pair.
        ids: int [T, k] on the device. An id that is no expert's belongs to no demand.
        host_ids: the same on the host.
        demands: of this layer and step, ascending by expert id.
        order: in which an expert sees its tokens.
    """
    if hidden.shape[0] == 1:
        return LayerInput(hidden, None, host_ids.size, host_ids[0].tolist())
    return LayerInput(hidden, _pairs_by_expert(ids, demands, order), host_ids.size // len(hidden))


def _pairs_by_expert(ids: torch.Tensor, demands: Sequence[Demand], order: TokenOrder) -> dict[int, torch.Tensor]:
    """Per demanded expert, the positions of its (token, expert) pairs in the flattened [T * k]."""
    if order is TokenOrder.CHOICES_FIRST:
        tokens, k = ids.shape
        positions = torch.argsort(ids.T.reshape(-1), stable=True)  # in [k * T]
        positions = positions % tokens * k + positions // tokens  # in [T * k]
    else:
        # transformers sorts like this for grouped_mm, not stably. With several threads, torch's products on a CPU
        # differ in the last bits with a row's place among the others, so the order must be exactly that one.
        positions = torch.sort(ids.reshape(-1))[1]
    start = 0
    if positions.numel() > sum(d.tokens for d in demands):  # ids of no expert sort before 0 or behind the last expert
        start = int((ids < 0).sum())
    pairs = {}
    for demand in demands:
        pairs[demand.expert] = positions[start : start + demand.tokens]
        start += demand.tokens
    return pairs


class ExpertOutputs:
    """Collects the output rows of a layer's experts."""

    def __init__(self, inputs: LayerInput, num_pairs: int) -> None:
        """num_pairs: T * k, the (token, expert) pairs of the step, with ids that are no expert's."""
        self.inputs, self._num_pairs = inputs, num_pairs
        self._parts: list[tuple[list[int], torch.Tensor]] = []
        """If there is one token: experts, and their rows."""
        self._rows: torch.Tensor | None = None

    def add(self, experts: Sequence[Slotted], rows: torch.Tensor) -> None:
        """rows: [n, H], one expert's after the other's, each in the order of the expert's input."""
        positions = self.inputs.positions(experts)
        if positions is None:
            self._parts.append(([expert for expert, _ in experts], rows))
            return
        if self._rows is None:
            self._rows = rows.new_zeros(self._num_pairs, rows.shape[-1])
        self._rows[positions] = rows.to(self._rows.dtype)

    def in_router_order(self) -> torch.Tensor:
        """All rows [T * k, H]; those of ids that are no expert's are zero."""
        if self._rows is not None:
            return self._rows
        rows, routed = self._parts[0][1], self.inputs.routed
        if self._parts[0][0] != routed:
            by_expert = {e: row for experts, part in self._parts for e, row in zip(experts, part.split(1), strict=True)}
            no_experts = set(routed) - by_expert.keys()
            if no_experts:
                by_expert |= dict.fromkeys(no_experts, torch.zeros_like(rows[:1]))
            rows = concatenate([by_expert[expert] for expert in routed])
        # Kernels may give float32, which is slower to reduce. Under autocast, stock reduces rows of the experts' dtype.
        dtype = self.inputs.hidden.dtype
        return rows if rows.dtype == dtype or autocast_enabled(rows) else rows.to(dtype)
