"""Quantized weights as words: which bits stand where, at rest and where kernels read them.

A weight [rows, cols] is int32 words of consecutive inputs, lowest bits first: 8 nibbles or 4 bytes per word. At rest
the words stand row by row; for int4 they are those of compressed-tensors' `pack-quantized`, for mxfp4 the blocks of
gpt-oss. In slots that kernels read, the same words stand in tiles of 16 rows, [rows / 16, words of a row, 16]: one word
of 16 rows is one 64-byte load, and all its lanes need the same activations (1.2 to 2.3 times as fast as rows).
Scales and zero points stand in the same order. Both orders take the same bytes at the same offsets, and neither depends
on the instruction set. A value is (q - zero) * scale in both.

The formats of GGUF's blocks add three planes. Codes of 5 or 6 bits keep what exceeds a nibble in words of their own
("high"); those of 2 and 3 bits have words of pairs, and third bits above them. A minimum per group is subtracted from
q * scale. Scales of two levels are an int8 code per group times a float16 per 256 inputs; minima are then codes too,
with a float16 of their own.
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

SCALES, ZEROS, MINIMA, HIGH, SUPERS = ".scales", ".zeros", ".minima", ".high", ".supers"
PLANES = (SCALES, ZEROS, MINIMA, HIGH, SUPERS)
"""What the names of a weight's further planes add to the weight's own name."""

TILES = {"": "tiles", SCALES: "tiles_scale", ZEROS: "tiles_zero"}
"""By plane, what it is called in a checkpoint that stores tiles. In this order the planes follow each other there."""
PLANE_OF = {component: plane for plane, component in TILES.items()}
"""The same by what it is called."""

SUPER_VALUES = 256
"""Inputs per float16 of scales of two levels: a block of GGUF's k-quants."""

CODE_BITS = {"int2": 2, "int3": 3, "int4": 4, "int5": 5, "int6": 6, "int8": 8, "mxfp4": 4, "iq4": 4, "fp8": 8}
"""Bits of a weight by kind."""
CENTER = {"int3": 4, "int4": SYMMETRIC_ZERO, "int5": 16, "int6": 32}
"""By kind, the zero point of codes without zero points and minima."""


@dataclass(frozen=True)
class WeightFormat:
    """The format of a packed weight.

    Args:
        kind: "int2" to "int6", "int8", "mxfp4", "fp8" (E4M3) or "iq4" (the 16 levels of GGUF's IQ4).
        group: consecutive inputs of a row that share a scale; None: the whole row.
        zero_points: int4 only: each group has a zero point, uint8. Without, the zero point is that of `CENTER`.
        scale_dtype: dtype of the scales; uint8 (exponents of two, bias 127) for mxfp4; int8 for two levels.
        minima: int4 and int5: each group has a minimum, of the scales' dtype, and zero points are 0. int2: always, in
            the upper half of the scale's byte.
    """

    kind: str
    group: int | None
    zero_points: bool = False
    scale_dtype: torch.dtype = torch.bfloat16
    minima: bool = False

    @property
    def bits(self) -> int:
        return CODE_BITS[self.kind]

    @property
    def word_values(self) -> int:
        """Weights per int32 word."""
        return {8: 4, 2: 16, 3: 16}.get(self.bits, 8)

    @property
    def two_levels(self) -> bool:
        """Whether scales are codes, times a float16 per SUPER_VALUES inputs."""
        return self.scale_dtype == torch.int8

    @property
    def multiple(self) -> int:
        """A row is a multiple of so many inputs."""
        return SUPER_VALUES if self.two_levels else self.group or TILE_ROWS

    def groups(self, cols: int) -> int:
        """Scales per row."""
        return 1 if self.group is None else cols // self.group

    def check(self, name: str, rows: int, cols: int) -> None:
        """Check that a weight of this shape is whole tiles and whole groups. name: the weight's name for the message.

        Raises:
            UnsupportedModelError: it is not; the message says what to use instead.
        """
        if rows % TILE_ROWS or cols % self.multiple or rows < 1 or cols < 1:
            raise UnsupportedModelError(
                f"{name} is [{rows}, {cols}]; {self} needs multiples of [{TILE_ROWS}, {self.multiple}]. "
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

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a weight of this shape."""
        return rows * sum(dtype.itemsize * count for dtype, count in self.planes(cols).values())

    def params(self, name: str, rows: int, cols: int, tiled: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors that hold one weight, as `ExpertLayout.of` takes them.

        Args:
            name: the weight's name.
            rows: outputs of the weight.
            cols: inputs of the weight.
            tiled: in tiles of 16 rows; else row by row.

        Returns:
            name -> (dtype, shape) of words, scales and the further planes that the format has.

        Raises:
            UnsupportedModelError: the format cannot hold the shape.
        """
        self.check(name, rows, cols)
        return {
            name + plane: (dtype, (rows // TILE_ROWS, n, TILE_ROWS) if tiled else (rows, n))
            for plane, (dtype, n) in self.planes(cols).items()
        }

    def planes(self, cols: int) -> dict[str, tuple[torch.dtype, int]]:
        """Per plane, its dtype and its entries per row. cols: inputs of the weight."""
        groups = self.groups(cols)
        out = {"": (torch.int32, cols // self.word_values), SCALES: (self.scale_dtype, groups)}
        if self.zero_points:
            out[ZEROS] = (torch.uint8, groups)
        if self.minima and self.bits != 2:
            out[MINIMA] = (self.scale_dtype, groups)
        if above := self.bits - 32 // self.word_values:  # bits of a code that its word does not hold
            out[HIGH] = (torch.int32, cols * above // 32)
        if self.two_levels:  # of scales and, behind each, of minima
            out[SUPERS] = (torch.float16, cols // SUPER_VALUES * (2 if self.minima else 1))
        return out

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
        minima: in the scale dtype; None if the format has none.
        high: int32: the bits of codes above their nibbles or pairs; None if there are none. A word holds one group, of
            int3 two: byte b has, from its lowest bits on, those of inputs 2b, 2b + 1, 8 + 2b, 8 + 2b + 1, and so on.
            Words of pairs have that order too.
        supers: float16; None if scales have one level.
    """

    format: WeightFormat
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    minima: torch.Tensor | None = None
    high: torch.Tensor | None = None
    supers: torch.Tensor | None = None

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
        return cls(how, *(params.get(name + plane) for plane in ("", *PLANES)))  # type: ignore[arg-type]

    def params(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors by their names in a slot, as in `WeightFormat.params`."""
        planes = (self.words, self.scales, self.zeros, self.minima, self.high, self.supers)
        return {name + plane: part for plane, part in zip(("", *PLANES), planes, strict=True) if part is not None}

    def tiled(self) -> PackedWeight:
        """The same weight in tiles, as kernels read it."""
        if self.is_tiled:
            return self
        return PackedWeight.of(self.format, "", {plane: to_tiles(part) for plane, part in self.params("").items()})

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales and zero points."""
        return sum(part.nbytes for part in self.params("").values())


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


def to_rows(tiles: torch.Tensor) -> torch.Tensor:
    """Tiles to rows: [N / 16, C, 16] -> [N, C]."""
    count, n, _ = tiles.shape
    return tiles.transpose(1, 2).reshape(count * TILE_ROWS, n)
