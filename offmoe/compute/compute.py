"""What computes experts from slots: the interface, and its choice per layer.

Moves: nothing between memories. The weights of each expert are read in its slot.
Bound: the device's memory bandwidth for few tokens, arithmetic for many.
Must never: read a slot before `TransferEngine.ready` returned for it. A bitwise compute must never let an output depend
on what else is computed in the same wave.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from offmoe.compute.expert_layer import ExpertLayer
from offmoe.transfer.engine import TransferEngine


class LayerInput(NamedTuple):
    """The input of one MoE layer in one step of T tokens, each routed to k experts."""

    hidden: torch.Tensor
    """[T, H], or [T * k, H]: a row for each (token, expert) pair."""
    pairs: Mapping[int, torch.Tensor] | None
    """Per expert, the positions of its pairs in the flattened [T * k]; None: there is one row, for all experts."""
    pairs_per_row: int
    """How many consecutive pairs share a row of `hidden`: k, or 1."""

    def rows(self, expert: int) -> torch.Tensor:
        """The input of one expert, [n, H]."""
        return self.hidden if self.pairs is None else self.hidden[self.pairs[expert] // self.pairs_per_row]

    def num_rows(self, expert: int) -> int:
        """n of `rows`."""
        return 1 if self.pairs is None else len(self.pairs[expert])


class ExpertCompute(ABC):
    """Computes experts of a model's MoE layers; one thread at a time."""

    is_invariant = True
    """Whether an expert's rows do not depend on the other experts of a wave."""

    @abstractmethod
    def expert(self, layer: ExpertLayer, slot: int, x: torch.Tensor) -> torch.Tensor:
        """One expert on its tokens.

        Args:
            layer: the expert's MoE layer, as `ExpertLayer.of` gives it for the expert.
            slot: where the expert stands, completely.
            x: [n, H].
        Returns:
            Rows [n, H], of x's dtype; under torch.autocast of the dtype that `layer.math` gives.
        """

    def wave(
        self, layer: ExpertLayer, experts: Sequence[tuple[int, int]], inputs: LayerInput, transfer: TransferEngine
    ) -> Iterator[torch.Tensor]:
        """Several experts of one layer, each as soon as its slot is ready.

        Args:
            experts: (expert id, slot) pairs.
            transfer: fills the slots.
        Yields:
            Per expert, in order, its rows [n, H]. A slot may be reused as soon as the next rows are asked for. Rows
            have the dtype of `inputs.hidden`, or a wider one if there is a single token: the caller casts these.
        """
        for expert, slot in experts:
            yield self._when_ready(layer.of(expert), slot, inputs.rows(expert), transfer)

    def _when_ready(self, layer: ExpertLayer, slot: int, x: torch.Tensor, transfer: TransferEngine) -> torch.Tensor:
        transfer.ready(slot)
        return self.expert(layer, slot, x)

    @abstractmethod
    def slots_moved(self) -> None:
        """Note that slots of the arena are elsewhere, and hold no reference to where they were. No call is running."""

    @abstractmethod
    def close(self) -> None:
        """End its threads once no call is running; idempotent. Nothing is computed afterwards."""


class ComputeByLayer(ExpertCompute):
    """Gives every layer to the compute chosen for it."""

    def __init__(self, by_layer: Sequence[ExpertCompute]) -> None:
        self._by_layer = by_layer
        self.is_invariant = all(compute.is_invariant for compute in by_layer)

    def expert(self, layer: ExpertLayer, slot: int, x: torch.Tensor) -> torch.Tensor:
        return self._by_layer[layer.index].expert(layer, slot, x)

    def wave(
        self, layer: ExpertLayer, experts: Sequence[tuple[int, int]], inputs: LayerInput, transfer: TransferEngine
    ) -> Iterator[torch.Tensor]:
        return self._by_layer[layer.index].wave(layer, experts, inputs, transfer)

    def slots_moved(self) -> None:
        for compute in dict.fromkeys(self._by_layer):
            compute.slots_moved()

    def close(self) -> None:
        for compute in dict.fromkeys(self._by_layer):
            compute.close()
