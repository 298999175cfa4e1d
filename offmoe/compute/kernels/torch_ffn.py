"""The bitwise kernel: one expert on its tokens, by the operators of stock transformers and in their order.

It computes what transformers' `eager` and `grouped_mm` implementations compute (integrations/moe.py, 5.23): linear,
gate, linear; then the rows are weighted, and summed once per token in router order.

Moves: the weights of one expert, once per call, through the device's memory.
Bound: that memory's bandwidth, in decoding.
Must never: depend on what was cached, or on the waves. Partial sums per wave are not bit-equal in bf16: measured, they
differ by 6e-2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ExpertMath = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]
"""math(weights of one expert by name, x [n, H]) -> rows [n, H]: the function that an architecture's experts compute.

Weights, x and rows have one dtype. Under torch.autocast, x and the rows may have another one than the weights.
"""

WaitFor = Callable[[str, int, int], object]
"""wait(name, start, end): return once bytes [start, end) of a parameter are in the slot."""
BLOCK_BYTES = 4 << 20
"""Bytes of weights that are computed with at once while an expert arrives: about 0.5 ms of computing."""
BLOCK_ROWS = 64
"""Rows of a block, or a divisor of them. In fp32, blocks that differ by four rows differ in their bits."""


def autocast_enabled(x: torch.Tensor) -> bool:
    """Whether torch.autocast is enabled for the kind of device that holds `x`."""
    return torch.is_autocast_enabled(x.device.type)


def without_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """A context in which torch.autocast is disabled for the kind of device that holds `x`."""
    return torch.autocast(x.device.type, enabled=False)


def concatenate(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows [n, H] of all parts, in their order.

    torch.autocast is disabled for it: under autocast, torch.cat refuses every half precision but autocast's own.
    """
    with without_autocast(parts[0]):
        return torch.cat(list(parts))


@dataclass(frozen=True)
class GatedFFN:
    """The math of the experts in transformers' registry."""

    up: str
    """Name of the first weight, [I, H], or [2I, H] for gate and up in one."""
    activate: Callable[[torch.Tensor], torch.Tensor]
    """The module's own function between the products: [n, 2I] or [n, I] -> [n, I]."""
    biased: bool = False
    """Each weight has a bias, called as the weight with "_bias" behind it."""
    transposed: bool = False
    """Weights are [in, out]."""
    normalize: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Applied to the rows at the end."""
    down: str = "down_proj"
    """Name of the second weight, [H, I]."""
    autocasts: bool = False
    """Products follow torch.autocast, as F.linear and torch.mm do. Those of the registry do not: grouped_mm casts its
    input to the dtype of the weights instead."""

    def __call__(self, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        def product(name: str, x: torch.Tensor) -> torch.Tensor:
            return torch.mm(x, weights[name]) if self.transposed else F.linear(x, weights[name])

        def uncast(name: str, x: torch.Tensor) -> torch.Tensor:
            with without_autocast(x):
                return product(name, x.to(weights[name].dtype))

        autocast = autocast_enabled(x) and not self.autocasts
        return self._through(uncast if autocast else product, weights, x)

    def as_it_arrives(self, weights: Mapping[str, torch.Tensor], x: torch.Tensor, wait: WaitFor) -> torch.Tensor:
        """The same for one token, x [1, H], each block of a weight's rows as soon as it has arrived.

        With torch 2.13 on a CPU, the product with some rows of a matrix has the bits of the product with all of them
        (bf16, fp16, fp32; seven shapes; one and two threads). torch does not promise that, so the caller compares.
        Weights must not be transposed.
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
        h = product(self.down, self.activate(h))  # [n, I] -> [n, H]
        if self.biased:
            h = h + weights[self.down + "_bias"]
        return h if self.normalize is None else self.normalize(h)


def expert_ffn(
    math: ExpertMath, weights: Mapping[str, torch.Tensor], x: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """One expert on its tokens: x [n, H] -> [n, H]. Weights are cast to `dtype`, as loading them would have done."""
    if any(w.dtype != dtype for w in weights.values()):
        weights = {name: w.to(dtype) for name, w in weights.items()}
    return math(weights, x)


def combine(rows: torch.Tensor, top_k_weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weight the rows and sum them once per token: rows [T * k, H] in router order, top_k_weights [T, k] -> [T, H]."""
    tokens, k = top_k_weights.shape
    weighted = rows * top_k_weights.reshape(-1, 1)  # [T * k, H]
    return weighted.view(tokens, k, -1).sum(dim=1).to(dtype)


def accumulate(weighted: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum weighted rows as a loop over experts with `index_add_` does: [T * k, H], ids [T, k] -> [T, H] in `dtype`.

    Per token, the rows are added one by one in ascending order of ids, and each sum is rounded to `dtype`; `combine`
    rounds once. A row with a negative id adds nothing, whatever it holds.
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
