"""Where one weight of an expert stands in a slot, as the GPU kernels need to know it.

All experts of a layer have the same operands; they differ in where their slot starts. A kernel is compiled once per
operand, with its fields as constants, so an operand is a frozen value of plain numbers and strings.

Moves: nothing. Bound: none.
Must never: describe a format that the kernels do not read. Such a format raises UnsupportedModelError, and torch's
operators compute the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from offmoe.errors import UnsupportedModelError
from offmoe.quant.codec import Codec
from offmoe.quant.float_formats import Mxfp4, ScaledFloat
from offmoe.quant.int_formats import PackedInt
from offmoe.storage.layout import Param

ELEMENTS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "uint8",
    torch.float8_e8m0fnu: "uint8",
}
"""Triton's names for the dtypes of scales, biases and unquantized weights. Scales that are bytes are exponents of 2."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of unquantized weights that the kernels read."""

VALUES = {"float": 1, "fp8": 1, "uint8": 4, "int4": 8, "mxfp4": 8}
"""Weights in one element: a number, a byte, or an int32 word. uint8 is int8 with 128 added."""


@dataclass(frozen=True)
class Operand:
    """A weight [rows, cols] that computes x w^T, and its bias if it has one.

    Every `_at` is an offset in bytes from the slot's start. Dtypes are Triton's names.
    """

    kind: str
    """A key of VALUES."""
    element: str
    """Dtype of the elements."""
    rows: int
    cols: int
    at: int
    """Offset of the parameter's first element, in bytes."""
    first: int = 0
    """Row r of the weight is row first + r * step of its parameter: gate and up may be its halves, or take turns."""
    step: int = 1
    row_stride: int = 1
    """Elements from one row to the next."""
    col_stride: int = 1
    """Elements from one column to the next."""
    scale: str = ""
    """Dtype of the scales; "": there are none."""
    scale_at: int = 0
    scale_rows: int = 1
    """Rows that share a scale."""
    group: int = 1
    """Columns that share a scale."""
    bias: str = ""
    """Dtype of the bias; "": there is none."""
    bias_at: int = 0

    @property
    def values(self) -> int:
        """Weights per element."""
        return VALUES[self.kind]

    @property
    def offset(self) -> float:
        """What the kernels' numbers of integers exceed the integers by (`lane` of triton/elements.py); 0 for others."""
        return {"uint8": 384.0, "int4": 24.0}.get(self.kind, 0.0)

    @property
    def width(self) -> int:
        """Elements per row."""
        return self.cols // self.values

    @property
    def groups(self) -> int:
        """Scales per row."""
        return -(-self.cols // self.group)

    def part(self, rows: int, first: int, step: int = 1) -> Operand:
        """A weight of `rows` of these rows: every `step`-th from `first` on."""
        assert first + (rows - 1) * step < self.rows, (rows, first, step)
        return replace(self, rows=rows, first=self.first + first * self.step, step=self.step * step)

    def with_bias(self, bias: Param) -> Operand:
        """The same with a bias, which has one value for every row of the parameter. bias: its place in the slot."""
        return replace(self, bias=_element(bias), bias_at=bias.offset)


@dataclass(frozen=True)
class GatedOperands:
    """The weights of one expert: gate and up [I, H], down [H, I]."""

    gate: Operand
    up: Operand
    down: Operand

    def __post_init__(self) -> None:
        gate, up, down = self.gate, self.up, self.down
        assert (gate.kind, gate.rows, gate.cols) == (up.kind, up.rows, up.cols), "gate and up differ"
        assert (down.rows, down.cols) == (up.cols, up.rows), "down does not take what up gives"

    @property
    def hidden(self) -> int:
        return self.down.rows

    @property
    def inner(self) -> int:
        return self.down.cols


def float_operand(weight: Param, transposed: bool = False) -> Operand:
    """A weight that is not quantized. transposed: the parameter is [cols, rows]."""
    if weight.dtype not in FLOATS or len(weight.shape) != 2:
        raise _unread(f"{weight.dtype} {list(weight.shape)}")
    a, b = weight.shape
    rows, cols, row_stride, col_stride = (b, a, 1, b) if transposed else (a, b, b, 1)
    return Operand(
        "float", ELEMENTS[weight.dtype], rows, cols, weight.offset, row_stride=row_stride, col_stride=col_stride
    )


def coded_operand(codec: Codec, parts: Mapping[str, Param]) -> Operand:
    """A weight as a quantized checkpoint stores it, [out, in]; MXFP4 too, although its codec decodes the transpose.

    Args:
        parts: the components' places in the slot, by the codec's names.
    Raises:
        UnsupportedModelError: the kernels do not read the format.
    """
    if isinstance(codec, Mxfp4):
        blocks = parts["blocks"]
        return _scaled_operand("mxfp4", blocks, parts["scales"], blocks.shape[1] * 32, 32)
    if isinstance(codec, ScaledFloat) and parts["weight"].dtype == torch.float8_e4m3fn:
        return _fp8_operand(codec, parts["weight"], parts["scale"])
    if isinstance(codec, PackedInt) and codec.symmetric and not codec.ordered:
        words, scale = parts["packed"], parts["scale"]
        rows, width = words.shape
        cols = width * (32 // codec.bits)
        group = codec.group or cols
        if group % 8 == 0 and cols % group == 0:
            scale_rows = rows if codec.group is None and scale.shape[:1] != (rows,) else 1
            return _scaled_operand("int4" if codec.bits == 4 else "uint8", words, scale, cols, group, scale_rows)
    raise _unread(codec.name)


def _fp8_operand(codec: ScaledFloat, weight: Param, scale: Param) -> Operand:
    rows, cols = weight.shape
    scale_rows, group = 1 if scale.shape[:1] == (rows,) else rows, cols
    if codec.block is not None:
        blocks = tuple(-(-size // step) for size, step in zip(weight.shape, codec.block, strict=True))
        if scale.shape == blocks:
            scale_rows, group = codec.block
    return _scaled_operand("fp8", weight, scale, cols, group, scale_rows)


def _scaled_operand(kind: str, weight: Param, scale: Param, cols: int, group: int, scale_rows: int = 1) -> Operand:
    """A weight of `cols` columns, row by row, with a scale per `scale_rows` rows and `group` columns."""
    return Operand(
        kind=kind,
        element="uint8" if kind == "fp8" else "int32",
        rows=weight.shape[0],
        cols=cols,
        at=weight.offset,
        row_stride=cols // VALUES[kind],
        scale=_element(scale),
        scale_at=scale.offset,
        scale_rows=scale_rows,
        group=group,
    )


def _element(param: Param) -> str:
    if param.dtype not in ELEMENTS:
        raise _unread(f"{param.dtype} in {param.name!r}")
    return ELEMENTS[param.dtype]


def _unread(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the device kernels do not read {what}; use exactness='bitwise'")
