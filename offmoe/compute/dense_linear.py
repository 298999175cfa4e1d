"""Linear layers of the dense part on a CPU, by the C kernels, and by torch's operators where these are faster.

torch reads bf16 weights for one row at less than half of the memory's rate. Sums run in another order than torch's, so
this is for `exactness="numeric"` only.

Moves: the bytes of one weight through the cores' caches, once per call.
Bound: the host's memory bandwidth for one row, arithmetic for many.
Must never: call a kernel after its threads were ended, or with a weight that was replaced since it was prepared.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F

from offmoe.compute.kernels.cpu import BF16_GROUP, CpuKernels, PreparedWeight
from offmoe.compute.kernels.library import MAX_TOKENS
from offmoe.quant.packed_values import values
from offmoe.quant.packed_weight import TILE_ROWS, PackedWeight

FEW_ROWS = 4
"""Rows that the kernels compute faster than torch on every processor: one block, so that each weight is read once."""

Result = TypeVar("Result")


def max_rows() -> int | None:
    """Rows up to which the kernels are faster than torch; None: always.

    oneDNN multiplies bf16 matrices where the processor has AVX-512. With AVX2 alone, torch's product of bf16 takes 2.4
    to 4.2 times as long as the kernels for 4 rows or more.
    """
    return None if torch.backends.cpu.get_cpu_capability() == "AVX2" else FEW_ROWS


def fits_kernels(weight: torch.Tensor) -> bool:
    """Whether the C kernels read a weight [rows, cols] where it stands."""
    rows, cols = weight.shape
    fits = rows % TILE_ROWS == 0 and cols % BF16_GROUP == 0
    return fits and weight.dtype == torch.bfloat16 and not weight.is_meta and weight.is_contiguous()


class DenseKernels:
    """The C kernels for the dense part of one model, with a pool of threads."""

    def __init__(self, kernels: CpuKernels) -> None:
        """kernels: closed with this."""
        self._kernels = kernels
        self._calling = threading.Lock()
        self._is_closed = False
        self.max_rows = max_rows()
        """Rows up to which torch's product of bf16 is not asked; None: never."""
        self.attend = False
        """Whether they compute attention of single tokens in all layers of the model."""

    @property
    def kernels(self) -> CpuKernels:
        """The kernels, for others that compute in turn with these and share their threads."""
        return self._kernels

    def linear(self, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None) -> KernelLinear | PackedLinear:
        """A linear layer, prepared.

        Args:
            weight: [rows, cols], bf16 that `fits_kernels`, or packed in tiles.
            bias: [rows] or None.
        """
        prepared = PreparedWeight(weight, None if bias is None else bias.float())
        if isinstance(weight, PackedWeight):
            return PackedLinear(self, weight, prepared)
        return KernelLinear(self, weight, prepared)

    def max_inputs(self, cols: int) -> float:
        """Numbers of an input up to which the kernels compute a layer with `cols` inputs."""
        return math.inf if self.max_rows is None else self.max_rows * cols

    def run(self, call: Callable[..., Result], *arguments: object) -> Result | None:
        """call(*arguments); None if the threads were ended, which another thread may do at any time."""
        with self._calling:
            return None if self._is_closed else call(*arguments)

    def close(self) -> None:
        """End the threads; idempotent."""
        with self._calling:
            self._is_closed = True
            self._kernels.close()


class _Linear:
    """What linear layers of either form share: a prepared weight, and the calls that kernels do not take."""

    def __init__(self, owner: DenseKernels, prepared: PreparedWeight) -> None:
        self._owner, self._rows, self._cols = owner, owner.kernels.linear_of(prepared), prepared.struct.cols
        self.prepared = prepared

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Whether kernels can take the input: there is one, of the layer's width, and nobody differentiates."""
        return (
            x.shape[-1] == self._cols
            and x.numel() > 0
            and not (torch.is_grad_enabled() and x.requires_grad)
            and not torch.is_autocast_enabled("cpu")
        )


class KernelLinear(_Linear):
    """x w^T + bias for one bf16 weight. torch's operators compute whatever the kernels do not."""

    def __init__(self, owner: DenseKernels, weight: torch.Tensor, prepared: PreparedWeight) -> None:
        super().__init__(owner, prepared)
        self._product, self._many = owner.kernels.product_of(prepared), owner.kernels.many_rows or math.inf
        self._address = weight.data_ptr()

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's output.

        Args:
            x: [..., cols].
            weight: [rows, cols]. If it is not the prepared one any more, torch computes with it.
            bias: [rows] or None.
        Returns:
            [..., rows], of x's dtype.
        """
        if (
            x.dtype == torch.bfloat16
            and x.numel() <= self._owner.max_inputs(self._cols)
            and weight.data_ptr() == self._address
            and self._is_plain(x)
            and not (torch.is_grad_enabled() and weight.requires_grad)
        ):
            inputs = x.reshape(-1, self._cols)  # [n, cols]
            out = self._owner.run(self._product if len(inputs) >= self._many else self._rows, inputs)  # [n, rows]
            if out is not None:
                return out.view(*x.shape[:-1], -1)
        return F.linear(x, weight, bias)


class PackedLinear(_Linear):
    """x w^T + bias for one packed weight, of which there is no other copy."""

    def __init__(self, owner: DenseKernels, weight: PackedWeight, prepared: PreparedWeight) -> None:
        super().__init__(owner, prepared)
        self._weight = weight

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `KernelLinear`; weight stands for the packed one and is not read. What kernels do not take is decoded."""
        if self._is_plain(x):
            out = self._by_kernels(x)
            if out is not None:
                return out
        return F.linear(x, values(self._weight).to(weight.dtype), bias)

    def _by_kernels(self, x: torch.Tensor) -> torch.Tensor | None:
        """[..., rows] of x [..., cols]; None if the threads were ended. At most MAX_TOKENS rows are float32 at once."""
        inputs = x.reshape(-1, self._cols)  # [n, cols]
        if len(inputs) <= MAX_TOKENS:
            out = self._owner.run(self._rows, inputs)  # [n, rows]
            return None if out is None else out.view(*x.shape[:-1], -1)
        out = torch.empty(len(inputs), self._weight.rows, dtype=x.dtype)
        for start in range(0, len(inputs), MAX_TOKENS):
            part = self._owner.run(self._rows, inputs[start : start + MAX_TOKENS])
            if part is None:
                return None
            out[start : start + MAX_TOKENS] = part
        return out.view(*x.shape[:-1], -1)
