"""How an experts module makes one of gate and up, told by trying it: kernels have a few such functions built in.

Nothing moves. Names of activations say little: architectures clamp before or after them, interleave gate and up, or
add one. So the module's own function is given numbers that tell the candidates apart, and what comes out decides. Must
never take one function for another: what agrees with no candidate is left to the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from offmoe.compute.kernels.cpu import Glu

POINTS = 41
"""Odd, so that 0 is one of them."""
NEAR, FAR = 4.0, 60.0
"""Up to NEAR activations differ from each other; limits that are worth clamping to are below FAR."""
TOLERANCE = 1e-5
"""Of float32, relative to the largest product; gelu and its tanh form are 1e-3 apart."""


class Gating(NamedTuple):
    """interleaved: gate and up take turns along a row, gate first; otherwise gate is the first half."""

    glu: Glu
    interleaved: bool


def gating_of(activate: Callable[[torch.Tensor], torch.Tensor]) -> Gating | None:
    """What `activate`, [n, 2I] -> [n, I], computes; None if that is nothing that kernels have."""
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
                made = activate(both)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            NotImplementedError,
        ):  # on the meta device, or of another use
            return None
        if made.shape != gate.shape or made.dtype != gate.dtype or made.device != gate.device:
            return None
        for glu in glus:
            right = glu(gate, up)
            if (made - right).abs().max() <= TOLERANCE * right.abs().clamp(min=1).max() and torch.allclose(
                made, right, rtol=1e-4, atol=TOLERANCE
            ):
                return Gating(glu, interleaved)
    return None
