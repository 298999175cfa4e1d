"""What computes experts from slots: the interface, and its choice per layer.

Moves: nothing between memories. The weights of each expert are read in its slot.
Bound: the device's memory bandwidth for few tokens, arithmetic for many.
Must never: give what was read in a slot before `TransferEngine.ready` returned for it. A bitwise compute must never let
an output depend on what else is computed in the same wave.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.kernels.cpu import PreparedExpert
from offmoe.transfer.engine import TransferEngine

Slotted = tuple[int, int]
"""An expert's id and its slot."""


class LayerInput(NamedTuple):
    """The input of one MoE layer in one step of T tokens, each routed to k experts."""

    hidden: torch.Tensor
    """[T, H], or [T * k, H]: a row for each (token, expert) pair."""
    pairs: Mapping[int, torch.Tensor] | None
    """Per expert, the positions of its pairs in the flattened [T * k]; None: there is one row, for all experts."""
    pairs_per_row: int
    """How many consecutive pairs share a row of `hidden`: k, or 1."""
    routed: Sequence[int] = ()
    """The experts of the only row, in router order; () if there are several rows."""

    def rows(self, expert: int) -> torch.Tensor:
        """The input of one expert, [n, H]."""
        return self.hidden if self.pairs is None else self.hidden[self.pairs[expert] // self.pairs_per_row]

    def num_rows(self, expert: int) -> int:
        """n of `rows`."""
        return 1 if self.pairs is None else len(self.pairs[expert])

    def positions(self, experts: Sequence[Slotted]) -> torch.Tensor | None:
        """`pairs` of these experts, one expert's after the other's; None if there is one row."""
        if self.pairs is None:
            return None
        if len(experts) == 1:
            return self.pairs[experts[0][0]]
        return torch.cat([self.pairs[expert] for expert, _ in experts])

    def in_router_order(self, experts: Sequence[Slotted]) -> Sequence[Slotted]:
        """The experts in the order in which the only row was routed to them; as they are if there are several rows.

        Rows that are computed in router order need not be put in order afterwards.
        """
        slots = dict(experts)
        if len(self.routed) < len(slots):
            return experts
        return [(expert, slots[expert]) for expert in dict.fromkeys(self.routed) if expert in slots]


def groups(experts: Sequence[Slotted], inputs: LayerInput, most_rows: int) -> Iterator[Sequence[Slotted]]:
    """The experts in groups of at most `most_rows` rows each, or of one expert."""
    if inputs.pairs is None and len(experts) <= most_rows:
        if experts:
            yield experts
        return
    group, num_rows = list[Slotted](), 0
    for pair in experts:
        rows = inputs.num_rows(pair[0])
        if group and num_rows + rows > most_rows:
            yield group
            group, num_rows = [], 0
        group.append(pair)
        num_rows += rows
    if group:
        yield group


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
        self, layer: ExpertLayer, experts: Sequence[Slotted], inputs: LayerInput, transfer: TransferEngine
    ) -> Iterator[tuple[Sequence[Slotted], torch.Tensor]]:
        """Several experts of one layer, each as soon as its slot is ready.

        Args:
            experts: those of the wave.
            transfer: fills the slots.
        Yields:
            Experts that were computed at once, and their rows [n, H], one expert's after the other's. Every expert of
            the wave comes once. Their slots may be reused as soon as the next ones are asked for. Rows have the dtype
            of `inputs.hidden`, or a wider one: the caller casts them.
        """
        for expert, slot in experts:
            yield ((expert, slot),), self._when_ready(layer.of(expert), slot, inputs.rows(expert), transfer)

    def surround(self, layer: ExpertLayer) -> AbstractContextManager[None]:
        """Surrounds the waves of one layer and what moves rows between them."""
        return nullcontext()

    def token(self, layer: ExpertLayer, slots: Sequence[int], hidden: torch.Tensor) -> torch.Tensor | None:
        """All experts of a single token, in one piece: what `wave` would give, with less work of the host.

        Args:
            slots: per expert, in router order; all are ready.
            hidden: [1, H].
        Returns:
            Rows [k, H] of hidden's dtype; None if this compute has no such way.
        """
        return None

    def prepared(self, layer: ExpertLayer, slot: int) -> PreparedExpert | None:
        """The expert that stands in a slot, for C kernels that compute more than experts; None: they do not take it.

        It is to be used before slots move or another expert stands there.
        """
        return None

    def _when_ready(self, layer: ExpertLayer, slot: int, x: torch.Tensor, transfer: TransferEngine) -> torch.Tensor:
        transfer.ready(slot)
        return self.expert(layer, slot, x)

    def of(self, index: int) -> ExpertCompute:
        """What computes the layer of this index."""
        return self

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

    def of(self, index: int) -> ExpertCompute:
        return self._by_layer[index]

    def expert(self, layer: ExpertLayer, slot: int, x: torch.Tensor) -> torch.Tensor:
        return self._by_layer[layer.index].expert(layer, slot, x)

    def wave(
        self, layer: ExpertLayer, experts: Sequence[Slotted], inputs: LayerInput, transfer: TransferEngine
    ) -> Iterator[tuple[Sequence[Slotted], torch.Tensor]]:
        return self._by_layer[layer.index].wave(layer, experts, inputs, transfer)

    def surround(self, layer: ExpertLayer) -> AbstractContextManager[None]:
        return self._by_layer[layer.index].surround(layer)

    def token(self, layer: ExpertLayer, slots: Sequence[int], hidden: torch.Tensor) -> torch.Tensor | None:
        return self._by_layer[layer.index].token(layer, slots, hidden)

    def prepared(self, layer: ExpertLayer, slot: int) -> PreparedExpert | None:
        return self._by_layer[layer.index].prepared(layer, slot)

    def slots_moved(self) -> None:
        for compute in dict.fromkeys(self._by_layer):
            compute.slots_moved()

    def close(self) -> None:
        for compute in dict.fromkeys(self._by_layer):
            compute.close()
