"""One MoE layer, as everything that moves and computes its experts sees it. Must never name an architecture."""

from __future__ import annotations

from dataclasses import dataclass
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
