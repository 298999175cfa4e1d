"""offmoe's experts in transformers' place: the function behind `experts_implementation="offmoe"`.

transformers calls it with what every registered implementation gets. The experts module holds no weights, only one
object, `AttachedExperts`. Modules outside transformers' registry get a forward of their own from their adapter, which
calls the same object. Must never know a family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from offmoe.compute.cpu_slot import CpuSlot
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.kernels import ExpertMath, combine
from offmoe.errors import ConfigError
from offmoe.hf.adapters.find import require_adapter
from offmoe.hf.adapters.reroute import Choose
from offmoe.hf.catalog.catalog import CatalogLayer
from offmoe.hf.upstream import ALL_EXPERTS_FUNCTIONS
from offmoe.runtime.executor import ExpertExecutor

IMPLEMENTATION = "offmoe"
ATTRIBUTE = "_offmoe"
"""Of an experts module that computes through an executor: its `AttachedExperts`."""


def expert_layers(stored: Sequence[CatalogLayer], modules: Sequence[nn.Module]) -> list[ExpertLayer]:
    """Everything about each MoE layer that moving and computing its experts needs.

    Args:
        stored: the catalog's layers.
        modules: the experts module of each, as loaded.
    """
    shared: dict[CpuSlot, CpuSlot] = {}
    layers = []
    for index, (layer, module) in enumerate(zip(stored, modules, strict=True)):
        adapter, slot = require_adapter(module), layer.cpu_slot
        layers.append(
            ExpertLayer(
                index=index,
                layout=layer.layout,
                assembly=layer.assembly,
                math=adapter.math(module),
                decode=layer.decode,
                cpu_slot=None if slot is None else shared.setdefault(slot, slot),
                order=adapter.order,
            )
        )
    return layers


class AttachedExperts:
    """The experts of one MoE layer, computed by an executor."""

    def __init__(self, executor: ExpertExecutor, layer: ExpertLayer) -> None:
        self._executor, self._layer = executor, layer
        self.choose: Choose | None = None
        """Chooses the ids in place of the router's; None: the router's stay."""

    def routed(self, ids: torch.Tensor) -> torch.Tensor:
        return ids if self.choose is None else self.choose(ids)

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise ConfigError(
                "gradients do not pass through experts outside the device. Use torch.no_grad() or model.generate()."
            )
        return self._executor.run(self._layer, hidden, ids)

    def with_math(self, math: ExpertMath) -> AttachedExperts:
        return AttachedExperts(self._executor, replace(self._layer, math=math))


def attach(module: nn.Module, executor: ExpertExecutor, layer: ExpertLayer) -> None:
    """Let an experts module compute through `executor`. layer: the module's."""
    experts = AttachedExperts(executor, layer)
    setattr(module, ATTRIBUTE, experts)
    require_adapter(module).connect(module, experts)


def offmoe_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The registered function: hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
    experts: AttachedExperts = getattr(module, ATTRIBUTE)
    rows = experts(hidden_states, experts.routed(top_k_index))  # [T * k, H]
    return combine(rows, top_k_weights, hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, offmoe_experts_forward)


class Removable(Protocol):
    """A change that lasts until it is removed."""

    def remove(self) -> None: ...


class _Choosing:
    """Lets `choose` choose a layer's ids until it is removed."""

    def __init__(self, experts: AttachedExperts, choose: Choose) -> None:
        assert experts.choose is None, "already rerouted"
        self._experts = experts
        experts.choose = choose

    def remove(self) -> None:
        self._experts.choose = None


def reroute(module: nn.Module, choose: Choose) -> Removable:
    """Let an experts module, of ours or of stock transformers, compute with the ids that `choose` gives.

    A module of stock transformers takes ids of experts only, or `null_ids` of its adapter. Removing the result leaves
    no trace.
    """
    experts: AttachedExperts | None = getattr(module, ATTRIBUTE, None)
    return require_adapter(module).reroute(module, choose) if experts is None else _Choosing(experts, choose)
