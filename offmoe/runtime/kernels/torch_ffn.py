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

ExpertMath = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]
"""math(weights of one expert by name, x [n, H]) -> [n, H], all of one dtype: what an architecture's experts compute."""


@dataclass(frozen=True)
class GatedFFN:
    """The math of transformers' registry, as its implementations read it off an experts module.

    up, down: names of the weights. activate: [n, 2I] (gated, as its module splits it) or [n, I] -> [n, I]. transposed:
    weights are [in, out].
    """

    up: str
    activate: Callable[[torch.Tensor], torch.Tensor]
    biased: bool = False
    transposed: bool = False
    normalize: Callable[[torch.Tensor], torch.Tensor] | None = None
    down: str = "down_proj"

    def __call__(self, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        up, down = weights[self.up], weights[self.down]
        h = torch.mm(x, up) if self.transposed else F.linear(x, up)
        if self.biased:
            h = h + weights[self.up + "_bias"]
        h = self.activate(h)  # [n, I]
        h = torch.mm(h, down) if self.transposed else F.linear(h, down)
        if self.biased:
            h = h + weights[self.down + "_bias"]
        return h if self.normalize is None else self.normalize(h)


def expert_ffn(math: ExpertMath, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One expert on its tokens: x [n, H] -> [n, H]. Weights of another dtype are cast to x's, as loading would have."""
    if any(w.dtype != x.dtype for w in weights.values()):
        weights = {name: w.to(x.dtype) for name, w in weights.items()}
    return math(weights, x)


def combine(rows: torch.Tensor, top_k_weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weight and reduce once: rows [T * k, H] in router order, top_k_weights [T, k] -> [T, H]."""
    tokens, k = top_k_weights.shape
    weighted = rows * top_k_weights.reshape(-1, 1)  # [T * k, H]
    return weighted.view(tokens, k, -1).sum(dim=1).to(dtype)


def accumulate(weighted: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Reduce as a loop over experts with `index_add_` does: weighted rows [T * k, H], ids [T, k] -> [T, H] in `dtype`.

    Per token, the rows are added one after the other in ascending order of ids, each sum rounded to `dtype`: not the
    one sum of `combine`. A row with a negative id is nobody's and adds nothing, whatever stands in it.
    """
    tokens, k = ids.shape
    order = ids.argsort(dim=1, stable=True)  # [T, k]
    rows = weighted.to(dtype).view(tokens, k, -1)
    rows = rows.masked_fill((ids < 0).unsqueeze(2), 0)  # [T, k, H]
    rows = rows.gather(1, order.unsqueeze(2).expand(rows.shape))
    out = rows[:, 0]  # [T, H]
    for i in range(1, k):
        out = out + rows[:, i]
    return out
