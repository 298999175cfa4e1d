"""Experts computed by the C kernels, from slots that were made for them (`CpuSlot`).

Moves: nothing. The kernels read weights where they stand.
Bound: the host's memory bandwidth for few tokens, arithmetic for many.
Must never: call a kernel after its threads were ended.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from offmoe.compute.compute import ComputeByLayer, ExpertCompute, LayerInput, Slotted, groups
from offmoe.compute.cpu_slot import CpuSlot, cpu_slot
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.kernels.cpu import CpuKernels, PreparedExpert, kernel_threads
from offmoe.compute.kernels.expert_halves import ExpertHalves
from offmoe.compute.kernels.gguf import GgufDecoder
from offmoe.compute.kernels.library import MAX_TOKENS, status
from offmoe.compute.kernels.torch_ffn import autocast_enabled
from offmoe.compute.torch_compute import TorchCompute
from offmoe.compute.torch_threads import kernels_alone
from offmoe.device.arena import SlotArena
from offmoe.errors import CLOSED, OffmoeError, UnsupportedModelError
from offmoe.quant.gguf_formats import GgufBlocks
from offmoe.storage.layout import ExpertRecord
from offmoe.transfer.engine import TransferEngine

logger = logging.getLogger(__name__)


class CpuCompute(ExpertCompute):
    """The C kernels, for layers with a `cpu_slot`, and torch's operators for those of their experts that have none.

    Slots move only when the model is resized, so the pointers into a slot are prepared once and serve whichever expert
    stands there.
    """

    def __init__(self, kernels: CpuKernels, arena: SlotArena, by_torch: TorchCompute) -> None:
        """kernels: closed with this."""
        self._kernels, self._arena, self._by_torch = kernels, arena, by_torch
        self._halves = ExpertHalves(kernels)
        self._prepared: dict[int, _PreparedSlots] = {}
        """By id of the CpuSlot. Layers share equal CpuSlots: a pool of all layers would otherwise hold one entry per
        layer and slot."""
        self._calling = threading.Lock()
        self._closed = False

    def expert(self, layer: ExpertLayer, slot: int, x: torch.Tensor) -> torch.Tensor:
        form = layer.cpu_slot
        if form is None:  # an expert unlike the others of its layer
            return self._by_torch.expert(layer, slot, x.to(self._by_torch.dtype)).to(x.dtype)
        with self._calling:
            return self._kernels.rows_of(self._slots_of(form)[slot])(x)

    def wave(
        self, layer: ExpertLayer, experts: Sequence[Slotted], inputs: LayerInput, transfer: TransferEngine
    ) -> Iterator[tuple[Sequence[Slotted], torch.Tensor]]:
        # Converted once, not by every expert: converting one row takes a tenth of the time of a small expert.
        dtype, inputs = inputs.hidden.dtype, inputs._replace(hidden=inputs.hidden.float())
        resident, coming = transfer.divide(experts)
        for group in groups(inputs.in_router_order(resident), inputs, MAX_TOKENS):
            rows = self._rows(layer, group, inputs)
            yield group, rows if inputs.pairs is None else rows.to(dtype)
        for expert, slot in coming:
            rows = self._when_ready(layer.of(expert), slot, inputs.rows(expert), transfer)
            yield ((expert, slot),), rows if inputs.pairs is None else rows.to(dtype)

    def surround(self, layer: ExpertLayer) -> AbstractContextManager[None]:
        return nullcontext() if layer.cpu_slot is None or layer.unlike else kernels_alone()

    def token(self, layer: ExpertLayer, slots: Sequence[int], hidden: torch.Tensor) -> torch.Tensor | None:
        form = layer.cpu_slot
        if form is None or layer.unlike or len(slots) > MAX_TOKENS or autocast_enabled(hidden):
            return None
        with self._calling:
            prepared = self._slots_of(form)
            return self._kernels.experts([prepared[slot] for slot in slots], hidden.float()).to(hidden.dtype)

    def prepared(self, layer: ExpertLayer, slot: int) -> PreparedExpert | None:
        form = layer.cpu_slot
        if form is None or layer.unlike:
            return None
        with self._calling:
            return self._slots_of(form)[slot]

    def _when_ready(self, layer: ExpertLayer, slot: int, x: torch.Tensor, transfer: TransferEngine) -> torch.Tensor:
        """As `expert`. For a single token, gate and up are computed before down is there."""
        form = layer.cpu_slot
        arriving = transfer.arriving(slot) if form is not None and len(x) == 1 else None
        if arriving is None or form is None:
            return super()._when_ready(layer, slot, x, transfer)
        arriving.wait_for(form.first_half)
        with self._calling:
            h = self._halves.first(self._slots_of(form)[slot], x)
        transfer.ready(slot)  # raises if the fetch failed: h is wrong then
        with self._calling:
            return self._halves.second(self._slots_of(form)[slot], h)

    def _rows(self, layer: ExpertLayer, experts: Sequence[Slotted], inputs: LayerInput) -> torch.Tensor:
        """The rows of experts whose slots are ready, in one call of the kernels where that can be."""
        positions = inputs.positions(experts)
        if layer.unlike or (positions is not None and len(positions) > MAX_TOKENS):
            return torch.cat([self.expert(layer.of(expert), slot, inputs.rows(expert)) for expert, slot in experts])
        form = layer.cpu_slot
        assert form is not None
        with self._calling:
            slots = self._slots_of(form)
            prepared = [slots[slot] for _, slot in experts]
            if positions is None:
                return self._kernels.experts(prepared, inputs.hidden)
            x = inputs.hidden[positions // inputs.pairs_per_row]  # [n, H]
            return self._kernels.experts(prepared, x, [inputs.num_rows(expert) for expert, _ in experts])

    def _slots_of(self, form: CpuSlot) -> _PreparedSlots:
        """The slots for experts of this form. The lock is held: another thread may call `close`."""
        if self._closed:
            raise OffmoeError(CLOSED)
        prepared = self._prepared.get(id(form))
        if prepared is None:
            prepared = self._prepared[id(form)] = _PreparedSlots(form, self._arena)
        return prepared

    def slots_moved(self) -> None:
        with self._calling:
            self._prepared.clear()

    def close(self) -> None:
        with self._calling:
            self._closed = True
            self._prepared.clear()
            self._kernels.close()


class _PreparedSlots(dict[int, PreparedExpert]):
    """By slot, whichever expert of one form stands there, prepared when it is first asked for."""

    def __init__(self, form: CpuSlot, arena: SlotArena) -> None:
        super().__init__()
        self._form, self._arena = form, arena

    def __missing__(self, slot: int) -> PreparedExpert:
        weights = self._form.expert(self._arena.views(slot, self._form.layout))
        expert = self[slot] = PreparedExpert(weights, self._form.glu)
        return expert


def has_cpu_kernels(layer: ExpertLayer) -> bool:
    """Whether the C kernels compute a layer whose slots were laid out for them where that can be."""
    return layer.cpu_slot is not None


def scratch_layers(layers: Sequence[ExpertLayer], records: Sequence[Sequence[ExpertRecord]]) -> list[ExpertLayer]:
    """The layers as they stand in scratch slots in RAM, for which the host computes beside a device.

    A layer that the C kernels compute gets their layout. The others stay as they are on the device, and the log says
    why: torch takes a hundred times as long for quantized ones.

    Args:
        layers: as they stand on the device.
        records: per layer and expert, where its bytes are in the shards.
    """
    kernels, reasons, known = status(), Counter[str](), dict[CpuSlot, CpuSlot]()

    def on_host(layer: ExpertLayer, of_layer: Sequence[ExpertRecord], expert: int) -> ExpertLayer:
        if layer.cpu_slot is not None:  # it stands like that on the device too
            return layer
        try:
            if kernels.library is None:
                raise UnsupportedModelError(kernels.message)
            slot = cpu_slot(layer.layout, layer.assembly, layer.decode, of_layer[expert].segments, layer.math)
        except UnsupportedModelError as error:
            reasons[str(error)] += 1
            return layer
        slot = known.setdefault(slot, slot)
        unlike = {e: on_host(form, of_layer, e) for e, form in layer.unlike.items()}
        return replace(layer, layout=slot.layout, assembly=slot.assembly, decode=None, cpu_slot=slot, unlike=unlike)

    out = []
    for layer, of_layer in zip(layers, records, strict=True):
        common = next(expert for expert in range(len(of_layer)) if expert not in layer.unlike)
        out.append(on_host(layer, of_layer, common))
    for reason, count in reasons.items():
        logger.warning("on the host, %d MoE layers are computed by torch's operators: %s", count, reason)
    return out


def host_compute(
    layers: Sequence[ExpertLayer],
    arena: SlotArena,
    dtype: torch.dtype,
    int8_activations: bool,
    *,
    in_ram: bool,
    sharing: CpuKernels | None = None,
) -> ExpertCompute:
    """The C kernels for layers whose slots were made for them, torch's operators for the rest.

    Args:
        dtype: the model's.
        int8_activations: whether the C kernels round activations to 8 bits.
        in_ram: whether all slots are in RAM, where C decoders can read them.
        sharing: kernels whose threads the C kernels use too; None: they get threads of their own.
    """
    threads, library = kernel_threads(), status().library
    decoder = None
    if in_ram and library is not None and any(_holds_gguf(layer) for layer in layers):
        decoder = GgufDecoder(library, threads)
    by_torch = TorchCompute(arena, dtype, decoder)
    if all(layer.cpu_slot is None for layer in layers):
        return by_torch
    assert library is not None, "without the library, no layer has a cpu_slot"
    by_kernels = CpuCompute(CpuKernels(library, sharing or threads, int8_activations=int8_activations), arena, by_torch)
    return ComputeByLayer([by_torch if layer.cpu_slot is None else by_kernels for layer in layers])


def _holds_gguf(layer: ExpertLayer) -> bool:
    """Whether slots of the layer hold GGUF blocks."""
    return layer.decode is not None and any(isinstance(leaf.codec, GgufBlocks) for leaf in layer.decode.leaves)
