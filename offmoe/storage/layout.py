"""Byte layout of one expert: at rest in the shards, and in a device slot.

Moves: the tensors of one expert (or slices of tensors) into one slot, in the checkpoint's own dtype. At rest an expert
is a list of segments. In a slot it is a set of parameters, each at an aligned offset. An `Assembly` says which segment
goes where. Most checkpoints need contiguous copies only; transposed and interleaved ones need strided copies; what no
strided copy can express is converted on the host first.
Bound: the link or the memory that the bytes cross.
Must never: change a value. Every path here permutes the checkpoint's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

PARAM_ALIGNMENT = 256
"""Bytes. The offset of every parameter in a slot is a multiple of it: 16-byte vector loads, TMA and cuBLAS want aligned
weights, and PyTorch's matrix product on a CPU chooses its path by alignment too.
"""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The safetensors dtype names that a slot can hold."""

Copy = Callable[[torch.Tensor, torch.Tensor], object]
"""copy(destination, source) moves one tensor towards a slot. A backend may only queue it on a stream."""


class Units(NamedTuple):
    """How one segment gets into a slot in pieces, before the rest of it and of its expert are there.

    nbytes: of a unit; units stand one behind the other from the segment's first byte on, and are whole. params: what is
    not complete in the slot before they are. put: puts units that stand together: put(first byte in the segment, uint8
    [bytes], copy).
    """

    nbytes: int
    params: Collection[str]
    put: Callable[[int, torch.Tensor, Copy], None]


class Early(NamedTuple):
    """How an expert gets into a slot part by part, while the rest of it is read.

    runs: per segment uint8 [nbytes], the slot bytes that it fills without change, or None. units: per segment how it
    gets there otherwise, or None. is_all: whether nothing is left to be put when all runs and units are; else segments
    with neither wait for the whole expert.
    """

    runs: Sequence[torch.Tensor | None]
    units: Sequence[Units | None]
    is_all: bool


class Placement(Protocol):
    """Fills a slot in host memory by itself, into which it may write without `copy`."""

    def __call__(self, tensors: list[torch.Tensor], views: Mapping[str, torch.Tensor], copy: Copy) -> None:
        """Fill a slot. tensors: of the segments."""

    def units(self, segments: Sequence[Segment], views: Mapping[str, torch.Tensor]) -> list[Units | None] | None:
        """How each segment gets into a slot in pieces; None for one that the slot does not need.

        Returns None in place of a list if all segments have to be there first.
        """


