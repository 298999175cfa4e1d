"""One expert on one token in two calls of the C kernels, the first while what the second reads is on its way.

Moves: gate and up in the first call, down in the second, each through the cores' caches once.
Bound: memory bandwidth.
Must never: give other bits than one call of the whole expert.
"""

from __future__ import annotations

import ctypes

import torch

from offmoe.compute.kernels.cpu import CpuKernels, PreparedExpert
from offmoe.errors import CapacityError


class ExpertHalves:
    """The two calls; one thread at a time."""

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels

    def first(self, expert: PreparedExpert, x: torch.Tensor) -> torch.Tensor:
        """What goes into down: x float32 [1, H] -> float32 [1, I].

        Raises:
            CapacityError: there is no memory for the activations.
        """
        assert x.dtype == torch.float32
        assert x.shape == (1, expert.hidden)
        x, out = x.contiguous(), torch.empty(1, expert.struct.up.rows)
        self._call("offmoe_gate_up", expert.address, self._kernels.precision, x.data_ptr(), out.data_ptr())
        return out

    def second(self, expert: PreparedExpert, h: torch.Tensor) -> torch.Tensor:
        """The expert's output: h float32 [1, I] -> float32 [1, H].

        Raises:
            CapacityError: there is no memory for the activations.
        """
        assert h.dtype == torch.float32
        assert h.shape == (1, expert.struct.down.cols)
        h, out, down = h.contiguous(), torch.empty(1, expert.hidden), ctypes.byref(expert.struct.down)
        self._call("offmoe_linear", down, self._kernels.precision, h.data_ptr(), 1, out.data_ptr())
        return out

    def _call(self, name: str, *arguments: object) -> None:
        if self._kernels.function(name)(*arguments):
            raise CapacityError("no memory for the activations of one expert; free some")
