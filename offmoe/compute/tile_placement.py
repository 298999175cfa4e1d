"""Puts the tensors of one expert into a slot of the C kernels: all in one call of C, or rows of a tensor as they come.

Moves: every word once, from the buffer that it was read into to the slot, in the thread of the reader. C puts GGUF's
blocks and rows of words into tiles without memory in between; everything else is views that are copied, tensor by
tensor. GPTQ keeps words along columns, so tiles are the same transposition; AWQ's nibbles run across rows and are put
together anew. Biases become float32, which is exact.
Bound: the transposition, 3 to 6 GB/s of a core (kernels/place.py). So rows of an expert that is read in
parts are put into the slot while others are read.
Must never: change a value, or guess. An index that contradicts the order of the columns' groups is an error, and is
looked for in every expert.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from offmoe.compute.gated import GatedForm, RowRange
from offmoe.compute.kernels.gguf import retiling
from offmoe.compute.kernels.library import status
from offmoe.compute.kernels.place import Placing, Step, carry_out, tiling
from offmoe.quant.codec import Codec
from offmoe.quant.gguf_formats import BLOCKS, GgufBlocks
from offmoe.quant.int_formats import PackedInt, TiledInt
from offmoe.quant.kernel_words import is_by_rows, plane_of, rows_of
from offmoe.quant.packed_weight import PLANE_OF, TILE_ROWS, PackedWeight, WeightFormat
from offmoe.storage.layout import Assembly, Copy, Segment, Units, typed

Views = Mapping[str, torch.Tensor]
"""The parameters of a slot, by name."""


@dataclass(frozen=True)
class TilePlacement:
    """A `Placement`: the parameters of a CpuSlot from the tensors of one expert."""

    form: GatedForm
    formats: Mapping[str, WeightFormat | None]
    """The formats of gate, up and down; None: bf16."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes to view the tensors in."""
    before: Assembly | None = None
    """Makes the experts module's parameters of the tensors first; the tensors of `form` are these parameters then."""
    _in_one_call: list[Placing | None] = field(default_factory=list, init=False, compare=False, repr=False)
    """What the first expert was found to need; None: more than one call of C."""

    def __call__(self, tensors: list[torch.Tensor], views: Views, copy: Copy) -> None:
        if self.before is not None:
            assert self.before.convert is not None
            params = self.before.convert(tensors)
            tensors = [params[tensor.destination.param].contiguous() for tensor in self.form.tensors]
        if not self._in_one_call:
            self._in_one_call.append(self._placing(tensors, views))
        library, placing = status().library, self._in_one_call[0]
        if library is not None and placing is not None:
            placing(library, tensors, _address(views))
            return
        for raw, tensor in zip(self._placements, tensors, strict=True):
            if raw is not None:
                raw.put(0, tensor.view(raw.shape), views, copy)

    def units(self, segments: Sequence[Segment], views: Views) -> list[Units | None] | None:
        if self.before is not None:
            return None
        pairs = zip(self._placements, segments, strict=True)
        return [None if raw is None else raw.units(segment, views) for raw, segment in pairs]

    def _placing(self, tensors: Sequence[torch.Tensor], views: Views) -> Placing | None:
        """All of it as one call of C, learned from one expert; None if some of it is not C's alone."""
        if not all(raw is None or raw.is_by_rows for raw in self._placements):
            return None
        steps = list[tuple[int, Step]]()
        for i, (raw, tensor) in enumerate(zip(self._placements, tensors, strict=True)):
            for move in () if raw is None else raw.moves(0, tensor.view(raw.shape), views):
                if isinstance(move, Copied):
                    return None
                steps.append((i, move))
        return Placing.of(steps, tensors, _address(views))

    @cached_property
    def _placements(self) -> list[_TensorPlacement | None]:
        """Per tensor how it is put into a slot; None for one that the kernels do without."""
        out: list[_TensorPlacement | None] = [None] * len(self.shapes)
        for i, tensor in enumerate(self.form.tensors):
            rows = {name: rows for name, rows in self.form.rows.items() if rows.tensor == i}
            how = next((self.formats[name] for name in rows if name in self.formats), None)
            for component, index in tensor.components.items():
                inputs_first = i in self.form.inputs_first
                out[index] = _TensorPlacement(self.shapes[index], component, tensor.codec, how, rows, inputs_first)
        return out


