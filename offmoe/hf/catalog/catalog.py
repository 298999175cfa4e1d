"""Where every expert of a checkpoint is, and how it stands in a slot.

Nothing moves here, and nothing is found out (cataloging.py does): what is here was checked against the headers. Must
never name an architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from offmoe.compute.cpu_slot import KernelSlot, kernel_slot
from offmoe.compute.kernels.library import status
from offmoe.hf.adapters.find import find_experts, require_adapter
from offmoe.hf.catalog.dense_view import DenseView
from offmoe.quant import ExpertDecoding
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import Assembly, ExpertLayout, ExpertRecord
from offmoe.types import CacheShape, ExpertKey

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CatalogLayer:
    """One MoE layer: `name` is the module path of its experts module, `records[e]` is expert e at rest.

    decode: from what slots hold to the parameters, if that is something else. kernel: how slots stand for kernels, if
    they do; without_kernel: why they do not, once that was asked.
    """

    name: str
    num_experts: int
    top_k: int
    layout: ExpertLayout
    assembly: Assembly
    records: tuple[ExpertRecord, ...]
    decode: ExpertDecoding | None = None
    kernel: KernelSlot | None = None
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
        stored = {name for layer in self.layers if layer.kernel for name in layer.kernel.stored}
        return tuple(sorted(stored | {leaf.codec.name for leaf in leaves if leaf.codec}))

    def moved(self, checkpoint: Checkpoint) -> ExpertCatalog:
        """The same in another folder; `checkpoint` has the same tensors at the same places."""
        return replace(self, view=replace(self.view, checkpoint=checkpoint))

    def for_kernels(self, meta_model: PreTrainedModel) -> ExpertCatalog:
        """The same with slots that the CPU's kernels read, where they can. meta_model: with its experts."""
        available, layers = status(), []
        for layer, module in zip(self.layers, find_experts(meta_model).values(), strict=True):
            found: KernelSlot | str = available.message
            if available.library is not None:
                math = require_adapter(module).math(module)
                found = kernel_slot(layer.layout, layer.assembly, layer.decode, layer.records[0].segments, math)
            if isinstance(found, str):
                layers.append(replace(layer, without_kernel=found))
            else:
                layers.append(replace(layer, layout=found.layout, assembly=found.assembly, decode=None, kernel=found))
        return replace(self, layers=tuple(layers))

    @cached_property
    def records(self) -> dict[ExpertKey, ExpertRecord]:
        """The records of all layers by key."""
        return {
            ExpertKey(i, expert): record
            for i, layer in enumerate(self.layers)
            for expert, record in enumerate(layer.records)
        }
