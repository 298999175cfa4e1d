"""What a packed weight means: the definition that kernels and the quantizer are tested against."""

from __future__ import annotations

from dataclasses import replace

import torch

from offmoe.quant.codec import codes_of_words
from offmoe.quant.packed_weight import CENTER, SUPER_VALUES, TILE_ROWS, PackedWeight, WeightFormat

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of mxfp4's nibbles 0 to 7; nibbles 8 to 15 are their negatives (OCP Microscaling Formats 1.0, 5.3.3)."""


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The levels of iq4's nibbles (kvalues_iq4nl of ggml-common.h)."""


def values(weight: PackedWeight) -> torch.Tensor:
    """The weights themselves, float32 [rows, cols]."""
    weight = by_row(weight)
    how, rows, cols = weight.format, weight.rows, weight.cols
    grouped = codes(weight).view(rows, how.groups(cols), -1)  # [N, K / G, G]
    if how.kind == "mxfp4":
        levels = torch.tensor([*E2M1, *(-x for x in E2M1)])
        powers = torch.ldexp(torch.ones(weight.scales.shape), weight.scales.int() - 127)  # [N, K / G]
        return (levels[grouped.long()] * powers[..., None]).view(rows, cols)
    q = torch.tensor(IQ4)[grouped.long()].float() if how.kind == "iq4" else grouped.float()
    if how.kind == "int2":
        weight = replace(weight, scales=weight.scales & 15, minima=weight.scales.view(torch.uint8) >> 4)
    if weight.zeros is not None:
        q -= weight.zeros.float()[..., None]
    elif weight.minima is None:
        q -= CENTER.get(how.kind, 0)
    scales, minima = (None if part is None else part.float() for part in (weight.scales, weight.minima))
    assert scales is not None
    if weight.supers is not None:
        supers = weight.supers.float().view(rows, cols // SUPER_VALUES, -1)  # [N, K / 256, 1 or 2]
        each = supers.repeat_interleave(scales.shape[1] // supers.shape[1], dim=1)  # [N, K / G, 1 or 2]
        scales = scales * each[..., 0]
        minima = None if minima is None else minima * each[..., 1]
    out = q * scales[..., None]
    return (out if minima is None else out - minima[..., None]).view(rows, cols)


def empty_tiles(how: WeightFormat, rows: int, cols: int) -> PackedWeight:
    """Memory for a weight in tiles."""
    params = how.params("", rows, cols, tiled=True)
    return PackedWeight.of(
        how, "", {plane: torch.empty(shape, dtype=dtype) for plane, (dtype, shape) in params.items()}
    )


def by_row(weight: PackedWeight) -> PackedWeight:
    """The same weight row by row, as it is on the disk."""
    if not weight.is_tiled:
        return weight
    return PackedWeight.of(weight.format, "", {plane: to_rows(part) for plane, part in weight.params("").items()})


def codes(weight: PackedWeight) -> torch.Tensor:
    """The codes of a weight that stands row by row: uint8, int8 or float8_e4m3fn [N, K]."""
    bits = weight.format.bits
    low = by_pairs(weight.words, 2) if bits in (2, 3) else unpack_words(weight.words, weight.format)
    if weight.high is None:
        return low
    held = 2 if bits == 3 else 4
    return low | by_pairs(weight.high, bits - held) << held


def by_pairs(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Words int32 [N, n] with fields of so many bits into uint8 [N, n * 32 / bits].

    Byte b of a word has, from its lowest bits on, inputs 2b, 2b + 1, 8 + 2b, 8 + 2b + 1, and so on.
    """
    octets = torch.stack([words >> at & 255 for at in (0, 8, 16, 24)], dim=2)  # [N, n, 4]
    fields = torch.stack([octets >> at & (1 << bits) - 1 for at in range(0, 8, bits)], dim=2)  # [N, n, 8 / bits, 4]
    pairs = fields.view(len(words), -1, 2, 4).transpose(2, 3)  # [N, n * 4 / bits, 4, 2]: of inputs 2b and 2b + 1
    return pairs.reshape(len(words), -1).to(torch.uint8)


def unpack_words(words: torch.Tensor, how: WeightFormat) -> torch.Tensor:
    """Unpack words int32 [N, C] into uint8 nibbles, int8 or float8_e4m3fn [N, C * word_values]."""
    codes = codes_of_words(words, 8 if how.word_values == 4 else 4)
    if how.kind == "fp8":
        return codes.view(torch.float8_e4m3fn)
    return codes.view(torch.int8) if how.bits == 8 else codes


def to_rows(tiled: torch.Tensor) -> torch.Tensor:
    """Tiles to rows: [N / 16, C, 16] -> [N, C]."""
    tiles, n, _ = tiled.shape
    return tiled.transpose(1, 2).contiguous().view(tiles * TILE_ROWS, n)
