"""The router of one layer for one new token by one call of the C kernels: logits, chosen experts and their weights.

torch takes 30 to 80 us for the choice, besides a product that took 190 us on a Zen 4 for 128 experts of 2,048 inputs.

Moves: the router's weight, once.
Bound: memory bandwidth; small weights are read by the calling thread.
Must never: read a weight that changed since it was prepared, or be called after the kernels were closed.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F

from offmoe.compute.kernels.cpu import BF16_GROUP, CpuKernels, PreparedWeight
from offmoe.compute.kernels.library import RouterStruct
from offmoe.errors import CapacityError
from offmoe.quant.packed_weight import TILE_ROWS

MAX_GROUPS = 64
"""Most groups of experts (offmoe.h)."""


class Selection(NamedTuple):
    """How logits choose experts.

    top_k: experts of a token.
    sigmoid: whether an expert's weight is sigmoid(logit), and not exp(logit) over the sum.
    normalize: whether weights are divided by the sum over the chosen experts.
    rounds: whether logits are rounded to bf16.
    logits, scores: dtypes of the results: bf16 or float32.
    groups, kept_groups: experts are chosen from the best groups alone, by the sum of each group's two best.
    scale: weights are multiplied by it at the end.
    """

    top_k: int
    sigmoid: bool = False
    normalize: bool = True
    rounds: bool = True
    logits: torch.dtype = torch.bfloat16
    scores: torch.dtype = torch.bfloat16
    groups: int = 1
    kept_groups: int = 1
    scale: float = 1.0

    def fits(self, experts: int) -> bool:
        """Whether it can be asked of so many experts."""
        groups = 1 <= self.kept_groups <= self.groups <= MAX_GROUPS and experts % self.groups == 0
        return groups and 1 <= self.top_k <= self.kept_groups * (experts // self.groups)


class Routed(NamedTuple):
    """A token's logits [1, experts], weights [1, top_k] and ids int64 [1, top_k] of its experts, the best first."""

    logits: torch.Tensor
    scores: torch.Tensor
    ids: torch.Tensor


class TokenRouter:
    """One router, prepared."""

    def __init__(
        self,
        kernels: CpuKernels,
        weight: torch.Tensor,
        selection: Selection,
        *,
        bias: torch.Tensor | None = None,
        correction: torch.Tensor | None = None,
    ) -> None:
        """Prepare the call.

        Args:
            kernels: whose threads compute.
            weight: bf16 [experts, cols], cols a multiple of BF16_GROUP.
            selection: it `fits`.
            bias: [experts] or None.
            correction: float32 [experts], added to weights when experts are chosen, or None.
        """
        experts, self.cols = weight.shape
        assert selection.fits(experts), selection
        assert self.cols % BF16_GROUP == 0
        assert correction is None or (correction.dtype == torch.float32 and correction.shape == (experts,))
        missing = -experts % TILE_ROWS  # kernels read whole tiles
        if missing:
            weight = F.pad(weight, (0, 0, 0, missing))
        if bias is not None:
            bias = F.pad(bias.float(), (0, missing))
        prepared = PreparedWeight(weight, bias)
        correction = None if correction is None else correction.contiguous()
        self._struct = RouterStruct(
            ctypes.pointer(prepared.struct),
            correction=None if correction is None else correction.data_ptr(),
            experts=experts,
            top_k=selection.top_k,
            sigmoid=selection.sigmoid,
            rounds=selection.rounds,
            normalize=selection.normalize,
            groups=selection.groups,
            kept_groups=selection.kept_groups,
            logits_float=selection.logits == torch.float32,
            scores_float=selection.scores == torch.float32,
            scale=selection.scale,
        )
        self._alive = prepared, correction
        self._route, self._reference = kernels.function("offmoe_route"), ctypes.byref(self._struct)
        self._precision, self._experts, self.selection = kernels.precision, experts, selection
        self.address = ctypes.addressof(self._struct)
        self._work = torch.empty(self.cols + 3 * len(weight)), torch.empty(experts, dtype=torch.int64)

    def __call__(self, x: torch.Tensor) -> Routed:
        """Route one token; one thread at a time.

        Args:
            x: bf16 [..., cols] of one row, contiguous.

        Raises:
            CapacityError: there is no memory.
        """
        how, (work, all_ids) = self.selection, self._work
        logits = torch.empty((1, self._experts), dtype=how.logits)
        scores = torch.empty((1, how.top_k), dtype=how.scores)
        ids = torch.empty((1, how.top_k), dtype=torch.int64)
        code = self._route(
            self._reference,
            self._precision,
            x.data_ptr(),
            work.data_ptr(),
            all_ids.data_ptr(),
            logits.data_ptr(),
            scores.data_ptr(),
            ids.data_ptr(),
        )
        if code:
            raise CapacityError("no memory for the router of one token; free some")
        return Routed(logits, scores, ids)
