"""Scales and zero points that minimize the squared error of each group: the definition of offmoe's quantization.

Rounding to nearest with a scale of max|w| / 7 never uses the sixteenth level, and lets one outlier stretch all steps.
Here the scale is signed, so that the largest value, whatever its sign, lies on level -8. A few narrower and wider
scales are tried too; the best is then fitted to the chosen levels by least squares, twice. On Gaussian weights in
groups of 64 the squared error falls to 0.70 of that of rounding to nearest, and to 0.66 with zero points. Forty
candidates instead of six gain 0.005 more.

The C encoder (compute/kernels/native/encode.h) gives the same bits. Both add sums in one order, so the result depends
neither on the compiler nor on the instruction set or the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch

from offmoe.quant.packed_weight import TILE_ROWS, WeightFormat

FACTORS = (1.0, 8 / 7, 0.94, 0.88, 0.82, 0.76)
"""The scales tried for 4 bits, relative to the one that maps the largest value to the last level. The first two leave
weights unchanged that lie on sixteen or on fifteen levels already.
"""

INT8_FACTORS = (1.0, 0.96)
"""The scales tried for 8 bits. A step of int8 is small compared with the largest value, so clipping gains little."""

REFITS = 2
"""Rounds of fitting the scale to the levels by least squares and rounding again."""

SPAN = 128
"""Values whose sixteen partial sums are added before the next ones begin, as in encode.h."""


class Fit(NamedTuple):
    """How groups are quantized: scale, zero point and squared error [B, 1], level [B, G]; all float32."""

    scale: torch.Tensor
    zero: torch.Tensor
    level: torch.Tensor
    error: torch.Tensor


Fitting = Callable[[torch.Tensor, WeightFormat], Fit]
"""(groups float32 [B, G], format) -> how they are quantized."""


def round_to_nearest(w: torch.Tensor, how: WeightFormat) -> Fit:
    """Symmetric levels with the scale max|w| / 7 (4 bits) or / 127: the baseline. w: float32 [B, G]."""
    assert not how.zero_points
    top = 2 ** (how.bits - 1)
    return _evaluate(w, w.abs().amax(-1, keepdim=True) / (top - 1), w.new_zeros(()), -top, top - 1, how)


def fit_symmetric(w: torch.Tensor, how: WeightFormat) -> Fit:
    """Levels around zero with a signed scale. w: float32 [B, G]."""
    top = 2 ** (how.bits - 1)  # levels -top .. top - 1
    high, low = w.amax(-1, keepdim=True), w.amin(-1, keepdim=True)
    step = torch.where(high >= -low, high, low) / -top
    zero = w.new_zeros(())

    def at(scale: torch.Tensor) -> Fit:
        return _evaluate(w, scale, zero, -top, top - 1, how)

    best = reduce(_better, (at(step * factor) for factor in (FACTORS if how.bits == 4 else INT8_FACTORS)))
    for _ in range(REFITS):
        best = _better(best, at(_slope(best.level, w)))
    return best


def fit_asymmetric(w: torch.Tensor, how: WeightFormat) -> Fit:
    """Levels 0 .. 15 around an integer zero point. w: float32 [B, G]."""
    high, low = w.amax(-1, keepdim=True).clamp_min(0), w.amin(-1, keepdim=True).clamp_max(0)
    middle, mean, count = (high + low) / 2, _total(w) / w.shape[-1], w.shape[-1]

    def at(scale: torch.Tensor, zero: torch.Tensor) -> Fit:
        return _evaluate(w, scale, zero.round().clamp(0, 15), 0, 15, how)

    tried = ((high - low) / 15 * factor for factor in FACTORS)
    best = reduce(_better, (at(scale, 7.5 - middle / _usable(scale)) for scale in tried))
    for _ in range(REFITS):
        # Fits scale and zero point together, then the scale alone to the zero point once it is rounded.
        levels = _total(best.level) / count
        scale = _slope(best.level - levels, w - mean)
        best = _better(best, at(scale, levels - mean / _usable(scale)))
        best = _better(best, at(_slope(best.level - best.zero, w), best.zero))
    return best


def _evaluate(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, low: int, high: int, how: WeightFormat) -> Fit:
    """Round w / scale + zero to levels low .. high."""
    scale = _usable(scale.to(how.scale_dtype).float())  # as decoding will read it
    level = (w * (1 / scale)).add_(zero).clamp_(low, high).round_()
    error = _total((level - zero).mul_(scale).sub_(w).square_())
    return Fit(scale, zero, level, error)


def _better(a: Fit, b: Fit) -> Fit:
    """Group by group, the fit with the smaller error; a where they are equal, or b's is not a number."""
    return Fit(*(torch.where(b.error < a.error, y, x) for x, y in zip(a, b, strict=True)))


def _slope(level: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The scale that fits the levels to w best, by least squares: [B, G] each -> [B, 1]."""
    return _total(level * w) / _total(level.square()).clamp_min(1.0)


def _total(x: torch.Tensor) -> torch.Tensor:
    """Sum over groups, [B, G] -> [B, 1]: sixteen partial sums per span, their halves added, then span by span.

    torch's own sum adds in another order on every instruction set.
    """
    groups, count = x.shape
    span = next(n for n in (SPAN, 64, 32, TILE_ROWS) if count % n == 0)
    lanes = x.view(groups, count // span, -1, TILE_ROWS)  # [B, spans, chunks, 16]
    sums = lanes[:, :, 0]
    for chunk in range(1, span // TILE_ROWS):
        sums = sums + lanes[:, :, chunk]
    while (half := sums.shape[-1] // 2) > 0:
        sums = sums[..., :half] + sums[..., half:]
    total = sums[:, 0]  # [B, 1]
    for i in range(1, count // span):
        total = total + sums[:, i]
    return total


def _usable(scale: torch.Tensor) -> torch.Tensor:
    """Replace scales that have no inverse by 1: groups of zeros, or of values too small for a scale, become zeros."""
    return torch.where(scale.abs() < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
