"""Refuses whatever records a model's operators instead of running them: tracing, export, transforms of functions.

Which experts a step needs is known only when it runs, so a recording would compute every later prompt with the experts
of the first. `torch.compile` is no recording: it runs what it cannot compile, and experts are run so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

from offmoe.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")

NOT_IN_A_GRAPH = (
    "offmoe chooses and moves experts while the model runs, so no graph can hold a whole forward pass. Leave "
    "fullgraph=True out, or the compilation."
)


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run as it is where torch.compile meets it; ends in torch's error with this reason if that must not
    be."""
    disabled: Callable[P, T] = torch.compiler.disable(function, reason=NOT_IN_A_GRAPH)
    return disabled


def require_eager(x: object) -> None:
    """Refuse an input whose operators are being recorded or transformed.

    Args:
        x: a tensor, or what stands for one.

    Raises:
        ConfigError: a trace, an export or a transform of torch.func is under way.
    """
    if isinstance(x, torch.Tensor) and not is_recorded(x):
        return
    raise ConfigError(
        f"the model cannot be traced, exported or transformed ({_what(x)}): which experts it needs depends on its "
        "input, and they are not in the graph. Call the model itself, or trace it under stock transformers."
    )


def has_tangent(x: torch.Tensor) -> bool:
    """Whether forward-mode differentiation follows the tensor."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def is_recorded(x: torch.Tensor) -> bool:
    """Whether an operator on `x` does anything but run."""
    if torch._C._get_tracing_state() is not None or torch._C._functorch.maybe_current_level() is not None:
        return True
    if type(x) is not torch.Tensor and type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return True  # a fake tensor, or one that wraps others
    return torch._C._len_torch_dispatch_stack() > 0 and _proxies()


def _proxies() -> bool:
    """Whether make_fx is recording."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def _what(x: object) -> str:
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func"
    return type(x).__name__ if not isinstance(x, torch.Tensor) or type(x) is not torch.Tensor else "make_fx"
