"""Where every expert of a checkpoint is, and how it stands in a slot.

Nothing moves here, and nothing is found out (cataloging.py does): what is here was checked against the headers. Must
never name an architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from offmoe.compute.cpu_slot import CpuSlot, cpu_slot
from offmoe.compute.kernels.library import status
from offmoe.errors import UnsupportedModelError
from offmoe.hf.adapters.find import find_experts, require_adapter
from offmoe.hf.catalog.dense_view import DenseView
from offmoe.quant.decode import ExpertDecoding
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import Assembly, ExpertLayout, ExpertRecord
from offmoe.types import CacheShape, ExpertKey

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CatalogLayer:
    """One MoE layer: `name` is the module path of its experts module, `records[e]` is expert e at rest.

    decode: from a slot to the parameters, if slots hold something else. cpu_slot: how experts stand in slots for the C
    kernels, if these compute them; without_kernel: the reason why not, after `for_kernels`.
    """

    name: str
    num_experts: int
    top_k: int
    layout: ExpertLayout
    assembly: Assembly
    records: tuple[ExpertRecord, ...]
    decode: ExpertDecoding | None = None
    cpu_slot: CpuSlot | None = None
    without_kernel: str | None = None


@dataclass(frozen=True)
class ExpertCatalog:
    """Every expert of a checkpoint. `layers` in module order.

    keys: the checkpoint's tensors that belong to experts; parameters: the model's, by full name. dense: the tensor of
    every other parameter that is one as it is. view: all tensors.
    """

    layers: tuple[CatalogLayer, ...]
    keys: frozenset[str]
    parameters: frozenset[str]
    dense: dict[str, str]
    view: DenseView

    @property
    def shape(self) -> CacheShape:
        """What decisions need to know. expert_bytes: at rest, which is what one fetch reads."""
        return CacheShape(
            experts=tuple(layer.num_experts for layer in self.layers),
            top_k=tuple(layer.top_k for layer in self.layers),
            expert_bytes=tuple(layer.records[0].nbytes for layer in self.layers),
        )

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the quantized formats that experts are in."""
        leaves = (leaf for layer in self.layers if layer.decode for leaf in layer.decode.leaves)
        stored = {name for layer in self.layers if layer.cpu_slot for name in layer.cpu_slot.stored}
        return tuple(sorted(stored | {leaf.codec.name for leaf in leaves if leaf.codec}))

    def moved(self, checkpoint: Checkpoint) -> ExpertCatalog:
        """The same in another folder; `checkpoint` has the same tensors at the same places."""
        return replace(self, view=replace(self.view, checkpoint=checkpoint))

    def for_kernels(self, meta_model: PreTrainedModel) -> ExpertCatalog:
        """The same with slots that the CPU's kernels read, where they can. meta_model: with its experts."""
        kernels, layers = status(), []
        for layer, module in zip(self.layers, find_experts(meta_model).values(), strict=True):
            try:
                if kernels.library is None:
                    raise UnsupportedModelError(kernels.message)
                math = require_adapter(module).math(module)
                slot = cpu_slot(layer.layout, layer.assembly, layer.decode, layer.records[0].segments, math)
            except UnsupportedModelError as error:
                layers.append(replace(layer, without_kernel=str(error)))
            else:
                layers.append(replace(layer, layout=slot.layout, assembly=slot.assembly, decode=None, cpu_slot=slot))
        return replace(self, layers=tuple(layers))

    @cached_property
    def records(self) -> dict[ExpertKey, ExpertRecord]:
        """The records of all layers by key."""
        return {
            ExpertKey(i, expert): record
            for i, layer in enumerate(self.layers)
            for expert, record in enumerate(layer.records)
        }
