"""Slots for the C kernels: an expert's stored words, reordered into tiles of 16 rows while they are placed.

A slot has as many bytes as without kernels, up to padding; with GGUF's Q3_K, Q4_K and Q5_K, 3 or 4 % more.
tile_placement.py fills it.

Moves: nothing.
Bound: some microseconds per layer, when a model is loaded.
Must never: guess which form the kernels can compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from offmoe.compute.gated import (
    BIAS,
    MATRICES,
    GatedForm,
    StoredTensor,
    gated_form,
    parameter_shapes,
    stored_tensors,
)
from offmoe.compute.kernels.cpu import BF16_GROUP, GatedExpert, Glu, Weight
from offmoe.compute.kernels.library import MAX_TOKENS
from offmoe.compute.kernels.torch_ffn import ExpertMath
from offmoe.compute.tile_placement import TilePlacement, parameters_of
from offmoe.errors import UnsupportedModelError
from offmoe.quant.decode import ExpertDecoding
from offmoe.quant.int_formats import TiledInt
from offmoe.quant.kernel_words import format_of, is_rows_first
from offmoe.quant.packed_weight import PLANE_OF, TILE_ROWS, PackedWeight, WeightFormat
from offmoe.storage.layout import Assembly, Destination, ExpertLayout, Segment


class SlotWeight(NamedTuple):
    """A matrix [rows, cols] in a slot: `rows` rows, from `first` on, of parameter `param`."""

    param: str
    rows: int
    cols: int
    format: WeightFormat | None = None
    """None: bf16."""
    first: int = 0

    def of(self, views: Mapping[str, torch.Tensor]) -> Weight:
        """The matrix in a slot with these views; no bytes move."""
        if self.format is not None:
            return PackedWeight.of(self.format, self.param, views)
        return views[self.param][self.first : self.first + self.rows]


@dataclass(frozen=True)
class CpuSlot:
    """How the experts of one layer stand in slots for the C kernels."""

    layout: ExpertLayout
    assembly: Assembly = field(compare=False)
    weights: tuple[SlotWeight, ...]
    """Gate, up and down."""
    glu: Glu
    biased: bool
    stored: tuple[str, ...] = ()
    """Names of the quantized formats in the checkpoint."""

    def expert(self, views: Mapping[str, torch.Tensor]) -> GatedExpert:
        """The expert in a slot with these views; no bytes move."""
        gate, up, down = (weight.of(views) for weight in self.weights)
        return GatedExpert(gate, up, down, *(views[name + BIAS] for name in MATRICES if self.biased))

    @cached_property
    def first_half(self) -> tuple[str, ...]:
        """The parameters that gate and up, and their biases, stand in."""
        return parameters_of([weight.param for weight in self.weights[:2]], [p.name for p in self.layout.params])

    def working_bytes(self) -> int:
        """Bytes of one call besides the slot: inputs, outputs and intermediate rows of MAX_TOKENS tokens in float32."""
        down = self.weights[2]
        return 4 * MAX_TOKENS * (3 * down.rows + 2 * down.cols)


def cpu_slot(
    layout: ExpertLayout,
    assembly: Assembly,
    decode: ExpertDecoding | None,
    segments: Sequence[Segment],
    math: ExpertMath,
) -> CpuSlot:
    """The slot that the C kernels read.

    Args:
        layout, assembly, decode: of the layer's slots without kernels.
        segments: of one expert of the layer, at rest.
        math: what the layer's experts compute.
    Raises:
        UnsupportedModelError: the kernels cannot compute these experts; the message is the reason.
    """
    tensors = _tensors(layout, assembly, decode, segments)
    form = gated_form(tensors, parameter_shapes(layout, decode), math)
    formats = {name: _format(form, name) for name in MATRICES}
    if formats["gate"] != formats["up"]:
        raise UnsupportedModelError("gate and up are quantized differently")
    if decode is None and not (any(formats.values()) or form.biased or form.transposed or form.interleaved):
        return CpuSlot(layout, assembly, _unmoved(form), form.glu, False)  # bf16: bytes are copied as they arrive
    stored = tuple(sorted({tensor.codec.name for tensor in tensors if tensor.codec}))
    weights = tuple(SlotWeight(name, *form.shape(name), formats[name]) for name in MATRICES)
    if _stands_in_tiles(form):
        params = _names_of_tiles(form)
        as_stored = {params[i]: (param.dtype, param.shape) for i, param in enumerate(layout.params)}
        destinations = tuple(Destination(name, 0, 0) for name in as_stored)
        return CpuSlot(ExpertLayout.of(as_stored), Assembly(destinations), weights, form.glu, False, stored)
    before = assembly if decode is None and assembly.convert is not None else None
    raw = tensors if decode is None and before is None else layout.params
    shapes = tuple(tensor.shape for tensor in raw)
    return CpuSlot(
        layout=_tiled_layout(form, formats),
        assembly=Assembly(write=TilePlacement(form, formats, shapes, before)),
        weights=weights,
        glu=form.glu,
        biased=form.biased,
        stored=stored,
    )


def _tensors(
    layout: ExpertLayout, assembly: Assembly, decode: ExpertDecoding | None, segments: Sequence[Segment]
) -> tuple[StoredTensor, ...]:
    """The tensors that `TilePlacement` gets: raw ones, the module's parameters, or the segments themselves."""
    if decode is not None or assembly.convert is not None:
        return stored_tensors(layout, decode)
    ndim = {param.name: len(param.shape) for param in layout.params}
    return tuple(
        StoredTensor({"weight": i}, None, segment.shape[-ndim[to.param] :], segment.dtype, to)
        for i, (segment, to) in enumerate(zip(segments, assembly.destinations, strict=True))
    )


