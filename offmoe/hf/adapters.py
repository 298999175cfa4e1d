"""What offmoe must know about a kind of experts module: what an expert's parameters are, and how the module calls it.

Nothing moves here. Every experts module in transformers' registry is of one kind, known by the attributes that the
registry's decorator sets; an architecture outside the registry has a small class here. Everything else in offmoe works
on what an adapter says and knows no architecture.

What it must never do: compute anything that the module it stands for would not, dropped tokens and quirks included.

The tests pass on transformers 5.17.0 and 5.23.0. What only the later ones set (`_is_expert_parallel`,
`has_post_expert_norm`) is not relied on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from offmoe.runtime.kernels import ExpertMath, GatedFFN, combine

Rows = Callable[[ExpertMath, torch.Tensor, torch.Tensor], torch.Tensor]
"""rows(math, hidden [T, H], ids [T, k]) -> [T * k, H]: every token through its experts, unweighted, in the order of
ids; a row whose id is no expert's is zero."""

HANDLE = "_offmoe"
"""Attribute of a registry module that holds what computes for it."""


class Place(NamedTuple):
    """Whose weights a parameter of the model holds.

    param: the name of that parameter of one expert. expert: whose it is; None for all experts', which follow each other
    along its first dimension.
    """

    param: str
    expert: int | None = None


class ExpertsAdapter(ABC):
    """One kind of experts module. Methods but the first get a module that it claims."""

    @abstractmethod
    def claims(self, module: nn.Module) -> bool:
        """Whether `module` is of this kind; also after `strip`."""

    @abstractmethod
    def num_experts(self, module: nn.Module) -> int:
        """Experts whose weights it has; before `strip`."""

    @abstractmethod
    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Of the parameters of one expert, by the names that `math` reads; before `strip`."""

    @abstractmethod
    def places(self, module: nn.Module) -> dict[str, Place]:
        """What each parameter under `module` holds that belongs to experts, by its name there; before `strip`."""

    def strip(self, module: nn.Module) -> None:
        """Delete experts' parameters. The loader then has no place for their tensors and leaves them in the shards."""
        for name in self.places(module):
            owner, _, param = name.rpartition(".")
            holder = module.get_submodule(owner)
            del holder._parameters[param]  # not None: a None parameter would refuse plain tensors later
            # not an attribute of Module; the initialisation of missing weights looks parameters up by name
            setattr(holder, "_is_hf_initialized", True)  # noqa: B010
        setattr(module, "_is_hf_initialized", True)  # noqa: B010

    @abstractmethod
    def math(self, module: nn.Module) -> ExpertMath:
        """What one expert computes."""

    @abstractmethod
    def connect(self, module: nn.Module, rows: Rows) -> None:
        """Let this one module compute through `rows` from now on."""


class RegistryExperts(ExpertsAdapter):
    """Any class decorated with transformers' `use_experts_implementation`: fused parameters, experts first."""

    ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    """Set by the decorator on every instance."""

    def claims(self, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in self.ATTRIBUTES)

    def num_experts(self, module: nn.Module) -> int:
        return int(module.get_parameter("down_proj").shape[0])

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(module.get_parameter(name).shape[1:]) for name in self._names(module)}

    def places(self, module: nn.Module) -> dict[str, Place]:
        return {name: Place(name) for name in self._names(module)}

    def math(self, module: nn.Module) -> ExpertMath:
        return GatedFFN(
            up=self._up(module),
            activate=module._apply_gate if module.has_gate else module.act_fn,  # type: ignore[arg-type]
            biased=bool(module.has_bias),
            transposed=bool(module.is_transposed),
            normalize=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,  # type: ignore[arg-type]
        )

    def connect(self, module: nn.Module, rows: Rows) -> None:
        math = self.math(module)

        def forward(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return combine(rows(math, hidden, ids), weights, hidden.dtype)

        setattr(module, HANDLE, forward)

    def _up(self, module: nn.Module) -> str:
        return "gate_up_proj" if module.has_gate else "up_proj"

    def _names(self, module: nn.Module) -> tuple[str, ...]:
        names = (self._up(module), "down_proj")
        return (*names, *(f"{name}_bias" for name in names)) if module.has_bias else names


ADAPTERS: tuple[ExpertsAdapter, ...] = (RegistryExperts(),)


def adapter_of(module: nn.Module) -> ExpertsAdapter | None:
    """The adapter that claims `module`, if one does."""
    return next((adapter for adapter in ADAPTERS if adapter.claims(module)), None)


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Experts modules of a model by module path, in module order, which is the order of a forward."""
    return {name: module for name, module in model.named_modules() if adapter_of(module) is not None}


def expert_parameters(model: nn.Module) -> dict[str, tuple[str, Place]]:
    """Experts' parameters of a whole model by full name -> (name of the experts module, what of whom it holds)."""
    out: dict[str, tuple[str, Place]] = {}
    for name, module in find_experts(model).items():
        adapter = adapter_of(module)
        assert adapter is not None
        out |= {f"{name}.{param}": (name, place) for param, place in adapter.places(module).items()}
    return out
