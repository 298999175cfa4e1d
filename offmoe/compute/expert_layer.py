"""One MoE layer, as everything that moves and computes its experts sees it. Must never name an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from offmoe.compute.cpu_slot import CpuSlot
from offmoe.compute.kernels.torch_ffn import ExpertMath
from offmoe.quant.decode import ExpertDecoding
from offmoe.storage.layout import Assembly, ExpertLayout


class TokenOrder(Enum):
    """The order in which an expert sees its tokens.

    It decides the last bits on a CPU: the end of a tensor goes through other code than the vectorized rest.
    """

    SORTED_IDS = "as torch.sort leaves the flattened ids, like transformers' grouped_mm"
    CHOICES_FIRST = "all tokens' first choices, then their second ones, like torch.where on [k, T]"


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """What belongs to one MoE layer, bound once when the model is loaded."""

    index: int
    """Counts MoE layers; dense layers do not count."""
    layout: ExpertLayout
    """Where an expert's parameters stand in a slot."""
    assembly: Assembly
    """How an expert's stored tensors become these parameters."""
    math: ExpertMath
    """What an expert computes from its decoded parameters."""
    decode: ExpertDecoding | None = None
    """From a slot to decoded parameters; None: the slot holds these."""
    cpu_slot: CpuSlot | None = None
    """How the C kernels read a slot; None: they do not compute this layer. Equal ones are one object."""
    order: TokenOrder = TokenOrder.SORTED_IDS
    unlike: Mapping[int, ExpertLayer] = field(default_factory=dict)
    """Experts that are stored otherwise than the rest of the layer, by id: what the layer would be if all were so."""

    def of(self, expert: int) -> ExpertLayer:
        """The layer as the expert stands in it: itself, but for an expert of `unlike`."""
        return self.unlike.get(expert, self)

    @property
    def largest(self) -> ExpertLayout:
        """The layout of the largest expert, which any slot of the layer must hold."""
        return max((self.layout, *(layer.layout for layer in self.unlike.values())), key=lambda layout: layout.nbytes)

    def with_math(self, math: ExpertMath) -> ExpertLayer:
        """The layer with other math, for all of its experts."""
        return replace(self, math=math, unlike={e: layer.with_math(math) for e, layer in self.unlike.items()})