def _unmoved(form: GatedForm) -> tuple[SlotWeight, ...]:
    """The matrices in the module's own parameters: gate and up are the halves of one."""
    inner, hidden = form.shape("gate")
    gate_up, down = (form.tensors[form.rows[name].tensor].destination.param for name in ("up", "down"))
    return (
        SlotWeight(gate_up, inner, hidden),
        SlotWeight(gate_up, inner, hidden, first=inner),
        SlotWeight(down, hidden, inner),
    )


def _stands_in_tiles(form: GatedForm) -> bool:
    """Whether each matrix is stored for itself in the kernels' own order, so that bytes are copied as they arrive."""
    whole = [form.rows[name] == (form.rows[name].tensor, 0, 1, form.shape(name)[0]) for name in MATRICES]
    apart = len({form.rows[name].tensor for name in MATRICES}) == len(form.tensors) == len(MATRICES)
    return all(whole) and apart and all(isinstance(tensor.codec, TiledInt) for tensor in form.tensors)


def _names_of_tiles(form: GatedForm) -> dict[int, str]:
    """By index of a raw tensor, the name of the parameter of a CpuSlot that has its bytes."""
    return {
        index: name + PLANE_OF[component]
        for name in MATRICES
        for component, index in form.tensors[form.rows[name].tensor].components.items()
    }


def _tiled_layout(form: GatedForm, formats: Mapping[str, WeightFormat | None]) -> ExpertLayout:
    params: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, how in formats.items():
        rows, cols = form.shape(name)
        params |= {name: (torch.bfloat16, (rows, cols))} if how is None else how.params(name, rows, cols, tiled=True)
    for name in sorted(form.rows.keys() - set(MATRICES)):
        params[name] = (torch.float32, (form.rows[name].size,))
    return ExpertLayout.of(params)


def _format(form: GatedForm, name: str) -> WeightFormat | None:
    """The kernels' format of a matrix; None for bf16."""
    tensor = form.tensors[form.rows[name].tensor]
    rows, cols = form.shape(name)
    if tensor.codec is None:
        if tensor.dtype != torch.bfloat16:
            raise UnsupportedModelError(f"kernels have no {str(tensor.dtype).removeprefix('torch.')}")
        if rows % TILE_ROWS or cols % BF16_GROUP:
            raise UnsupportedModelError(f"weights of [{rows}, {cols}] are no multiples of [{TILE_ROWS}, {BF16_GROUP}]")
        return None
    if (form.rows[name].tensor in form.inputs_first) == is_rows_first(tensor.codec):
        raise UnsupportedModelError("quantized weights are stored transposed")
    first, step = form.rows[name].first, form.rows[name].step
    if isinstance(tensor.codec, TiledInt) and (first % TILE_ROWS or step != 1):
        raise UnsupportedModelError("rows of gate and up share tiles")
    how = format_of(tensor.codec, cols, tensor.dtype)
    if isinstance(how, str):
        raise UnsupportedModelError(how)
    if rows % TILE_ROWS or cols % (how.group or TILE_ROWS):
        raise UnsupportedModelError(
            f"weights of [{rows}, {cols}] are no multiples of [{TILE_ROWS}, {how.group or TILE_ROWS}]"
        )
    return how
