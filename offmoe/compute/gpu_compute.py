"""Experts computed by the GPU kernels, several in one launch, from slots as the checkpoint stores them.

Moves: nothing. The kernels read weights where they stand.
Bound: the device's memory bandwidth for few tokens, tensor cores for many.
Must never: launch before every slot of the launch is ready.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from offmoe.compute.compute import ExpertCompute, LayerInput
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.kernels.device import DeviceKernels, Pairs
from offmoe.transfer.engine import TransferEngine

EXPERTS_PER_LAUNCH = 8
"""If a step has several tokens. More would let experts that have arrived wait for those that have not."""


class GpuCompute(ExpertCompute):
    """The GPU kernels, for layers that have some.

    The last bits of its numbers depend on which experts are computed together: rows are cut into blocks accordingly.
    """

    def __init__(self, kernels: Mapping[int, DeviceKernels]) -> None:
        """kernels: by index of the layer."""
        self._kernels = kernels

    def expert(self, layer: ExpertLayer, slot: int, x: torch.Tensor) -> torch.Tensor:
        pairs = Pairs([slot], [len(x)], torch.arange(len(x), device=x.device))
        return self._kernels[layer.index].compute(pairs, x)

    def wave(
        self, layer: ExpertLayer, experts: Sequence[tuple[int, int]], inputs: LayerInput, transfer: TransferEngine
    ) -> Iterator[torch.Tensor]:
        per_launch = len(experts) if inputs.pairs is None else EXPERTS_PER_LAUNCH
        for start in range(0, len(experts), max(1, per_launch)):  # none, where the host computes all that missed
            launched = experts[start : start + per_launch]
            for _, slot in launched:
                transfer.ready(slot)
            pairs = _pairs(launched, inputs)
            yield from self._kernels[layer.index].compute(pairs, inputs.hidden).split(list(pairs.counts))

    def close(self) -> None:
        self._kernels = {}  # they hold the slots' memory


def _pairs(experts: Sequence[tuple[int, int]], inputs: LayerInput) -> Pairs:
    slots = [slot for _, slot in experts]
    if inputs.pairs is None:
        return Pairs(slots, [1] * len(slots))
    positions = [inputs.pairs[expert] for expert, _ in experts]
    return Pairs(slots, [len(p) for p in positions], torch.cat(positions), inputs.pairs_per_row)
