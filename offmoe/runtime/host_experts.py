"""Computes those experts of a layer that plans leave to the host, beside a device with memory of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from offmoe.compute.compute import ExpertCompute, Work
from offmoe.compute.kernels import ExpertMath
from offmoe.compute.kernels.autocast import concatenate
from offmoe.transfer.engine import TransferEngine
from offmoe.transfer.host_exchange import HostExchange
from offmoe.types import Wave


class HostPart:
    """Computes those experts of a layer that plans leave to the host."""

    def __init__(self, compute: ExpertCompute, exchange: HostExchange):
        """compute: for scratch slots in RAM."""
        self._compute, self._exchange = compute, exchange

    def given(self, waves: Sequence[Wave], work: Work) -> torch.Tensor:
        """The rows [n, H] that the experts of `waves` get, in RAM; expert by expert unless there is one token only.

        To be called before the device has work: it would answer after that.
        """
        if work.pairs is None:
            return self._exchange.to_host(work.hidden)
        return self._exchange.to_host(
            concatenate([work.inputs(expert) for wave in waves for expert, _ in wave.experts])
        )

    def run(
        self,
        layer: int,
        math: ExpertMath,
        waves: Sequence[Wave],
        given: torch.Tensor,
        transfer: TransferEngine,
        work: Work,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(expert, its rows [n, H] on the device). given: of `given`."""
        experts = [pair for wave in waves for pair in wave.experts]
        sizes = [1 if work.pairs is None else len(work.pairs[expert]) for expert, _ in experts]
        results = self._exchange.results(given.new_empty(sum(sizes), given.shape[1]))
        inputs = [given] * len(experts) if work.pairs is None else given.split(sizes)
        for (_, slot), x, rows in zip(experts, inputs, results.split(sizes), strict=True):
            transfer.ready(slot)
            rows.copy_(self._compute.expert(layer, slot, math, x))
            transfer.computed((slot,))
        back = self._exchange.to_device(results)
        return zip([expert for expert, _ in experts], back.split(sizes), strict=True)
