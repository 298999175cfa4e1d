"""The bitwise kernel: one expert on its tokens with the operators, and in the order, that stock transformers uses.

What moves: the weights of one expert, once per call, through the device's memory; that bounds decoding. It computes
what transformers' `eager` and `grouped_mm` implementations compute (integrations/moe.py, 5.23): linear, gate, linear,
then weight and one sum per token in router order. Must never depend on what was cached or on how experts were grouped
into waves: partial sums per wave are not bit-equal in bf16 (6e-2 apart, measured)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class ExpertMath:
    """What an architecture's experts compute, apart from the weights.

    activate: [n, 2I] (gated, as its module splits it) or [n, I] -> [n, I]. transposed: weights are [in, out].
    """

    up: str
    activate: Callable[[torch.Tensor], torch.Tensor]
    biased: bool = False
    transposed: bool = False
    normalize: Callable[[torch.Tensor], torch.Tensor] | None = None


def expert_ffn(math: ExpertMath, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One expert on its tokens: x [n, H] -> [n, H]. Weights of another dtype are cast to x's, as loading would have."""
    up, down = weights[math.up], weights["down_proj"]
    if up.dtype != x.dtype:
        weights = {name: w.to(x.dtype) for name, w in weights.items()}
        up, down = weights[math.up], weights["down_proj"]
    h = torch.mm(x, up) if math.transposed else F.linear(x, up)
    if math.biased:
        h = h + weights[math.up + "_bias"]
    h = math.activate(h)  # [n, I]
    h = torch.mm(h, down) if math.transposed else F.linear(h, down)
    if math.biased:
        h = h + weights["down_proj_bias"]
    if math.normalize is not None:
        h = math.normalize(h)
    return h


def combine(rows: torch.Tensor, top_k_weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weight and reduce once: rows [T * k, H] in router order, top_k_weights [T, k] -> [T, H]."""
    tokens, k = top_k_weights.shape
    weighted = rows * top_k_weights.reshape(-1, 1)  # [T * k, H]
    return weighted.view(tokens, k, -1).sum(dim=1).to(dtype)
