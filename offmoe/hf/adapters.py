"""Which adapter knows a module, and what all adapters say about a whole model.

Nothing moves here. Must never name an architecture: those are in families.py.
"""

from __future__ import annotations

from torch import nn

from offmoe.hf.adapter import HANDLE, ExpertsAdapter, Place, RegistryExperts, Routing, Rows
from offmoe.hf.families import FAMILIES

__all__ = [
    "ADAPTERS",
    "HANDLE",
    "ExpertsAdapter",
    "Place",
    "RegistryExperts",
    "Routing",
    "Rows",
    "adapter_of",
    "expert_parameters",
    "find_experts",
]


ADAPTERS: tuple[ExpertsAdapter, ...] = (RegistryExperts(), *FAMILIES)


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
