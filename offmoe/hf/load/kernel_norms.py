"""RMS norms of a loaded model that the C kernels compute on a CPU (`exactness="numeric"`).

A norm takes torch eight operators, 40 to 80 us for one token's few KB; the kernels take one call. Which modules are RMS
norms, and how they round, is found out by running them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from offmoe.compute.kernels.cpu import CpuKernels
from offmoe.compute.kernels.token_attention import Norm, RowNorm
from offmoe.hf.load.own_forward import OwnForward, StockForward, is_plain

MOST_NUMBERS = 1 << 16
"""Numbers of an input up to which one thread computes its norm."""
MULTIPLE = 16
"""Rows are multiples of it."""
EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""What modules call the number under the root."""
TRIED = (1.0, 1e-3)
"""Sizes of the numbers that a module is tried with. A mean square of 1e-6 shows the epsilon."""
EQUAL_SHARE = 0.99
"""Share of a kind's results that must have the module's bits. A sum in another order changes fewer, another way of
rounding a third."""


class KnownNorm(NamedTuple):
    """An RMS norm that the kernels have."""

    kind: Norm
    eps: float


class NormForward(OwnForward):
    """The `forward` of one RMS norm."""

    def __init__(self, module: nn.Module, known: KnownNorm, kernels: CpuKernels) -> None:
        self._stock, self._parameters = StockForward(module), module._parameters
        self.norm = RowNorm(kernels, known.kind, known.eps)
        self._width = len(weight_of(module))

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.prepared(hidden_states)
        if weight is None:
            return self._stock(hidden_states)  # type: ignore[no-any-return]
        return self.norm(hidden_states, weight)

    def prepared(self, x: torch.Tensor) -> torch.Tensor | None:
        """The weight for an input; None if the module's own code computes it."""
        weight = self._parameters["weight"]
        assert weight is not None
        fits = (
            0 < x.numel() <= MOST_NUMBERS
            and x.shape[-1] == self._width
            and is_plain(x)
            and weight.dtype is torch.bfloat16
            and weight.is_contiguous()
            and not (weight.requires_grad and torch.is_grad_enabled())
        )
        return weight if fits else None


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a norm."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def known_norm(module: nn.Module, kernels: CpuKernels) -> KnownNorm | None:
    """What RMS norm a module of class code is; None: none that the kernels have."""
    weight = module._parameters.get("weight")
    if len(module._parameters) != 1 or module._modules or module._buffers or weight is None or weight.ndim != 1:
        return None
    if weight.dtype is not torch.bfloat16 or weight.is_meta or len(weight) % MULTIPLE:
        return None
    eps = next((value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    if eps is None:
        return None
    generator = torch.Generator().manual_seed(0)
    tried = [(torch.randn(2, len(weight), generator=generator) * size).bfloat16() for size in TRIED]
    try:
        with torch.no_grad():
            wanted = [StockForward(module)(x) for x in tried]
    except (TypeError, ValueError, RuntimeError):  # it takes something else
        return None
    for kind in Norm:
        norm = RowNorm(kernels, kind, eps)
        if all(_agrees(norm(x, weight), y) for x, y in zip(tried, wanted, strict=True)):
            return KnownNorm(kind, eps)
    return None


def _agrees(found: torch.Tensor, wanted: object) -> bool:
    """Whether results are those of a module, up to the order of a sum."""
    if not isinstance(wanted, torch.Tensor) or wanted.dtype != found.dtype or wanted.shape != found.shape:
        return False
    return bool((found == wanted).float().mean() >= EQUAL_SHARE and torch.allclose(found, wanted, rtol=2**-7))


def attach_norms(model: nn.Module, kernels: CpuKernels) -> dict[nn.Module, KnownNorm]:
    """Let the kernels compute a model's RMS norms.

    Args:
        model: a loaded model on the CPU.
        kernels: of the library; their threads are not used.

    Returns:
        The modules that they compute.
    """
    found = {}
    for module in model.modules():
        if "forward" not in module.__dict__ and (known := known_norm(module, kernels)) is not None:
            object.__setattr__(module, "forward", NormForward(module, known, kernels))
            found[module] = known
    return found
