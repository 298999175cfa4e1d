"""Which rows of a layer's input each expert gets, and its output rows put together in router order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from offmoe.compute.compute import LayerInput
from offmoe.compute.expert_layer import TokenOrder
from offmoe.compute.kernels.torch_ffn import autocast_enabled, concatenate
from offmoe.types import Demand


def layer_input(hidden: torch.Tensor, ids: torch.Tensor, demands: Sequence[Demand], order: TokenOrder) -> LayerInput:
    """The input of one layer, divided among its demanded experts.

    Args:
        hidden: [T, H], or [T * k, H] a row for each (token, expert) pair.
        ids: int [T, k] on the device. An id that is no expert's belongs to no demand.
        demands: of this layer and step, ascending by expert id.
        order: in which an expert sees its tokens.
    """
    pairs = None if len(hidden) == 1 else _pairs_by_expert(ids, demands, order)
    return LayerInput(hidden, pairs, ids.numel() // len(hidden))


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

    def __init__(self, inputs: LayerInput, ids: np.ndarray) -> None:
        """ids: int [T, k], as routed."""
        self.inputs, self._ids = inputs, ids
        self._by_expert: dict[int, torch.Tensor] = {}
        self._rows: torch.Tensor | None = None

    def add(self, expert: int, rows: torch.Tensor) -> None:
        """rows: [n, H], in the order of the expert's input."""
        pairs = self.inputs.pairs
        if pairs is None:
            self._by_expert[expert] = rows
            return
        if self._rows is None:
            self._rows = rows.new_zeros(self._ids.size, rows.shape[-1])
        self._rows[pairs[expert]] = rows.to(self._rows.dtype)

    def in_router_order(self) -> torch.Tensor:
        """All rows [T * k, H]; those of ids that are no expert's are zero."""
        if self._rows is not None:
            return self._rows
        by_expert, ids = self._by_expert, self._ids[0].tolist()
        if len(by_expert) < len(ids):
            zeros = torch.zeros_like(next(iter(by_expert.values())))
            by_expert |= {expert: zeros for expert in ids if expert not in by_expert}
        parts = [by_expert[expert] for expert in ids]
        if autocast_enabled(parts[0]):
            return concatenate(parts)  # stock reduces rows of the experts' own dtype then
        return torch.cat(parts).to(self.inputs.hidden.dtype)  # kernels may give float32, which is slower to reduce
