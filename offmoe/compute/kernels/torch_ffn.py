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

from offmoe.compute.kernels.autocast import autocast_enabled, without_autocast

ExpertMath = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]
"""math(weights of one expert by name, x [n, H]) -> [n, H]: what an architecture's experts compute.

All of one dtype, unless torch.autocast is enabled: then x may have another dtype than the weights, and so may the rows.
"""


WaitFor = Callable[[str, int, int], object]
"""wait(name, start, end): until bytes [start, end) of a parameter are in the slot."""
BLOCK_BYTES = 4 << 20
"""Of the weights that are computed with at once while an expert arrives: some 0.5 ms of computing."""
BLOCK_ROWS = 64
"""Blocks are of so many rows, or of a multiple: in fp32, four rows more or less do change the bits."""


@dataclass(frozen=True)
class GatedFFN:
    """The math of transformers' registry, as its implementations read it off an experts module.

    up, down: names of the weights. activate: [n, 2I] (gated, as its module splits it) or [n, I] -> [n, I]. transposed:
    weights are [in, out]. autocasts: its products follow torch.autocast, as F.linear and torch.mm do; those of the
    registry do not, since grouped_mm casts its input to the dtype of the weights instead.
    """

    up: str
    activate: Callable[[torch.Tensor], torch.Tensor]
    biased: bool = False
    transposed: bool = False
    normalize: Callable[[torch.Tensor], torch.Tensor] | None = None
    down: str = "down_proj"
    autocasts: bool = False

    def __call__(self, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        def product(name: str, x: torch.Tensor) -> torch.Tensor:
            return torch.mm(x, weights[name]) if self.transposed else F.linear(x, weights[name])

        def uncast(name: str, x: torch.Tensor) -> torch.Tensor:
            with without_autocast(x):
                return product(name, x.to(weights[name].dtype))

        autocast = autocast_enabled(x) and not self.autocasts
        return self._through(uncast if autocast else product, weights, x)

    def as_it_arrives(self, weights: Mapping[str, torch.Tensor], x: torch.Tensor, wait: WaitFor) -> torch.Tensor:
        """The same of one token, x [1, H], every block of rows as soon as it is there; weights must not be transposed.

        With torch 2.13 on a CPU, one row by some rows of a matrix has the bits that it has by all of them (bf16, fp16,
        fp32, seven shapes, one and two threads). That is torch's doing: whoever relies on it checks it.
        """
        assert not self.transposed
        assert len(x) == 1

        def product(name: str, x: torch.Tensor) -> torch.Tensor:
            weight = weights[name]  # [out, in]
            row_bytes = weight.nbytes // len(weight)
            rows = max(1, BLOCK_BYTES // (BLOCK_ROWS * row_bytes)) * BLOCK_ROWS
            done = []
            for start in range(0, len(weight), rows):
                block = weight[start : start + rows]
                wait(name, start * row_bytes, start * row_bytes + block.nbytes)
                done.append(F.linear(x, block))
            if self.biased:
                wait(name + "_bias", 0, weights[name + "_bias"].nbytes)
            return torch.cat(done, dim=1)

        return self._through(product, weights, x)

    def _through(
        self,
        product: Callable[[str, torch.Tensor], torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        x: torch.Tensor,
    ) -> torch.Tensor:
        h = product(self.up, x)
        if self.biased:
            h = h + weights[self.up + "_bias"]
        h = product(self.down, self.activate(h))  # of [n, I]
        if self.biased:
            h = h + weights[self.down + "_bias"]
        return h if self.normalize is None else self.normalize(h)


def expert_ffn(
    math: ExpertMath, weights: Mapping[str, torch.Tensor], x: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """One expert on its tokens: x [n, H] -> [n, H]. Weights are cast to `dtype`, as loading would have done."""
    if any(w.dtype != dtype for w in weights.values()):
        weights = {name: w.to(dtype) for name, w in weights.items()}
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
