"""Byte layout of one expert: at rest in the shards, and in a device slot.

What moves: the bytes of a few tensors (or slices of tensors) of a checkpoint into one slot, in the checkpoint's own
dtype. An expert at rest is a list of segments; in a slot it is the parameters that its module computes with, each at
an aligned offset. An `Assembly` says which segment goes where. The common case is a copy of contiguous bytes;
transposed and interleaved checkpoints are strided copies; a conversion that cannot be expressed so runs on the host
first.

What it must never do: change a value. Every path here is a permutation of the checkpoint's bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

PARAM_ALIGNMENT = 256
"""Bytes. 16-byte vector loads, TMA and cuBLAS want aligned weights (io.md section 6); CPU GEMM picks its path by it
too.
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
"""safetensors dtype names that a slot can hold."""

Copy = Callable[[torch.Tensor, torch.Tensor], object]
"""copy(destination, source): how bytes reach a slot; a backend's stream decides when."""


def aligned(size: int, to: int) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -(-size // to) * to


@dataclass(frozen=True)
class Segment:
    """A run of bytes of one shard: a whole tensor or contiguous leading rows of one. `offset` counts from the file's
    start.
    """

    shard: int
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
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
        out, offset = [], 0
        for name, (dtype, shape) in params.items():
            nbytes = dtype.itemsize * _numel(shape)
            out.append(Param(name, dtype, shape, offset, nbytes))
            offset = aligned(offset + nbytes, PARAM_ALIGNMENT)
        return cls(tuple(out), offset)

    def views(self, slot: torch.Tensor) -> dict[str, torch.Tensor]:
        """Typed views of a slot (uint8 [nbytes], aligned to PARAM_ALIGNMENT); no bytes move."""
        return {p.name: slot[p.offset : p.offset + p.nbytes].view(p.dtype).view(p.shape) for p in self.params}


@dataclass(frozen=True)
class Part:
    """Destination of one segment: rows [start, start + n) along `dim` of a parameter, or of its transpose.

    The segment's shape, after dropping a leading 1 if `dim` counts without it, is the shape of that block.
    """

    param: str
    dim: int
    start: int
    transposed: bool = False

    def block(self, views: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        whole = views[self.param]
        if self.transposed:
            whole = whole.mT
        return whole.narrow(self.dim, self.start, shape[self.dim]) if whole.ndim else whole


@dataclass(frozen=True)
class Assembly:
    """How the segments of an expert become the parameters in its slot; shared by all experts of a layer.

    Either `parts[i]` is the destination of segment i, or `convert` maps the list of segment tensors to parameters by
    name (host memory, values only permuted)."""

    parts: tuple[Part, ...] = ()
    convert: Callable[[list[torch.Tensor]], dict[str, torch.Tensor]] | None = field(default=None, compare=False)

    def runs(self, segments: Sequence[Segment], views: Mapping[str, torch.Tensor]) -> list[torch.Tensor | None]:
        """Where each segment goes byte for byte, uint8 [nbytes], so that parts of it can be copied as they arrive;
        None where its values move apart.
        """
        if self.convert is not None:
            return [None] * len(segments)
        blocks = [part.block(views, segment.shape) for part, segment in zip(self.parts, segments, strict=True)]
        return [block.reshape(-1).view(torch.uint8) if block.is_contiguous() else None for block in blocks]

    def place(
        self,
        segments: Sequence[Segment],
        data: Sequence[torch.Tensor],
        views: Mapping[str, torch.Tensor],
        copy: Copy,
        there: Collection[int] = (),
    ) -> None:
        """Copy one expert into a slot, but for the segments that are `there`. data[i]: uint8 [segments[i].nbytes];
        views: the slot's, from `ExpertLayout.views`.
        """
        if self.convert is not None:
            for name, tensor in self.convert([typed(d, s) for d, s in zip(data, segments, strict=True)]).items():
                copy(views[name], tensor)
            return
        for i, (run, segment, raw) in enumerate(zip(self.runs(segments, views), segments, data, strict=True)):
            if i in there:
                continue
            if run is not None:
                copy(run, raw)  # bytes, so that alignment of the source does not matter
            else:
                block = self.parts[i].block(views, segment.shape)
                copy(block, typed(raw, segment).view(block.shape))


@dataclass(frozen=True)
class ExpertRecord:
    """One expert at rest: the segments to read, in the order its layer's assembly expects them."""

    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.segments)


def typed(raw: torch.Tensor, segment: Segment) -> torch.Tensor:
    """Bytes of a segment as its tensor; copies only if the bytes stand at an address the dtype cannot have."""
    if raw.data_ptr() % segment.dtype.itemsize:
        raw = raw.clone()
    return raw.view(segment.dtype).view(segment.shape)


def _numel(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
