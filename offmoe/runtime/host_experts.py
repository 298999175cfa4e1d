"""The host computes the experts that a plan leaves to it, while a device with memory of its own computes the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from offmoe.compute.compute import ExpertCompute, LayerInput, Slotted
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.kernels.torch_ffn import concatenate
from offmoe.transfer.engine import TransferEngine
from offmoe.transfer.host_exchange import HostExchange
from offmoe.types import Wave


class HostExperts:
    """Computes experts from scratch slots in RAM; their rows cross the link, not their weights."""

    def __init__(
        self,
        compute: ExpertCompute,
        exchange: HostExchange,
        transfer: TransferEngine,
        layers: Sequence[ExpertLayer],
    ) -> None:
        """Take over what computes on the host.

        Args:
            compute: For scratch slots in RAM.
            exchange: Carries rows to the host and back.
            transfer: Fills the slots.
            layers: The MoE layers as they stand in these slots.
        """
        self._compute, self._exchange, self._transfer, self._layers = compute, exchange, transfer, layers

    def slots_moved(self) -> None:
        """As `ExpertCompute.slots_moved`."""
        self._compute.slots_moved()

    def receive(self, waves: Sequence[Wave], inputs: LayerInput) -> torch.Tensor:
        """The input rows [n, H] of the experts of `waves`, in RAM, expert by expert; one row if there is one token.

        To be called before the device gets work: the rows would arrive after it.
        """
        if inputs.pairs is None:
            return self._exchange.to_host(inputs.hidden)
        return self._exchange.to_host(
            concatenate([inputs.rows(expert) for wave in waves for expert, _ in wave.experts])
        )

    def run(
        self, layer: ExpertLayer, waves: Sequence[Wave], received: torch.Tensor, inputs: LayerInput
    ) -> Iterator[tuple[Slotted, torch.Tensor]]:
        """Compute the experts of `waves`.

        Args:
            received: the rows that `receive` gave for these waves.
        Returns:
            Per expert, its id and slot, and its rows [n, H] on the device.
        """
        experts = [pair for wave in waves for pair in wave.experts]
        sizes = [inputs.num_rows(expert) for expert, _ in experts]
        results = self._exchange.results(received.new_empty(sum(sizes), received.shape[1]))
        per_expert = [received] * len(experts) if inputs.pairs is None else received.split(sizes)
        for (expert, slot), x, rows in zip(experts, per_expert, results.split(sizes), strict=True):
            self._transfer.ready(slot)
            rows.copy_(self._compute.expert(self._layers[layer.index].of(expert), slot, x))
            self._transfer.computed((slot,))
        on_device = self._exchange.to_device(results)
        return zip(experts, on_device.split(sizes), strict=True)
