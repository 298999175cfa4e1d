"""The catalog: where every expert of a checkpoint is, and how it stands in a slot. build.py makes and checks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from offmoe.compute.cpu_slot import CpuSlot, cpu_slot
from offmoe.compute.kernels.library import status
from offmoe.errors import UnsupportedModelError
from offmoe.hf.adapters.find import find_experts, require_adapter
from offmoe.hf.catalog.dense_view import DenseView
from offmoe.hf.catalog.stored_dense import StoredWeight, stored_weights
from offmoe.quant.decode import ExpertDecoding
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import Assembly, ExpertLayout, ExpertRecord
from offmoe.types import CacheShape, ExpertKey


@dataclass(frozen=True)
class CatalogLayer:
    """The experts of one MoE layer."""

    name: str
    """Full name of the experts module."""
    num_experts: int
    top_k: int
    layout: ExpertLayout
    """What a slot holds."""
    assembly: Assembly
    """How an expert's segments become what a slot holds."""
    records: tuple[ExpertRecord, ...]
    """By expert, where its bytes are in the shards."""
    decode: ExpertDecoding | None = None
    """How a slot's contents become the parameters; None if the slot holds the parameters themselves."""
    cpu_slot: CpuSlot | None = None
    """How experts stand in slots for the C kernels; None if the kernels do not compute this layer."""
    without_kernel: str | None = None
    """Why the C kernels do not compute this layer, after `for_kernels`."""
    unlike: Mapping[int, CatalogLayer] = field(default_factory=dict)
    """Experts that are stored otherwise than the rest of the layer, by id: what the layer would be if all were so."""

    @property
    def forms(self) -> tuple[CatalogLayer, ...]:
        """The layer as each of its experts may stand in it: as the rest do, and as each one of `unlike` does."""
        return (self, *self.unlike.values())

    @property
    def common_record(self) -> ExpertRecord:
        """The record of an expert that is stored as the rest are."""
        return self.records[next(expert for expert in range(self.num_experts) if expert not in self.unlike)]


@dataclass(frozen=True)
class ExpertCatalog:
    """Every expert of a checkpoint."""

    layers: tuple[CatalogLayer, ...]
    """The MoE layers in module order."""
    keys: frozenset[str]
    """Names of the checkpoint's tensors that belong to experts."""
    parameters: frozenset[str]
    """Full names of the model's parameters that belong to experts."""
    dense: dict[str, str]
    """Full name of a dense parameter -> its tensor in the checkpoint, if the tensor is loaded unchanged."""
    decoded: dict[str, str]
    """Full name of a dense parameter -> its tensor in `view`, if the parameter is that tensor once it is decoded."""
    view: DenseView
    """All tensors of the checkpoint."""
    stored: Mapping[str, StoredWeight] = field(default_factory=dict)
    """By full name, the dense weights that the C kernels read as they are stored, after `for_kernels`."""

    @property
    def shape(self) -> CacheShape:
        """What the cache policy needs to know. expert_bytes counts an expert at rest: the bytes that one fetch reads,
        but for experts unlike the rest of their layer."""
        return CacheShape(
            experts=tuple(layer.num_experts for layer in self.layers),
            top_k=tuple(layer.top_k for layer in self.layers),
            expert_bytes=tuple(layer.common_record.nbytes for layer in self.layers),
        )

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the quantized formats in which experts are stored."""
        forms = [form for layer in self.layers for form in layer.forms]
        leaves = (leaf for form in forms if form.decode for leaf in form.decode.leaves)
        stored = {name for form in forms if form.cpu_slot for name in form.cpu_slot.stored}
        return tuple(sorted(stored | {leaf.codec.name for leaf in leaves if leaf.codec}))

    def moved(self, checkpoint: Checkpoint) -> ExpertCatalog:
        """This catalog for a copy of its checkpoint, which has the same tensors at the same places."""
        return replace(self, view=replace(self.view, checkpoint=checkpoint))

    def for_kernels(self, meta_model: PreTrainedModel) -> ExpertCatalog:
        """This catalog with slots laid out for the C kernels of the CPU in every layer that they can compute.

        It names the dense weights that they can read, too.

        Args:
            meta_model: the model on the meta device, experts included.
        """
        kernels = status()

        def on_kernels(layer: CatalogLayer, record: ExpertRecord, module: nn.Module) -> CatalogLayer:
            try:
                if kernels.library is None:
                    raise UnsupportedModelError(kernels.message)
                math = require_adapter(module).math(module)
                slot = cpu_slot(layer.layout, layer.assembly, layer.decode, record.segments, math)
            except UnsupportedModelError as error:
                return replace(layer, without_kernel=str(error))
            unlike = {e: on_kernels(form, layer.records[e], module) for e, form in layer.unlike.items()}
            return replace(layer, layout=slot.layout, assembly=slot.assembly, decode=None, cpu_slot=slot, unlike=unlike)

        modules = find_experts(meta_model).values()
        pairs = zip(self.layers, modules, strict=True)
        layers = tuple([on_kernels(layer, layer.common_record, module) for layer, module in pairs])
        stored = {} if kernels.library is None else stored_weights(self.view, self.decoded)
        return replace(self, layers=layers, stored=stored)

    @cached_property
    def records(self) -> dict[ExpertKey, ExpertRecord]:
        """The records of all layers by key."""
        return {
            ExpertKey(i, expert): record
            for i, layer in enumerate(self.layers)
            for expert, record in enumerate(layer.records)
        }
