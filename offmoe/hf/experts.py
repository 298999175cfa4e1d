"""Our experts in transformers' place: the function behind `experts_implementation="offmoe"`.

transformers calls it with what every registered implementation gets: (experts module, hidden_states [T, H],
top_k_index [T, k], top_k_weights [T, k]). The module holds no weights, only a handle to the executor. Must never know
a family: what a module computes is read off the attributes that transformers' decorator set on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from offmoe.errors import ConfigError
from offmoe.hf.adapters import ALL_EXPERTS_FUNCTIONS
from offmoe.runtime.executor import ExpertExecutor
from offmoe.runtime.kernels import ExpertMath

IMPLEMENTATION = "offmoe"
_HANDLE = "_offmoe"


@dataclass(frozen=True)
class _Handle:
    executor: ExpertExecutor
    layer: int
    math: ExpertMath


def expert_math(module: nn.Module) -> ExpertMath:
    """What the experts of a registry module compute."""
    gated = bool(module.has_gate)
    return ExpertMath(
        up="gate_up_proj" if gated else "up_proj",
        activate=module._apply_gate if gated else module.act_fn,  # type: ignore[arg-type]
        biased=bool(module.has_bias),
        transposed=bool(module.is_transposed),
        normalize=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,  # type: ignore[arg-type]
    )


def attach(module: nn.Module, executor: ExpertExecutor, layer: int) -> None:
    """Let an experts module of MoE layer `layer` compute through `executor`."""
    setattr(module, _HANDLE, _Handle(executor, layer, expert_math(module)))


def offmoe_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The registered function: hidden_states [T, H] -> [T, H]."""
    handle: _Handle = getattr(module, _HANDLE)
    if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
        raise ConfigError(
            "gradients do not pass through experts outside the device. Use torch.no_grad() or model.generate()."
        )
    return handle.executor.run(handle.layer, handle.math, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, offmoe_experts_forward)
