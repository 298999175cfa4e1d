"""What the `forward` functions that single modules get from offmoe have in common, and the hooks of such modules.

Must never: let such a function leave its process.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from offmoe.errors import ConfigError
from offmoe.hf.load.eager import has_tangent, is_recorded


class OwnForward:
    """A module's `forward` on the instance, computed by kernels. It must not hold the module, which holds it."""

    def __reduce_ex__(self, protocol: object) -> str:
        raise ConfigError("the layer cannot be copied or pickled: kernels of this process read its weights.")


class StockForward:
    """The `forward` of a module's class, for calls that kernels do not take."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> nn.Module:
        module = self._module()
        assert module is not None, "a module runs while it exists"
        return module

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        module = self.module
        return type(module).forward(module, *arguments, **options)


def is_plain(x: torch.Tensor) -> bool:
    """Whether a bf16 tensor is computed with here and now: nobody compiles, records or differentiates."""
    return (
        x.dtype is torch.bfloat16
        and not torch.compiler.is_compiling()
        and not is_recorded(x)
        and not has_tangent(x)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and x.is_contiguous()
    )


def hooks_of(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """The dictionaries in which the module keeps its hooks: the same objects as long as it lives."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def has_hooks(module: nn.Module, besides: type | tuple[type, ...] = ()) -> bool:
    """Whether somebody wants to see or change what the module gets or gives. besides: hooks that do not count."""
    found = hooks_of(module)
    return any(found) and any(not isinstance(hook, besides) for hooks in found for hook in hooks.values())


class Onlooker:
    """A hook of a module that looks at nothing and changes nothing, as one that only wants to be called or to raise."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def __call__(self, *_: object) -> None:
        self._call()