class Copied(NamedTuple):
    """A move that is not C's: what is copied, and where to."""

    into: torch.Tensor
    source: torch.Tensor


Move = Step | Copied
"""Something that is put into a slot. A step points at memory that lives until the next move is asked for."""


@dataclass(frozen=True)
class _TensorPlacement:
    """One tensor of an expert at rest: a component of one or two matrices, or their biases.

    shape: of the tensor. codec: None if it is not quantized. how: the kernels' format, if it is. rows: of the stored
    tensor that it is a component of, by name of a matrix or bias. inputs_first: whether they are columns of that.
    """

    shape: tuple[int, ...]
    component: str
    codec: Codec | None
    how: WeightFormat | None
    rows: Mapping[str, RowRange]
    inputs_first: bool

    def units(self, segment: Segment, views: Views) -> Units:
        """Its pieces that are put into a slot with these views one by one. segment: the tensor at rest."""
        row_bytes = segment.dtype.itemsize * math.prod(self.shape[1:])

        def put(first: int, data: torch.Tensor, copy: Copy) -> None:
            shape = (len(data) // row_bytes, *self.shape[1:]) if self.shape else ()
            self.put(first // row_bytes, typed(data, segment.dtype, shape), views, copy)

        return Units(row_bytes * self._unit_rows, parameters_of(self.rows, views), put)

    @cached_property
    def is_by_rows(self) -> bool:
        """Whether some of its rows are put as all are, whatever is in them."""
        if self.codec is None:
            return len(self.shape) == 2 and not self.inputs_first
        return isinstance(self.codec, (GgufBlocks, TiledInt)) or is_by_rows(self.codec, self.shape, self._outputs)

    @cached_property
    def _unit_rows(self) -> int:
        """Entries of the first dimension that can be put by themselves: whole tiles, or all where tiles need all."""
        if isinstance(self.codec, TiledInt):
            return 1
        if not self.is_by_rows:
            return math.prod(self.shape[:1])
        (step,) = {rows.step for rows in self.rows.values()}
        assert all(rows.size % TILE_ROWS == 0 for rows in self.rows.values())
        return TILE_ROWS * step

    @property
    def _outputs(self) -> int:
        """Rows of the stored tensor."""
        return sum(rows.size for rows in self.rows.values())

    def put(self, first: int, part: torch.Tensor, views: Views, copy: Copy) -> None:
        """Put some rows into a slot, as `moves`. copy: copies what is not reordered."""
        for move in self.moves(first, part, views):
            _carry_out(move, copy)

    def moves(self, first: int, part: torch.Tensor, views: Views) -> Iterator[Move]:
        """What puts some rows into a slot.

        Args:
            first: the number of the first.
            part: these rows: all, or a multiple of `_unit_rows`.
            views: of the slot.

        Raises:
            CheckpointError: columns are not in the order of their groups although the config says that they are.
        """
        codec, how = self.codec, self.how
        if codec is None:
            yield from self._plain(first, part, views)
            return
        assert how is not None
        if isinstance(codec, TiledInt):
            plane = PLANE_OF[self.component]
            for name, start, tiles in self._divided(first * TILE_ROWS, part, TILE_ROWS):
                yield Copied(_tiles(views[name + plane], start, len(tiles)).view(torch.uint8), tiles.view(torch.uint8))
        elif isinstance(codec, GgufBlocks):
            for name, start, some in self._divided(first, part):
                weight = PackedWeight.of(how, name, views).params("")
                planes = {plane: _tiles(whole, start, len(some) // TILE_ROWS) for plane, whole in weight.items()}
                blocks = some.contiguous()
                yield retiling(codec, blocks, PackedWeight.of(how, "", planes))
        else:
            yield from self._plane(codec, how, first, part, views)

    def _plane(self, codec: Codec, how: WeightFormat, first: int, part: torch.Tensor, views: Views) -> Iterator[Move]:
        """Words, scales or zero points that stand row by row."""
        cols = views[next(iter(self.rows))].shape[1] * how.word_values
        is_whole = not self.shape or len(part) == self.shape[0]
        found = plane_of(codec, self.component, part, (self._outputs if is_whole else len(part), cols), how)
        if found is None:
            return
        plane, rows = found
        flip = codec.flip if isinstance(codec, PackedInt) and not plane else 0
        for name, start, some in self._divided(first, rows):
            yield _tiled(some, _tiles(views[name + plane], start, len(some) // TILE_ROWS), flip)

    def _plain(self, first: int, part: torch.Tensor, views: Views) -> Iterator[Copied]:
        """Rows of bf16, or numbers of a bias."""
        if self.inputs_first and len(self.rows) == 2 and all(rows.step == 2 for rows in self.rows.values()):
            pairs = _transposed_pairs(part)
            for name, rows in self.rows.items():
                yield Copied(views[name], _half(pairs, rows.first))
            return
        for name, start, some in self._divided(first, part.mT if self.inputs_first else part):
            into = views[name][start : start + len(some)]
            if into.dtype == some.dtype and some.is_contiguous():  # as bytes, which torch's threads are not woken for
                into, some = into.view(torch.uint8), some.view(torch.uint8)
            yield Copied(into, some)

    def _divided(self, first: int, part: torch.Tensor, rows_each: int = 1) -> Iterator[tuple[str, int, torch.Tensor]]:
        """What belongs to each matrix or bias among rows from `first` on: its name, the number of its first row, rows.

        rows_each: rows in an entry of `part`.
        """
        for name, rows in self.rows.items():
            if rows.step > 1:
                yield name, first // rows.step, part[rows.first :: rows.step]
                continue
            low = max(first, rows.first)
            high = min(first + len(part) * rows_each, rows.first + rows.size)
            if low < high:
                yield name, low - rows.first, part[(low - first) // rows_each : (high - first) // rows_each]


def _address(views: Views) -> int:
    """The slot's, whose first parameter stands at its first byte."""
    return next(iter(views.values())).data_ptr()


def parameters_of(matrices: Collection[str], names: Iterable[str]) -> tuple[str, ...]:
    """Those parameters of a slot that belong to matrices: words, other planes, and biases."""
    return tuple(name for name in names if name in matrices or name.rpartition(".")[0] in matrices)


def _tiles(plane: torch.Tensor, first_row: int, count: int) -> torch.Tensor:
    """Tiles of a plane [rows / 16, entries, 16]. first_row: of the first of them."""
    return plane[first_row // TILE_ROWS : first_row // TILE_ROWS + count]


def _tiled(rows: torch.Tensor, into: torch.Tensor, flip: int = 0) -> Move:
    """[N, C] put into tiles [N / 16, C, 16], by C where rows are contiguous. flip: what words are xored with."""
    step = tiling(rows, into, flip)
    if step is not None:
        return step
    tiles = (rows ^ flip if flip else rows).unflatten(0, (-1, TILE_ROWS))  # [N / 16, 16, C]
    return Copied(into, tiles.transpose(1, 2))


def _carry_out(move: Move, copy: Copy) -> None:
    if isinstance(move, Copied):
        copy(*move)
        return
    library = status().library
    assert library is not None, "without the library, nothing has a format of the kernels"
    carry_out(library, move)


def put_tiles(codec: Codec, raw: Mapping[str, torch.Tensor], into: PackedWeight) -> None:
    """Put one matrix into tiles, whose format is `format_of` its codec.

    Args:
        codec: the matrix's codec; it decodes to [out, in], and is not `PackedInt`, whose words need a flip.
        raw: its components in RAM.
        into: in tiles, contiguous in RAM.

    Raises:
        CheckpointError: as `rows_of`.
    """
    if isinstance(codec, GgufBlocks):
        blocks = raw[BLOCKS].contiguous()
        _carry_out(retiling(codec, blocks, into), torch.Tensor.copy_)
        return
    tiles, rows = into.params(""), rows_of(codec, raw, (into.rows, into.cols), into.format)
    assert rows.keys() == tiles.keys(), (codec, rows.keys())
    for plane, part in rows.items():
        _carry_out(_tiled(part, tiles[plane]), torch.Tensor.copy_)


def _transposed_pairs(both: torch.Tensor) -> torch.Tensor:
    """bf16 [in, 2 out], gate and up in alternate columns -> int32 [out, in], the gate in the low half of each word.

    Four times as fast as copying every other column of the transpose (0.6 against 0.14 GB/s of one core).
    """
    if both.data_ptr() % 4:
        both = both.clone()
    return both.view(torch.int32).mT.contiguous()


def _half(pairs: torch.Tensor, which: int) -> torch.Tensor:
    """bf16 of the low (0) or high (1) halves."""
    return (pairs >> 16 if which else pairs).to(torch.int16).view(torch.bfloat16)