def aligned(size: int, to: int) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -(-size // to) * to


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor at rest.

    Args:
        shard: index into `Checkpoint.shards`.
        offset: bytes from the start of that file.
        nbytes: bytes of the values.
        dtype: dtype of the values.
        shape: shape of the values.
    """

    shard: int
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Segment(TensorInfo):
    """A run of bytes in one shard: a whole tensor, or contiguous rows of one.

    Args:
        name: the tensor's name in the checkpoint.
    """

    name: str


@dataclass(frozen=True)
class Param:
    """One parameter of an expert inside its slot: bytes [offset, offset + nbytes)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ExpertLayout:
    """Where the parameters of one expert stand in a slot of `nbytes` bytes. Equal layouts may share slots."""

    params: tuple[Param, ...]
    nbytes: int

    @classmethod
    def of(cls, params: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> ExpertLayout:
        """Parameters in the order of `params` (name -> dtype and shape), each at the next aligned offset."""
        out, offset = [], 0
        for name, (dtype, shape) in params.items():
            nbytes = dtype.itemsize * math.prod(shape)
            out.append(Param(name, dtype, shape, offset, nbytes))
            offset = aligned(offset + nbytes, PARAM_ALIGNMENT)
        return cls(tuple(out), offset)

    def views(self, slot: torch.Tensor) -> dict[str, torch.Tensor]:
        """Typed views of a slot, by parameter name; no bytes move.

        Args:
            slot: uint8 [nbytes], aligned to PARAM_ALIGNMENT.
        """
        return {p.name: slot[p.offset : p.offset + p.nbytes].view(p.dtype).view(p.shape) for p in self.params}


@dataclass(frozen=True)
class Destination:
    """Where one segment goes: n rows of parameter `param` along `dim`, every `step`-th from `start` on.

    With `transposed`, rows of the parameter's transpose. The segment has the shape of that block, except for a leading
    dimension of size 1 that `dim` does not count.
    """

    param: str
    dim: int
    start: int
    transposed: bool = False
    step: int = 1

    def block(self, views: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """The view of the parameter that a segment of `shape` fills. views: from `ExpertLayout.views`."""
        whole = views[self.param]
        if self.transposed:
            whole = whole.mT
        if not whole.ndim:
            return whole
        if self.step == 1:
            return whole.narrow(self.dim, self.start, shape[self.dim])
        end = self.start + self.step * (shape[self.dim] - 1) + 1
        return whole[(*(slice(None),) * self.dim, slice(self.start, end, self.step))]


@dataclass(frozen=True)
class Assembly:
    """How the segments of an expert become the parameters in its slot. All experts of a layer share one.

    Args:
        destinations: where each segment goes, in the order of the record. Empty if one of the others is set.
        convert: maps the segments' tensors to parameters by name, in host memory; it only permutes values.
        write: fills the slot itself. For slots in host memory only.
    """

    destinations: tuple[Destination, ...] = ()
    convert: Callable[[list[torch.Tensor]], dict[str, torch.Tensor]] | None = field(default=None, compare=False)
    write: Placement | None = field(default=None, compare=False)

    def runs(self, segments: Sequence[Segment], views: Mapping[str, torch.Tensor]) -> list[torch.Tensor | None]:
        """The slot bytes that each segment fills without change, so that pieces can be copied while others are read.

        Returns:
            Per segment uint8 [nbytes], or None where the segment's values do not stay together.
        """
        if self.convert is not None or self.write is not None:
            return [None] * len(segments)
        blocks = [to.block(views, segment.shape) for to, segment in zip(self.destinations, segments, strict=True)]
        return [block.reshape(-1).view(torch.uint8) if block.is_contiguous() else None for block in blocks]

    def early(self, segments: Sequence[Segment], views: Mapping[str, torch.Tensor], in_parts: bool) -> Early:
        """How an expert gets into a slot with these views part by part. in_parts: whether it is read in several."""
        runs = self.runs(segments, views)
        units = None if self.write is None or not in_parts else self.write.units(segments, views)
        if units is None:
            return Early(runs, [None] * len(segments), None not in runs)
        return Early(runs, units, is_all=True)

    def place(
        self,
        segments: Sequence[Segment],
        data: Sequence[torch.Tensor],
        views: Mapping[str, torch.Tensor],
        copy: Copy,
        skip: Collection[int] = (),
        runs: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """Copy one expert into a slot.

        Args:
            segments: the expert's segments, in the order of its record.
            data: per segment uint8 [nbytes], the bytes that were read.
            views: the slot's parameters, from `ExpertLayout.views`.
            copy: copies one tensor.
            skip: indices of segments that the slot holds already.
            runs: the result of `runs`, if the caller has it.
        """
        if self.convert is not None or self.write is not None:
            tensors = [typed(d, s.dtype, s.shape) for d, s in zip(data, segments, strict=True)]
            if self.write is not None:
                self.write(tensors, views, copy)
                return
            assert self.convert is not None
            for name, tensor in self.convert(tensors).items():
                copy(views[name], tensor)
            return
        runs = self.runs(segments, views) if runs is None else runs
        for i, (run, segment, raw) in enumerate(zip(runs, segments, data, strict=True)):
            if i in skip:
                continue
            if run is not None:
                copy(run, raw)  # copied as bytes, so the source may stand at any address
            else:
                block = self.destinations[i].block(views, segment.shape)
                copy(block, typed(raw, segment.dtype, block.shape))


@dataclass(frozen=True)
class ExpertRecord:
    """One expert at rest: the segments to read, in the order that its layer's assembly expects."""

    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(s.nbytes for s in self.segments)


def typed(raw: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Bytes as a tensor. Copies only if the dtype cannot stand at their address."""
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)
