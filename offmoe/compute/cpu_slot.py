"""Slots that kernels read: what a checkpoint stores of an expert, re-ordered into 16-row tiles while it is placed.

What moves: the words of every weight, once, from the buffer that they were read into to their slot, transposed on the
way by the thread that reads (3 GB/s of int32 per core with torch's copy, above what a disk gives one of them); a slot
has as many bytes as before, up to padding. GPTQ has the words of a column where tiles have those of a row, so it is the
same transposition; AWQ's nibbles go across rows and are put together anew, in a few passes. Biases become float32,
which is exact. What no kernel has (other formats, shapes, activations) keeps its slot as it was.

What it must never do: change a value, or guess: an index that says that columns are not in their groups' order is found
out for every expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from offmoe.compute.kernels import ExpertMath, GatedFFN
from offmoe.compute.kernels.cpu import BF16_GROUP, GatedExpert, Glu, Weight
from offmoe.compute.kernels.gating import gating_of
from offmoe.compute.kernels.library import MAX_TOKENS
from offmoe.errors import UnsupportedModelError
from offmoe.quant import Codec, ExpertDecoding
from offmoe.quant.kernel_words import format_of, is_rows_first, rows_of
from offmoe.quant.packed_weight import TILE_ROWS, PackedWeight, WeightFormat
from offmoe.storage.layout import Assembly, Destination, ExpertLayout, Segment

BIAS = ".bias"
MATRICES = ("gate", "up", "down")


class Take(NamedTuple):
    """Rows of a source that make one weight or bias: `rows` of them, every `step`-th from `first` on."""

    source: int
    first: int
    step: int
    rows: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self.first : self.first + self.step * (self.rows - 1) + 1 : self.step]


class Source(NamedTuple):
    """One tensor of an expert. components: where its parts are among the segments; codec: None if it is as it is.

    shape: dense. dtype: of its "weight" or, where codes are not called so, of their scales. part: its place in the
    parameters that the module computes with.
    """

    components: Mapping[str, int]
    codec: Codec | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: Destination


@dataclass(frozen=True)
class TilePlacement:
    """An `Assembly.convert`: the parameters of a kernel's slot out of one expert's tensors, as views where it can be.

    shapes: of the tensors. before: what first makes the module's own parameters of them, in the order of `sources`.
    swapped: sources that have inputs first.
    """

    takes: Mapping[str, Take]
    sources: tuple[Source, ...]
    shapes: tuple[tuple[int, ...], ...]
    formats: Mapping[str, WeightFormat | None]
    swapped: frozenset[int]
    before: Assembly | None = None

    def __call__(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.before is not None:
            assert self.before.convert is not None
            made = self.before.convert(tensors)
            tensors = [made[source.part.param].contiguous() for source in self.sources]
        tensors = [tensor.view(shape) for tensor, shape in zip(tensors, self.shapes, strict=True)]
        out: dict[str, torch.Tensor] = {}
        known: dict[int, dict[str, torch.Tensor]] = {}
        pairs: dict[int, torch.Tensor] = {}
        for name, take in self.takes.items():
            source = self.sources[take.source]
            how = self.formats.get(name)
            if how is None:
                tensor = tensors[source.components["weight"]]
                if take.source in self.swapped and take.step == 2:
                    if take.source not in pairs:
                        pairs[take.source] = _transposed_pairs(tensor)
                    out[name] = _half(pairs[take.source], take.first)
                    continue
                out[name] = take.of(tensor.mT if take.source in self.swapped else tensor)
                continue
            if take.source not in known:
                assert source.codec is not None
                raw = {component: tensors[i] for component, i in source.components.items()}
                known[take.source] = rows_of(source.codec, raw, how)
            for suffix, rows in known[take.source].items():
                tiles = take.of(rows).unflatten(0, (-1, TILE_ROWS))  # [N / 16, 16, C]
                out[name + suffix] = tiles.transpose(1, 2)
        return out


def _transposed_pairs(both: torch.Tensor) -> torch.Tensor:
    """bf16 [in, 2 out], two outputs' columns by turns -> int32 [out, in], the first in the low half.

    Four times as fast as picking every other column of the transpose (0.6 against 0.14 GB/s of one core).
    """
    if both.data_ptr() % 4:
        both = both.clone()
    return both.view(torch.int32).mT.contiguous()


def _half(pairs: torch.Tensor, which: int) -> torch.Tensor:
    """bf16 of the low (0) or high (1) halves."""
    return (pairs >> 16 if which else pairs).to(torch.int16).view(torch.bfloat16)


@dataclass(frozen=True)
class KernelSlot:
    """How experts of a layer stand in slots for kernels. formats: of gate, up and down, None for bf16. stored: names of
    what the checkpoint has. stacked: the parameters of a slot that is as it would be without kernels, gate and up
    first: bytes of bf16 weights then are where they have to be, and are copied as they arrive.
    """

    layout: ExpertLayout
    assembly: Assembly = field(compare=False)
    formats: tuple[WeightFormat | None, ...]
    glu: Glu
    biased: bool
    stored: tuple[str, ...] = ()
    stacked: tuple[str, str] | None = None

    def expert(self, views: Mapping[str, torch.Tensor]) -> GatedExpert:
        """The expert in a slot; no bytes move."""
        if self.stacked is not None:
            return GatedExpert.stacked(*(views[name] for name in self.stacked))
        gate, up, down = (self._weight(name, how, views) for name, how in zip(MATRICES, self.formats, strict=True))
        if not self.biased:
            return GatedExpert(gate, up, down)
        return GatedExpert(gate, up, down, *(views[name + BIAS] for name in MATRICES))

    def working_bytes(self) -> int:
        """Memory of a call beside the slot: MAX_TOKENS rows of inputs and outputs, and of what kernels make of them."""
        name = "down" if self.stacked is None else self.stacked[1]
        shape, how = next(p.shape for p in self.layout.params if p.name == name), self.formats[2]
        outputs, inputs = shape if how is None else (TILE_ROWS * shape[0], shape[1] * how.word_values)
        return 4 * MAX_TOKENS * (3 * outputs + 2 * inputs)

    @staticmethod
    def _weight(name: str, how: WeightFormat | None, views: Mapping[str, torch.Tensor]) -> Weight:
        return views[name] if how is None else PackedWeight.of(how, name, views)


def kernel_slot(
    layout: ExpertLayout,
    assembly: Assembly,
    decode: ExpertDecoding | None,
    segments: Sequence[Segment],
    math: ExpertMath,
) -> KernelSlot | str:
    """The slot for an expert's kernels, or why there is none. segments: of one expert of the layer, at rest.

    layout, assembly, decode: its slot without kernels. math: what its module computes.
    """
    if not isinstance(math, GatedFFN) or math.normalize is not None:
        return "the experts are no gated feed-forward networks of the usual form"
    gating = gating_of(math.activate)
    if gating is None:
        return "kernels do not have the activation"
    shapes = {p.name: p.shape for p in layout.params} if decode is None else dict(decode.shapes)
    sources, before = _sources(layout, assembly, decode, segments)
    if sources is None:
        return "the checkpoint's quantized weights are rearranged when they are loaded"
    takes: dict[str, Take] = {}
    swapped = set()
    for i, source in enumerate(sources):
        rows, found = _rows_of_source(source, shapes[source.part.param], math)
        if found is None:
            return f"{source.part.param} is stored in parts that are no rows of it"
        start, is_swapped = found
        if is_swapped:
            swapped.add(i)
        for name, take in _takes(i, source.part.param, start, rows, shapes, math, gating.interleaved).items():
            if name in takes:
                return f"{source.part.param} is stored in too many parts"
            takes[name] = take
    wanted = {*MATRICES, *((f"{name}{BIAS}" for name in MATRICES) if math.biased else ())}
    if takes.keys() != wanted:
        return "gate, up and down are stored in parts that kernels cannot take"
    formats: dict[str, WeightFormat | None] = {}
    params: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in MATRICES:
        take, source = takes[name], sources[takes[name].source]
        cols = _columns(source, take.source in swapped)
        how = _format(source, take.source in swapped, take.rows, cols)
        if isinstance(how, str):
            return how
        formats[name] = how
        plain = {name: (torch.bfloat16, (take.rows, cols))}
        params |= plain if how is None else how.params(name, take.rows, cols, tiled=True)
    if formats["gate"] != formats["up"]:
        return "gate and up are quantized differently"
    for name in sorted(wanted - set(MATRICES)):
        params[name] = (torch.float32, (takes[name].rows,))
    if not any(formats.values()) and not (math.biased or math.transposed or gating.interleaved):
        return KernelSlot(layout, assembly, (None,) * 3, gating.glu, False, stacked=(math.up, math.down))
    at_rest = tuple(p.shape for p in layout.params) if before or decode else tuple(s.shape for s in sources)
    placement = TilePlacement(takes, tuple(sources), at_rest, formats, frozenset(swapped), before)
    return KernelSlot(
        layout=ExpertLayout.of(params),
        assembly=Assembly(convert=placement),
        formats=tuple(formats.values()),
        glu=gating.glu,
        biased=math.biased,
        stored=tuple(sorted({source.codec.name for source in sources if source.codec})),
    )


def _sources(
    layout: ExpertLayout, assembly: Assembly, decode: ExpertDecoding | None, segments: Sequence[Segment]
) -> tuple[list[Source] | None, Assembly | None]:
    """Tensors of an expert and their places; and what makes them first, if they are not the checkpoint's own."""
    if decode is not None:
        if decode.assembly.convert is not None:
            return None, None
        index = {param.name: i for i, param in enumerate(layout.params)}
        dtypes = {param.name: param.dtype for param in layout.params}
        return [
            Source(
                {component: index[name] for component, name in leaf.params.items()},
                leaf.codec,
                leaf.shape[-len(decode.shapes[part.param]) :],
                dtypes[
                    next((leaf.params[c] for c in ("weight", "scale", "scales") if c in leaf.params), leaf.params[main])
                ],
                part,
            )
            for leaf, part in zip(decode.leaves, decode.assembly.destinations, strict=True)
            for main in (next(iter(leaf.params)),)
        ], None
    if assembly.convert is not None:
        return [
            Source({"weight": i}, None, param.shape, param.dtype, Destination(param.name, 0, 0))
            for i, param in enumerate(layout.params)
        ], assembly
    ndim = {param.name: len(param.shape) for param in layout.params}
    return [
        Source({"weight": i}, None, segment.shape[-ndim[part.param] :], segment.dtype, part)
        for i, (segment, part) in enumerate(zip(segments, assembly.destinations, strict=True))
    ], None


