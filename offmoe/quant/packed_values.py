"""The values of packed weights, in torch: what kernels multiply with, for whatever kernels do not take.

A value is (code - zero) * scale - minimum, formed in float32 in the order of the formats' codecs, so that it has their
bits.
"""

from __future__ import annotations

import torch

from offmoe.quant.codec import codes_of_words
from offmoe.quant.gguf_formats import E2M1, LEVELS
from offmoe.quant.packed_weight import CENTER, HIGH, MINIMA, SCALES, SUPERS, ZEROS, PackedWeight, WeightFormat, to_rows

SCALE_BITS = 4
"""A byte of int2's scales holds the scale in so many lower bits, and the minimum above them."""


def values(weight: PackedWeight) -> torch.Tensor:
    """The values of a weight.

    Args:
        weight: row by row or in tiles.

    Returns:
        float32 [rows, cols].
    """
    how = weight.format
    planes = {plane: to_rows(part) if weight.is_tiled else part for plane, part in weight.params("").items()}
    scales, minima = _scales_and_minima(how, planes)  # [rows, groups]
    q = _codes(how, planes).view(weight.rows, scales.shape[1], -1)  # [rows, groups, columns of a group]
    if ZEROS in planes:
        q -= planes[ZEROS].float().unsqueeze(-1)
    elif minima is None:
        q -= CENTER.get(how.kind, 0)
    q *= scales.unsqueeze(-1)
    if minima is not None:
        q -= minima.unsqueeze(-1)
    return q.view(weight.rows, weight.cols)


def _codes(how: WeightFormat, planes: dict[str, torch.Tensor]) -> torch.Tensor:
    """The codes, or the levels that they look up, float32 [rows, cols]."""
    words = planes[""]
    if how.kind == "fp8":
        return words.view(torch.float8_e4m3fn).float()
    if how.kind == "int8":
        return words.view(torch.int8).float()
    held = 32 // how.word_values
    codes = codes_of_words(words, 4) if held == 4 else _fields(words, held)
    if HIGH in planes:
        codes = codes | _fields(planes[HIGH], how.bits - held) << held
    if how.kind in ("mxfp4", "iq4"):
        levels = torch.tensor(LEVELS if how.kind == "iq4" else E2M1, dtype=torch.float32)
        return levels[codes.int()].view_as(codes)
    return codes.float()


def _fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack fields of 1 or 2 bits: words int32 [rows, n] -> uint8 [rows, n * 32 / bits].

    Byte b of a word has, from its lowest bits on, those of inputs 2b, 2b + 1, 8 + 2b, 8 + 2b + 1, and so on.
    """
    octets = words.contiguous().view(torch.uint8).unflatten(1, (-1, 4))  # [rows, n, 4]
    fields = torch.stack([octets >> at & (1 << bits) - 1 for at in range(0, 8, bits)], -1)  # [rows, n, 4, 8 / bits]
    pairs: torch.Tensor = fields.unflatten(-1, (-1, 2))  # [rows, n, 4, 4 / bits, 2]
    return pairs.transpose(2, 3).flatten(1)


def _scales_and_minima(how: WeightFormat, planes: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Float32 [rows, groups]; None: the format has no minima."""
    scales, minima = planes[SCALES], planes.get(MINIMA)
    if how.kind == "mxfp4":  # E2M1 holds twice the values
        return torch.ldexp(torch.full(scales.shape, 0.5), scales.int() - 127), None
    if how.kind == "int2":
        octets = scales.view(torch.uint8)
        scales, minima = octets & (1 << SCALE_BITS) - 1, octets >> SCALE_BITS
    scales, minima = scales.float(), None if minima is None else minima.float()
    if SUPERS in planes:
        supers = planes[SUPERS].float().unflatten(1, (-1, 2 if how.minima else 1))  # [rows, cols / 256, 1 or 2]
        supers = supers.repeat_interleave(scales.shape[1] // supers.shape[1], dim=1)  # [rows, groups, 1 or 2]
        scales = supers[..., 0] * scales
        minima = None if minima is None else supers[..., 1] * minima
    return scales, minima
