"""Architectures outside the registry whose experts are modules of their own, and whose routers drop tokens.

family.py says what such a class does and must never do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offmoe.compute.kernels import ExpertMath, accumulate
from offmoe.hf.adapters import reroute
from offmoe.hf.adapters.base import Place, Routing, Rows
from offmoe.hf.adapters.families.family import Activation, Family
from offmoe.hf.adapters.reroute import Choose


class _Separate(Family):
    """Experts that are modules of their own, `experts.expert_0` and so on; `params` are of one of them."""

    def num_experts(self, module: Any) -> int:
        return int(module.experts.num_experts)

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        first = module.get_submodule("experts.expert_0")
        return {name: tuple(first.get_parameter(name).shape) for name in self.params}

    def places(self, module: Any) -> dict[str, Place]:
        return {
            f"experts.expert_{expert}.{param}": Place(param, expert)
            for expert in range(self.num_experts(module))
            for param in self.params
        }

    def strip(self, module: Any) -> None:
        super().strip(module)
        for expert in range(1, self.num_experts(module)):  # one says what all compute
            del module.experts[f"expert_{expert}"]

    def nobodys(self, module: nn.Module) -> Sequence[int]:
        return (-1,)  # of a token that its expert has no capacity for

    def math(self, module: Any) -> ExpertMath:
        up, down = self.params[0].rpartition(".")[0], self.params[-1].rpartition(".")[0]
        activate: Activation = module.experts["expert_0"].act

        def math(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
            h = activate(F.linear(x, weights[f"{up}.weight"], weights.get(f"{up}.bias")))  # [n, I]
            weight = weights[f"{down}.weight"]
            # The modules cast too, which under autocast rounds once more.
            return F.linear(h.to(weight.dtype), weight, weights.get(f"{down}.bias"))

        return math


class SwitchTransformers(_Separate):
    """SwitchTransformersSparseMLP: one expert per token, and none once the expert's capacity is used up.

    The router's one-hot row of a dropped token is all zero: its id is -1 and its output zero, as in transformers. How
    many are dropped depends on the whole sequence, so a prediction is exact for the very sequence it is made from.
    """

    family, name = "switch_transformers", "SwitchTransformersSparseMLP"
    params = ("wi.weight", "wo.weight")

    def top_k(self, module: nn.Module) -> int:
        return 1

    def routing(self, module: Any) -> Routing:
        return Routing(module.router, lambda outputs: reroute.ids_of_one_hot(outputs[0].flatten(0, -2)))

    def forward(self, module: Any, rows: Rows) -> Callable[..., Any]:
        math, ids_of = self.math(module), self.routing(module).ids

        def forward(hidden_states: Tensor) -> Tensor:
            outputs = module.router(hidden_states)  # one-hot [B, S, E], probability [B, S, 1], logits
            ids = rows.routed(ids_of(outputs))  # [T, 1]
            made = rows(math, hidden_states.reshape(len(ids), -1), ids)
            out = accumulate(made * outputs[1].reshape(-1, 1), ids, hidden_states.dtype)
            return out.view(hidden_states.shape)

        return forward

    def reroute(self, module: Any, choose: Choose) -> RemovableHandle:
        return reroute.one_hot(module.experts, choose)


class NllbMoe(_Separate):
    """NllbMoeSparseMLP as transformers 5.23 computes it, which is not what the architecture's paper says.

    NllbMoeExperts takes the mask of the first choice, 0 or 1 for each of E experts, for the numbers of experts. So a
    token's second choice goes to expert 0 and its first to expert 1, with the weights meant for those chosen, and no
    other expert ever runs. The same comes out here. transformers also runs expert 0 on every token for the choices that
    were not made, with weight 0; these rows are left out, which differs only if expert 0 overflows on such a token.

    The router drops tokens by capacity and by the padding mask of the call, so nothing is predicted.
    """

    family, name = "nllb_moe", "NllbMoeSparseMLP"
    params = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")

    def top_k(self, module: nn.Module) -> int:
        return 2

    def routing(self, module: nn.Module) -> None:
        return None

    def forward(self, module: Any, rows: Rows) -> Callable[..., Any]:
        math = self.math(module)
        kept = 1 - module.experts.moe_token_dropout

        def forward(hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
            hidden = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
            mask, probs, _ = module.router(hidden, padding_mask)  # [T, E] twice; at most two of a row are not 0
            routed, weights = reroute.ids_of_mask(mask, probs)
            ids = rows.routed(routed)
            weighted = rows(math, hidden, ids) * weights.reshape(-1, 1)
            if kept < 1:
                weighted = weighted * kept
            return accumulate(weighted, ids, hidden.dtype).view(hidden_states.shape)

        return forward

    def reroute(self, module: Any, choose: Choose) -> RemovableHandle:
        return reroute.mask_as_ids(module.experts, choose)
