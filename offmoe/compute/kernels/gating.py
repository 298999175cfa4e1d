"""Which of the kernels' built-in functions an experts module combines gate and up with, found by trying it.

Names of activations say little: architectures clamp before or after them, interleave gate and up, or add one. So the
module's own function gets numbers for which the candidates differ, and its results decide.
Must never: take one function for another. A function that agrees with no candidate is none of the kernels'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from offmoe.compute.kernels.cpu import Glu

POINTS = 41
"""Values of gate and of up that are tried, per range. Odd, so that 0 is one of them."""
NEAR, FAR = 4.0, 60.0
"""Ranges of the tried values: activations differ up to NEAR; every limit that is worth clamping to is below FAR."""
TOLERANCE = 1e-5
"""Largest difference of equal functions in float32, relative to the largest product. gelu and its tanh form differ by
1e-3."""


class Gating(NamedTuple):
    """How gate and up stand in one row, and the function that combines them."""

    glu: Glu
    interleaved: bool
    """Gate and up take turns along a row, gate first; otherwise gate is the first half."""


def gating_of(activate: Callable[[torch.Tensor], torch.Tensor]) -> Gating | None:
    """The built-in function that equals `activate`, [n, 2I] -> [n, I]; None if there is none."""
    points = torch.cat([torch.linspace(-reach, reach, POINTS) for reach in (NEAR, FAR)])
    gate, up = torch.cartesian_prod(points, points).T.reshape(2, -1, 2)  # [n, 2] each
    owner = getattr(activate, "__self__", None)
    glus = [Glu("silu"), Glu("gelu_tanh")]
    limit, alpha = getattr(owner, "limit", None), getattr(owner, "alpha", None)
    if isinstance(limit, (int, float)) and isinstance(alpha, (int, float)):
        glus.append(Glu("clamped", float(limit), float(alpha)))
    for interleaved in (False, True):
        both = torch.stack([gate, up], dim=2 if interleaved else 1).reshape(-1, 4)  # [n, 2I]
        try:
            with torch.no_grad():
                result = activate(both)
        except (RuntimeError, TypeError, ValueError):  # a meta tensor, or another signature
            return None
        if result.shape != gate.shape or result.dtype != gate.dtype or result.device != gate.device:
            return None
        for glu in glus:
            if _agree(result, glu(gate, up)):
                return Gating(glu, interleaved)
    return None


def _agree(result: torch.Tensor, expected: torch.Tensor) -> bool:
    is_near = (result - expected).abs().max() <= TOLERANCE * expected.abs().clamp(min=1).max()
    return bool(is_near) and torch.allclose(result, expected, rtol=1e-4, atol=TOLERANCE)
