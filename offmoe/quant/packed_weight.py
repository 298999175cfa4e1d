"""Quantized weights as words: which bits stand where, at rest and where kernels read them.

A weight [rows, cols] is int32 words of consecutive inputs, lowest bits first: 8 nibbles or 4 bytes. At rest they stand
row by row: for int4 these are the words of compressed-tensors' `pack-quantized`, for mxfp4 the blocks of gpt-oss. In
RAM and on the device the same words stand in tiles of 16 rows, [rows / 16, words of a row, 16], because 16 rows of one
word are one 64-byte load whose lanes need the same activations (kernels.md A.4: 1.2 to 2.3 times the speed of rows).
Scales and zero points move along. Both orders have the same bytes at the same offsets of a record, so an expert is one
contiguous copy at every step, and no layout depends on an instruction set.

What it must never do: change a value on the way between orders. Values are (q - zero) * scale, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from offmoe.errors import ConfigError, UnsupportedModelError
from offmoe.quant.codec import codes_of_words

TILE_ROWS = 16
"""Rows per tile: the lanes of one AVX-512 register, two of AVX2, four of NEON."""

SYMMETRIC_ZERO = 8
"""Zero point of int4 without a zero-point plane: nibbles are q + 8."""

SCALES, ZEROS = ".scales", ".zeros"
"""What the scales and zero points of a weight are called: its own name and this."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of mxfp4's nibbles 0 to 7; 8 to 15 are their negatives (OCP microscaling formats 1.0, section 5.3.3)."""


