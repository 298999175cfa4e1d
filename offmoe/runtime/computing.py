"""What computes the experts of a model where they stand in slots; chosen once, when the model is loaded.

What moves: nothing between memories; weights of the experts asked for are read in their slots. Bound: the device's
memory for few tokens, arithmetic for many. `TorchCompute` is the bitwise one. A compute object that takes all resident
experts of a layer in one launch overrides `wave`.

What it must never do: read a slot before `ready` was called for it, or let an output depend on what else was computed
in the same wave.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from offmoe.runtime.arena import SlotArena
from offmoe.runtime.formats import ExpertLayout
from offmoe.runtime.kernels import ExpertMath, expert_ffn
from offmoe.runtime.quantized import ExpertDecoding


class Work(NamedTuple):
    """What the experts of one layer get. hidden: [T, H], or [T * k, H] an input for each (token, expert) pair.

    pairs: per expert, the positions of its pairs in the flattened [T * k]; None: one token, the input of them all.
    sharing: pairs that have one input.
    """

    hidden: torch.Tensor
    pairs: Mapping[int, torch.Tensor] | None
    sharing: int

    def inputs(self, expert: int) -> torch.Tensor:
        """x [n, H] of one expert."""
        return self.hidden if self.pairs is None else self.hidden[self.pairs[expert] // self.sharing]


class ExpertCompute(ABC):
    """Computes experts of all layers of one model; one thread at a time."""

    @abstractmethod
    def expert(self, layer: int, slot: int, math: ExpertMath, x: torch.Tensor) -> torch.Tensor:
        """The expert of `layer` that stands in `slot` on its tokens: x [n, H] -> [n, H]."""

    def wave(
        self,
        layer: int,
        math: ExpertMath,
        experts: Sequence[tuple[int, int]],
        work: Work,
        ready: Callable[[int], object],
    ) -> Iterator[torch.Tensor]:
        """Rows [n, H] of each of `experts` ((expert, slot)), in their order. ready(slot) waits for what is to be there.

        A slot may be given to another expert as soon as the next rows are asked for.
        """
        for expert, slot in experts:
            ready(slot)
            yield self.expert(layer, slot, math, work.inputs(expert))


class TorchCompute(ExpertCompute):
    """torch's operators, in the order of stock transformers; quantised weights are decoded first, at every call."""

    def __init__(
        self,
        arena: SlotArena,
        layouts: Sequence[ExpertLayout],
        decodings: Sequence[ExpertDecoding | None],
    ) -> None:
        self._arena, self._layouts, self._decodings = arena, layouts, decodings

    def expert(self, layer: int, slot: int, math: ExpertMath, x: torch.Tensor) -> torch.Tensor:
        weights = self._arena.views(slot, self._layouts[layer])
        decode = self._decodings[layer]
        return expert_ffn(math, weights if decode is None else decode(weights, x.dtype), x)
