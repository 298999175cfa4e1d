"""What quantizing changed: a matrix as it will be decoded from its file, compared with the original.

What moves: both once through the caches, a block of rows at a time; the C library does it where it was built (a tenth
of the quantizer's time), torch's operators elsewhere. Must never look at anything but the tensors that are written: a
mistake on the way to them is a loss, too, and shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offmoe.quant.int_formats import PackedInt
from offmoe.quant.packed_weight import TILE_ROWS, WeightFormat

BLOCK_VALUES = 1 << 18
"""Values that torch decodes and compares at once: they stay in a core's cache."""


@dataclass(frozen=True)
class Loss:
    """What quantizing changed, over `values` values: the largest |error|, sums of |error|, error^2 and value^2."""

    max_error: float = 0.0
    total_error: float = 0.0
    total_squared: float = 0.0
    total_square: float = 0.0
    values: int = 0

    def __add__(self, other: Loss) -> Loss:
        return Loss(
            max(self.max_error, other.max_error),
            self.total_error + other.total_error,
            self.total_squared + other.total_squared,
            self.total_square + other.total_square,
            self.values + other.values,
        )

    @property
    def mean_error(self) -> float:
        """Mean |error|."""
        return self.total_error / max(1, self.values)

    @property
    def relative_error(self) -> float:
        """Norm of the error over the norm of the weights."""
        return math.sqrt(self.total_squared / self.total_square) if self.total_square else 0.0


def codec(how: WeightFormat) -> PackedInt:
    """What will read a weight of this format."""
    return PackedInt(how.bits, how.group, symmetric=not how.zero_points)


def loss_of(weight: torch.Tensor, how: WeightFormat, raw: Mapping[str, torch.Tensor]) -> Loss:
    """Of weight [N, K] once it is decoded from `raw`: packed, scale and zero as `PackedInt` takes them."""
    total, (count, cols) = Loss(), weight.shape
    rows = max(TILE_ROWS, BLOCK_VALUES // cols // TILE_ROWS * TILE_ROWS)
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        part = {"packed": raw["packed"][start:stop], "scale": raw["scale"][start:stop]}
        if "zero" in raw:
            part["zero"] = raw["zero"][start // how.word_values : stop // how.word_values]
        block = weight[start:stop].float().reshape(-1)
        error = codec(how).decode(part, torch.float32).view(-1).sub_(block).abs_()
        largest, summed = float(error.max()), float(error.sum())
        total += Loss(largest, summed, float(error.dot(error)), float(block.dot(block)), block.numel())
    return total