@dataclass(frozen=True)
class WeightFormat:
    """How numbers became bits. kind: "int4", "int8", "mxfp4" or "fp8" (E4M3). group: consecutive inputs of a row that
    share a scale, None for the whole row. zero_points: int4 only, one uint8 per group beside its scale; without, zero
    is 8.
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
        """Values in a word."""
        return 32 // self.bits

    def groups(self, cols: int) -> int:
        """Scales per row."""
        return 1 if self.group is None else cols // self.group

    def check(self, name: str, rows: int, cols: int) -> None:
        """UnsupportedModelError if a weight of this shape cannot be held: whole tiles and whole groups only."""
        multiple = self.group or TILE_ROWS
        if rows % TILE_ROWS or cols % multiple or rows < 1 or cols < 1:
            raise UnsupportedModelError(
                f"{name} is [{rows}, {cols}]; {self} needs multiples of [{TILE_ROWS}, {multiple}]. "
                + self._remedy(rows, cols)
            )

    def _remedy(self, rows: int, cols: int) -> str:
        """What holds a weight of this shape instead."""
        if self.kind in ("int4", "int8") and rows and cols and rows % TILE_ROWS == 0:
            group = next((n for n in reversed(INT4_GROUPS) if cols % n == 0), None)
            if self.kind == "int4" and group:
                return f"Use groups of {group} ('offmoe pack MODEL OUT --group {group}'), or experts='native'"
            if self.kind == "int4" and cols % TILE_ROWS == 0:
                return "Use experts='int8', which fits it, or 'native'"
        return "Use experts='native'"

    def params(self, name: str, rows: int, cols: int, tiled: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Tensors that hold a weight [rows, cols], as `ExpertLayout.of` takes them; in tiles or row by row."""
        self.check(name, rows, cols)
        parts = {name: (torch.int32, cols // self.word_values), name + SCALES: (self.scale_dtype, self.groups(cols))}
        if self.zero_points:
            parts[name + ZEROS] = (torch.uint8, self.groups(cols))
        return {
            part: (dtype, (rows // TILE_ROWS, n, TILE_ROWS) if tiled else (rows, n))
            for part, (dtype, n) in parts.items()
        }

    def __str__(self) -> str:
        return f"{self.kind} in groups of {self.group}" if self.group else f"{self.kind} per row"


INT4_GROUPS = (32, 64, 128)
INT8 = WeightFormat("int8", None)
MXFP4 = WeightFormat("mxfp4", 32, scale_dtype=torch.uint8)


def int4(group: int = 64, zero_points: bool = False) -> WeightFormat:
    """The int4 format of a group size; ConfigError for one that the kernels do not have."""
    if group not in INT4_GROUPS:
        raise ConfigError(f"int4 group size {group} is not one of {', '.join(map(str, INT4_GROUPS))}")
    return WeightFormat("int4", group, zero_points)


def fp8(group: int) -> WeightFormat:
    """The fp8 format with this many columns per scale; a block's is repeated for each of its rows (3 % for 128)."""
    return WeightFormat("fp8", group, scale_dtype=torch.float32)


@dataclass(frozen=True)
class PackedWeight:
    """One weight [rows, cols]: words int32, scales of the format's dtype, zeros uint8 or None.

    Row by row [rows, n]; in tiles [rows / 16, n, 16].
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
        """The weight `name` of a record, from `ExpertLayout.views`; no bytes move."""
        return cls(how, params[name], params[name + SCALES], params[name + ZEROS] if how.zero_points else None)

    def params(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors by the names they have in a record."""
        out = {name: self.words, name + SCALES: self.scales}
        return out if self.zeros is None else out | {name + ZEROS: self.zeros}

    def tiled(self) -> PackedWeight:
        """The same words in tiles, for kernels."""
        return self if self.is_tiled else self._each(to_tiles)

    def by_row(self) -> PackedWeight:
        """The same words row by row, for disk."""
        return self._each(to_rows) if self.is_tiled else self

    def values(self) -> torch.Tensor:
        """The weight itself, float32 [rows, cols]: what every kernel is checked against."""
        rows = self.by_row()
        q = unpack_words(rows.words, self.format)  # [N, K]
        grouped = q.view(self.rows, self.format.groups(self.cols), -1)  # [N, K / G, G]
        if self.format.kind == "mxfp4":
            codes = torch.tensor(E2M1, dtype=torch.float32)
            codes = torch.cat([codes, -codes])
            powers = torch.ldexp(torch.ones(rows.scales.shape), rows.scales.int() - 127)  # [N, K / G]
            return (codes[grouped.long()] * powers[..., None]).view(self.rows, self.cols)
        levels = grouped.float()
        if self.format.kind == "int4":
            levels -= SYMMETRIC_ZERO if rows.zeros is None else rows.zeros.float()[..., None]
        return (levels * rows.scales.float()[..., None]).view(self.rows, self.cols)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedWeight:
        zeros = None if self.zeros is None else change(self.zeros)
        return PackedWeight(self.format, change(self.words), change(self.scales), zeros)


def pack_words(q: torch.Tensor, how: WeightFormat) -> torch.Tensor:
    """q [N, K], uint8 nibbles, int8 or float8_e4m3fn -> words int32 [N, K / values of a word]."""
    if how.bits == 8:
        return q.contiguous().view(torch.int32)
    pairs = q.view(q.shape[0], -1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).view(torch.int32)


def unpack_words(words: torch.Tensor, how: WeightFormat) -> torch.Tensor:
    """words int32 [N, C] -> uint8 nibbles, int8 or float8_e4m3fn [N, C * values of a word]."""
    codes = codes_of_words(words, how.bits)
    if how.kind == "fp8":
        return codes.view(torch.float8_e4m3fn)
    return codes.view(torch.int8) if how.bits == 8 else codes


def to_tiles(part: torch.Tensor) -> torch.Tensor:
    """[N, C] -> [N / 16, C, 16], same values."""
    rows, n = part.shape
    return part.view(rows // TILE_ROWS, TILE_ROWS, n).transpose(1, 2).contiguous()


def to_rows(part: torch.Tensor) -> torch.Tensor:
    """[N / 16, C, 16] -> [N, C], same values."""
    tiles, n, _ = part.shape
    return part.transpose(1, 2).contiguous().view(tiles * TILE_ROWS, n)
