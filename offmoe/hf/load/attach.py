"""Our experts in transformers' place: the function behind `experts_implementation="offmoe"`.

transformers calls it with what every registered implementation gets: (experts module, hidden_states [T, H],
top_k_index [T, k], top_k_weights [T, k]). The module holds no weights, only a handle to what computes for it. Modules
outside the registry get a forward of their own from their adapter. Must never know a family."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from offmoe.compute.kernels import ExpertMath
from offmoe.errors import ConfigError
from offmoe.hf.adapters.base import HANDLE
from offmoe.hf.adapters.find import require_adapter
from offmoe.hf.adapters.reroute import Choose
from offmoe.hf.upstream import ALL_EXPERTS_FUNCTIONS
from offmoe.runtime.executor import ExpertExecutor

IMPLEMENTATION = "offmoe"


ROWS = "_offmoe_rows"
"""Attribute of a module that computes through an executor: its `ExecutorRows`."""


class ExecutorRows:
    """Experts of one MoE layer, computed by an executor."""

    def __init__(self, executor: ExpertExecutor, layer: int, by_choice: bool):
        self._executor, self._layer, self._by_choice = executor, layer, by_choice
        self.choose: Choose | None = None
        """What says the ids in the router's place."""

    def routed(self, ids: torch.Tensor) -> torch.Tensor:
        return ids if self.choose is None else self.choose(ids)

    def __call__(self, math: ExpertMath, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise ConfigError(
                "gradients do not pass through experts outside the device. Use torch.no_grad() or model.generate()."
            )
        return self._executor.run(self._layer, math, hidden, ids, self._by_choice)


class Removable(Protocol):
    """What is there until it is removed."""

    def remove(self) -> None: ...


class _Choosing:
    """Lets `choose` say a layer's ids until it is removed."""

    def __init__(self, rows: ExecutorRows, choose: Choose):
        assert rows.choose is None, "already rerouted"
        self._rows = rows
        rows.choose = choose

    def remove(self) -> None:
        self._rows.choose = None


def attach(module: nn.Module, executor: ExpertExecutor, layer: int) -> None:
    """Let an experts module of MoE layer `layer` compute through `executor`."""
    adapter = require_adapter(module)
    rows = ExecutorRows(executor, layer, adapter.by_choice)
    adapter.connect(module, rows)
    setattr(module, ROWS, rows)


def reroute(module: nn.Module, choose: Choose) -> Removable:
    """Let an experts module, of ours or of stock transformers, compute with the ids that `choose` says.

    With stock, only ids of experts, or `null_ids` of its adapter. Removing what is returned leaves no trace.
    """
    rows: ExecutorRows | None = getattr(module, ROWS, None)
    return require_adapter(module).reroute(module, choose) if rows is None else _Choosing(rows, choose)


def offmoe_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The registered function: hidden_states [T, H] -> [T, H]."""
    out: torch.Tensor = getattr(module, HANDLE)(hidden_states, top_k_index, top_k_weights)
    return out


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, offmoe_experts_forward)
