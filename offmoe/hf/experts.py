"""Our experts in transformers' place: the function behind `experts_implementation="offmoe"`.

transformers calls it with what every registered implementation gets: (experts module, hidden_states [T, H],
top_k_index [T, k], top_k_weights [T, k]). The module holds no weights, only a handle to what computes for it. Modules
outside the registry get a forward of their own from their adapter. Must never know a family."""

from __future__ import annotations

import torch
from torch import nn

from offmoe.errors import ConfigError
from offmoe.hf.adapters import HANDLE, require_adapter
from offmoe.hf.upstream import ALL_EXPERTS_FUNCTIONS
from offmoe.runtime.executor import ExpertExecutor
from offmoe.runtime.kernels import ExpertMath

IMPLEMENTATION = "offmoe"


def attach(module: nn.Module, executor: ExpertExecutor, layer: int) -> None:
    """Let an experts module of MoE layer `layer` compute through `executor`."""
    adapter = require_adapter(module)

    def rows(math: ExpertMath, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise ConfigError(
                "gradients do not pass through experts outside the device. Use torch.no_grad() or model.generate()."
            )
        return executor.run(layer, math, hidden, ids, adapter.by_choice)

    adapter.connect(module, rows)


def offmoe_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The registered function: hidden_states [T, H] -> [T, H]."""
    out: torch.Tensor = getattr(module, HANDLE)(hidden_states, top_k_index, top_k_weights)
    return out


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, offmoe_experts_forward)
