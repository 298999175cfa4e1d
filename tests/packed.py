"""What a packed weight means: the definition that kernels and the quantizer are tested against."""

from __future__ import annotations

import torch

from offmoe.quant.codec import codes_of_words
from offmoe.quant.packed_weight import SYMMETRIC_ZERO, TILE_ROWS, PackedWeight, WeightFormat

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of mxfp4's nibbles 0 to 7; nibbles 8 to 15 are their negatives (OCP Microscaling Formats 1.0, 5.3.3)."""


def values(weight: PackedWeight) -> torch.Tensor:
    """The weights themselves, float32 [rows, cols]."""
    weight = by_row(weight)
    how, rows, cols = weight.format, weight.rows, weight.cols
    grouped = unpack_words(weight.words, how).view(rows, how.groups(cols), -1)  # [N, K / G, G]
    if how.kind == "mxfp4":
        codes = torch.tensor(E2M1, dtype=torch.float32)
        codes = torch.cat([codes, -codes])
        powers = torch.ldexp(torch.ones(weight.scales.shape), weight.scales.int() - 127)  # [N, K / G]
        return (codes[grouped.long()] * powers[..., None]).view(rows, cols)
    levels = grouped.float()
    if how.kind == "int4":
        levels -= SYMMETRIC_ZERO if weight.zeros is None else weight.zeros.float()[..., None]
    return (levels * weight.scales.float()[..., None]).view(rows, cols)


def by_row(weight: PackedWeight) -> PackedWeight:
    """The same weight row by row, as it is on the disk."""
    if not weight.is_tiled:
        return weight
    zeros = None if weight.zeros is None else to_rows(weight.zeros)
    return PackedWeight(weight.format, to_rows(weight.words), to_rows(weight.scales), zeros)


def unpack_words(words: torch.Tensor, how: WeightFormat) -> torch.Tensor:
    """Unpack words int32 [N, C] into uint8 nibbles, int8 or float8_e4m3fn [N, C * word_values]."""
    codes = codes_of_words(words, how.bits)
    if how.kind == "fp8":
        return codes.view(torch.float8_e4m3fn)
    return codes.view(torch.int8) if how.bits == 8 else codes


def to_rows(tiled: torch.Tensor) -> torch.Tensor:
    """Tiles to rows: [N / 16, C, 16] -> [N, C]."""
    tiles, n, _ = tiled.shape
    return tiled.transpose(1, 2).contiguous().view(tiles * TILE_ROWS, n)
