"""Quantized weights as words: which bits stand where, at rest and where kernels read them.

A weight [rows, cols] is int32 words of consecutive inputs, lowest bits first: 8 nibbles or 4 bytes per word. At rest
the words stand row by row; for int4 they are those of compressed-tensors' `pack-quantized`, for mxfp4 the blocks of
gpt-oss. In slots that kernels read, the same words stand in tiles of 16 rows, [rows / 16, words of a row, 16]: one word
of 16 rows is one 64-byte load, and all its lanes need the same activations (1.2 to 2.3 times as fast as rows).
Scales and zero points stand in the same order. Both orders take the same bytes at the same offsets, and neither depends
on the instruction set. A value is (q - zero) * scale in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offmoe.errors import ConfigError, UnsupportedModelError

TILE_ROWS = 16
"""Rows per tile: the lanes of one AVX-512 register, two of AVX2, four of NEON."""

SYMMETRIC_ZERO = 8
"""Zero point of int4 without a zero-point plane: nibbles are q + 8."""

SCALES, ZEROS = ".scales", ".zeros"
"""What the name of a weight's scales and zero points adds to the weight's own name."""


@dataclass(frozen=True)
class WeightFormat:
    """The format of a packed weight.

    Args:
        kind: "int4", "int8", "mxfp4" or "fp8" (E4M3).
        group: consecutive inputs of a row that share a scale; None: the whole row.
        zero_points: int4 only: each group has a zero point, uint8. Without, the zero point is 8.
        scale_dtype: dtype of the scales; uint8 (exponents of two, bias 127) for mxfp4.
    """

    kind: str
    group: int | None
    zero_points: bool = False
    scale_dtype: torch.dtype = torch.bfloat16

    @property
    def bits(self) -> int:
        return 8 if self.kind in ("int8", "fp8") else 4

    @property
    def word_values(self) -> int:
        """Weights per int32 word."""
        return 32 // self.bits

    def groups(self, cols: int) -> int:
        """Scales per row."""
        return 1 if self.group is None else cols // self.group

    def check(self, name: str, rows: int, cols: int) -> None:
        """Check that a weight of this shape is whole tiles and whole groups. name: the weight's name for the message.

        Raises:
            UnsupportedModelError: it is not; the message says what to use instead.
        """
        multiple = self.group or TILE_ROWS
        if rows % TILE_ROWS or cols % multiple or rows < 1 or cols < 1:
            raise UnsupportedModelError(
                f"{name} is [{rows}, {cols}]; {self} needs multiples of [{TILE_ROWS}, {multiple}]. "
                + self._remedy(rows, cols)
            )

    def _remedy(self, rows: int, cols: int) -> str:
        """What to use for a weight of this shape instead."""
        if self.kind in ("int4", "int8") and rows and cols and rows % TILE_ROWS == 0:
            group = next((n for n in reversed(INT4_GROUPS) if cols % n == 0), None)
            if self.kind == "int4" and group:
                return f"Use groups of {group} ('offmoe pack MODEL OUT --group {group}'), or experts='native'"
            if self.kind == "int4" and cols % TILE_ROWS == 0:
                return "Use experts='int8', which fits it, or 'native'"
        return "Use experts='native'"

    def params(self, name: str, rows: int, cols: int, tiled: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors that hold one weight, as `ExpertLayout.of` takes them.

        Args:
            name: the weight's name.
            rows: outputs of the weight.
            cols: inputs of the weight.
            tiled: in tiles of 16 rows; else row by row.

        Returns:
            name -> (dtype, shape) of words, scales and, if the format has them, zero points.

        Raises:
            UnsupportedModelError: the format cannot hold the shape.
        """
        self.check(name, rows, cols)
        widths = {name: (torch.int32, cols // self.word_values), name + SCALES: (self.scale_dtype, self.groups(cols))}
        if self.zero_points:
            widths[name + ZEROS] = (torch.uint8, self.groups(cols))
        return {
            tensor: (dtype, (rows // TILE_ROWS, n, TILE_ROWS) if tiled else (rows, n))
            for tensor, (dtype, n) in widths.items()
        }

    def __str__(self) -> str:
        return f"{self.kind} in groups of {self.group}" if self.group else f"{self.kind} per row"


INT4_GROUPS = (32, 64, 128)
"""The group sizes of int4 that the kernels have."""
INT8 = WeightFormat("int8", None)
MXFP4 = WeightFormat("mxfp4", 32, scale_dtype=torch.uint8)


def int4(group: int = 64, zero_points: bool = False) -> WeightFormat:
    """The int4 format with `group` inputs per scale.

    Raises:
        ConfigError: the kernels do not have this group size.
    """
    if group not in INT4_GROUPS:
        raise ConfigError(f"int4 group size {group} is not one of {', '.join(map(str, INT4_GROUPS))}")
    return WeightFormat("int4", group, zero_points)


def fp8(group: int) -> WeightFormat:
    """The fp8 format with `group` inputs per scale. The scale of a block is stored once per row (3 % more for 128)."""
    return WeightFormat("fp8", group, scale_dtype=torch.float32)


@dataclass(frozen=True)
class PackedWeight:
    """One weight [rows, cols], row by row or in tiles.

    Args:
        format: the format.
        words: int32; row by row [rows, n], in tiles [rows / 16, n, 16].
        scales: in the format's scale dtype, in the same order as the words.
        zeros: uint8, in the same order; None if the format has no zero points.
    """

    format: WeightFormat
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @property
    def is_tiled(self) -> bool:
        return self.words.ndim == 3

    @property
    def rows(self) -> int:
        return self.words.shape[0] * (TILE_ROWS if self.is_tiled else 1)

    @property
    def cols(self) -> int:
        return self.words.shape[1] * self.format.word_values

    @classmethod
    def of(cls, how: WeightFormat, name: str, params: Mapping[str, torch.Tensor]) -> PackedWeight:
        """The weight `name` among the parameters of a slot, from `ExpertLayout.views`; no bytes move."""
        return cls(how, params[name], params[name + SCALES], params[name + ZEROS] if how.zero_points else None)

    def params(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors by their names in a slot, as in `WeightFormat.params`."""
        out = {name: self.words, name + SCALES: self.scales}
        return out if self.zeros is None else out | {name + ZEROS: self.zeros}

    def tiled(self) -> PackedWeight:
        """The same weight in tiles, as kernels read it."""
        if self.is_tiled:
            return self
        zeros = None if self.zeros is None else to_tiles(self.zeros)
        return PackedWeight(self.format, to_tiles(self.words), to_tiles(self.scales), zeros)


def pack_words(q: torch.Tensor, how: WeightFormat) -> torch.Tensor:
    """Pack q [N, K] (uint8 nibbles, int8 or float8_e4m3fn) into words int32 [N, K / word_values]."""
    if how.bits == 8:
        return q.contiguous().view(torch.int32)
    pairs = q.view(q.shape[0], -1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).view(torch.int32)


def to_tiles(by_row: torch.Tensor) -> torch.Tensor:
    """Rows to tiles: [N, C] -> [N / 16, C, 16]."""
    rows, n = by_row.shape
    return by_row.view(rows // TILE_ROWS, TILE_ROWS, n).transpose(1, 2).contiguous()
