"""Routers of a loaded model that the C kernels compute for single tokens on a CPU (`exactness="numeric"`).

Which modules are plain routers is decided by their code: it is that of one of the modules of `upstream.plain_routers`,
and what it does for a token is written once, in C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offmoe.compute.dense_linear import DenseKernels
from offmoe.compute.kernels.cpu import BF16_GROUP
from offmoe.compute.kernels.token_router import Selection, TokenRouter
from offmoe.hf.load.class_code import code_of
from offmoe.hf.load.own_forward import OwnForward, StockForward, is_plain
from offmoe.hf.upstream import plain_routers

Describe = Callable[[Any], Selection]
"""describe(module): how the module chooses experts."""

SELECTIONS: dict[str, Describe] = {
    "softmax": lambda module: Selection(module.top_k, normalize=bool(module.norm_topk_prob)),
    "softmax of the chosen": lambda module: Selection(module.top_k),
    "softmax of the chosen, logits in float": lambda module: Selection(module.top_k, logits=torch.float32),
    "softmax of the chosen, scores in float": lambda module: Selection(module.top_k, scores=torch.float32),
    "sigmoid in groups": lambda module: Selection(
        module.top_k,
        sigmoid=True,
        normalize=bool(module.norm_topk_prob),
        rounds=False,
        logits=torch.float32,
        scores=torch.float32,
        groups=module.num_group,
        kept_groups=module.topk_group,
        scale=float(module.routed_scaling_factor),
    ),
}
"""By the names of `upstream.plain_routers`."""
CORRECTION = "e_score_correction_bias"


class RouterForward(OwnForward):
    """The `forward` of one router."""

    def __init__(self, module: nn.Module, owner: DenseKernels, describe: Describe) -> None:
        self._stock, self._owner, self._describe = StockForward(module), owner, describe
        self._key: object = None
        """What `_router` was prepared from."""
        self._held: tuple[torch.Tensor | None, ...] = ()
        """The tensors of the key, kept so that no other gets their identity or memory."""
        self._router: TokenRouter | None = None

    def __call__(self, hidden_states: torch.Tensor) -> Any:
        router = self.prepared(hidden_states)
        routed = None if router is None else self._owner.run(router, hidden_states)
        return self._stock(hidden_states) if routed is None else tuple(routed)

    def prepared(self, x: torch.Tensor) -> TokenRouter | None:
        """The call for an input; None if the module's own code computes it."""
        if not is_plain(x):
            return None
        module: Any = self._stock.module
        held = *(module._parameters.get(name) for name in ("weight", "bias")), getattr(module, CORRECTION, None)
        weight, bias, correction = held
        if (
            weight is None
            or x.numel() != x.shape[-1]
            or x.shape[-1] != weight.shape[-1]
            or module.training
            or any(tensor is not None and tensor.requires_grad for tensor in held)
        ):
            return None
        selection = self._describe(module)
        if x.ndim != 2 and not selection.sigmoid:  # the others' code takes [T, H], or keeps the shape
            return None
        key = selection, [None if tensor is None else _state(tensor) for tensor in held]
        if key != self._key:
            self._key, self._held, self._router = key, held, self._made(selection, weight, bias, correction)
        return self._router

    def _made(
        self, selection: Selection, weight: torch.Tensor, bias: torch.Tensor | None, correction: torch.Tensor | None
    ) -> TokenRouter | None:
        """The router of these tensors; None if the kernels do not have it."""
        fits = weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.shape[1] % BF16_GROUP == 0
        if correction is not None:
            fits &= correction.dtype == torch.float32 and correction.shape == weight.shape[:1]
        if not fits or not selection.fits(len(weight)) or selection.sigmoid != (correction is not None):
            return None
        return TokenRouter(self._owner.kernels, weight, selection, bias=bias, correction=correction)


def _state(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Which tensor it is, where it stands, and how often it has been changed; inference mode does not count."""
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def attach_routers(model: nn.Module, owner: DenseKernels) -> int:
    """Let the kernels compute plain routers for single tokens.

    Args:
        model: a loaded model on the CPU.
        owner: the kernels of its linear layers.

    Returns:
        The number of modules.
    """
    known = {code_of(cls.forward): SELECTIONS[name] for name, cls in plain_routers()}
    known.pop(None, None)  # source that cannot be read
    count = 0
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2 or weight.is_meta or module._modules or "forward" in vars(module):
            continue
        describe = known.get(code_of(type(module).forward))
        if describe is not None:
            object.__setattr__(module, "forward", RouterForward(module, owner, describe))
            count += 1
    return count