def _rows_of_source(source: Source, whole: tuple[int, ...], math: GatedFFN) -> tuple[int, tuple[int, bool] | None]:
    """(outputs that a source has, (the first of them, whether it has inputs first)); None if it has no whole rows."""
    part = source.part
    if len(whole) == 1:
        return source.shape[-1], (part.start, False)
    swapped = part.transposed != math.transposed  # what the source stands for, against [out, in]
    rows = source.shape[1] if swapped else source.shape[0]
    cols = source.shape[0] if swapped else source.shape[1]
    inputs = whole[0] if math.transposed else whole[1]
    if cols != inputs:
        return rows, None
    along_outputs = part.dim == (1 if swapped else 0)
    return rows, (part.start if along_outputs else 0, swapped)


def _takes(
    source: int,
    param: str,
    start: int,
    rows: int,
    shapes: Mapping[str, tuple[int, ...]],
    math: GatedFFN,
    interleaved: bool,
) -> dict[str, Take]:
    """What rows [start, start + rows) of a parameter's outputs make."""
    suffix = BIAS if param.endswith("_bias") else ""
    name = param.removesuffix("_bias") if math.biased else param
    if name == math.down:
        return {f"down{suffix}": Take(source, 0, 1, rows)}
    if name != math.up:
        return {param: Take(source, 0, 1, rows)}
    shape = shapes[math.up]
    both = shape[1] if math.transposed else shape[0]
    if rows == both and interleaved:
        return {f"{m}{suffix}": Take(source, i, 2, both // 2) for i, m in enumerate(("gate", "up"))}
    if rows == both:
        return {f"{m}{suffix}": Take(source, i * both // 2, 1, both // 2) for i, m in enumerate(("gate", "up"))}
    if rows == both // 2 and not interleaved and start in (0, rows):
        return {("up" if start else "gate") + suffix: Take(source, 0, 1, rows)}
    return {param: Take(source, 0, 1, rows)}


def _columns(source: Source, swapped: bool) -> int:
    return source.shape[0] if swapped else source.shape[1]


def _format(source: Source, swapped: bool, rows: int, cols: int) -> WeightFormat | str | None:
    """The kernels' format of a weight, None for bf16; or why they have none."""
    if source.codec is None:
        if source.dtype != torch.bfloat16:
            return f"kernels have no {str(source.dtype).removeprefix('torch.')}"
        if rows % TILE_ROWS or cols % BF16_GROUP:
            return f"weights of [{rows}, {cols}] are no multiples of [{TILE_ROWS}, {BF16_GROUP}]"
        return None
    if swapped == is_rows_first(source.codec):
        return "quantized weights are stored transposed"
    how = format_of(source.codec, cols, source.dtype)
    if isinstance(how, str):
        return how
    try:
        how.check("a weight", rows, cols)
    except UnsupportedModelError:
        return f"weights of [{rows}, {cols}] are no multiples of [{TILE_ROWS}, {how.group or TILE_ROWS}]"
    return how
