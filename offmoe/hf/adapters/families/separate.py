"""Architectures outside the registry whose experts are modules of their own, and whose routers drop tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offmoe.compute.kernels.torch_ffn import ExpertMath, accumulate
from offmoe.hf.adapters import reroute
from offmoe.hf.adapters.base import Activation, Experts, FamilyExperts, Place, Routing
from offmoe.hf.adapters.reroute import Choose


class _Separate(FamilyExperts):
    """Experts that are modules of their own: `experts.expert_0` and so on. `params` names the parameters of one."""

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
        for expert in range(1, self.num_experts(module)):  # `math` reads the activation of expert 0
            del module.experts[f"expert_{expert}"]

    def null_ids(self, module: nn.Module) -> Sequence[int]:
        return (-1,)  # a token that its expert has no capacity for

    def math(self, module: Any) -> ExpertMath:
        up, down = self.params[0].rpartition(".")[0], self.params[-1].rpartition(".")[0]
        activate: Activation = module.experts["expert_0"].act

        def math(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
            h = activate(F.linear(x, weights[f"{up}.weight"], weights.get(f"{up}.bias")))  # [n, I]
            weight = weights[f"{down}.weight"]
            # The module casts too, which under autocast rounds once more.
            return F.linear(h.to(weight.dtype), weight, weights.get(f"{down}.bias"))

        return math


class SwitchTransformers(_Separate):
    """SwitchTransformersSparseMLP: one expert per token, or none once the expert's capacity is used up.

    A dropped token has an all-zero one-hot row: its id is -1 and its output zero, as in transformers. Which tokens are
    dropped depends on the whole sequence, so a prediction is exact only for the sequence it is made from.
    """

    family, name = "switch_transformers", "SwitchTransformersSparseMLP"
    params = ("wi.weight", "wo.weight")

    def top_k(self, module: nn.Module) -> int:
        return 1

    def routing(self, module: Any) -> Routing:
        return Routing(module.router, lambda outputs: reroute.ids_of_one_hot(outputs[0].flatten(0, -2)))

    def forward(self, module: Any, experts: Experts, hidden_states: Tensor) -> Tensor:
        routing = module.router(hidden_states)  # one-hot [B, S, E], probability [B, S, 1], logits
        ids = experts.routed(self.routing(module).ids(routing))  # [T, 1]
        outputs = experts(hidden_states.reshape(len(ids), -1), ids)  # [T, H]
        out = accumulate(outputs * routing[1].reshape(-1, 1), ids, hidden_states.dtype)
        return out.view(hidden_states.shape)

    def reroute(self, module: Any, choose: Choose) -> RemovableHandle:
        return reroute.one_hot(module.experts, choose)


class NllbMoe(_Separate):
    """NllbMoeSparseMLP as transformers 5.23 computes it, which is not what the architecture's paper says.

    NllbMoeExperts reads the mask of the first choice, 0 or 1 for each of E experts, as expert ids. So a token's second
    choice goes to expert 0 and its first choice to expert 1, each with the weight of the expert that was chosen, and no
    other expert ever runs. This adapter computes the same. transformers also runs expert 0 with weight 0 on every token
    for the choices that were not made; these rows are omitted here, which differs only if expert 0 overflows on them.

    The router drops tokens by capacity and by the padding mask of the call, so no layer is predicted.
    """

    family, name = "nllb_moe", "NllbMoeSparseMLP"
    params = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")

    def top_k(self, module: nn.Module) -> int:
        return 2

    def routing(self, module: nn.Module) -> None:
        return None

    def forward(
        self, module: Any, experts: Experts, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> Tensor:
        kept = 1 - module.experts.moe_token_dropout
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
        mask, probs, _ = module.router(hidden, padding_mask)  # [T, E] twice; at most two entries of a row are not 0
        routed, weights = reroute.ids_of_mask(mask, probs)
        ids = experts.routed(routed)
        weighted = experts(hidden, ids) * weights.reshape(-1, 1)
        if kept < 1:
            weighted = weighted * kept
        return accumulate(weighted, ids, hidden.dtype).view(hidden_states.shape)

    def reroute(self, module: Any, choose: Choose) -> RemovableHandle:
        return reroute.mask_as_ids(module.experts, choose)
