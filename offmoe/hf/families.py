"""Architectures whose experts are outside transformers' registry, one small class each.

Nothing moves here. A class claims the module whose forward it replaces: the experts module where that gets ids and
weights, the block around it where ids are made there. Its own parts (routers, shared experts, biases) go on computing;
only the loop over experts becomes a call of `rows`. All but one of these architectures add the experts of a token one
after the other, in ascending order and in the hidden dtype, and so does `accumulate`.

What it must never do: import a modeling file (a class is known by its name and its module's), or repair what an
architecture computes: quirks of transformers 5.23 that are reproduced here are said so.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offmoe.hf import rerouted
from offmoe.hf.adapter import ExpertsAdapter, Place, Routing, Rows
from offmoe.hf.rerouted import Choose
from offmoe.runtime.kernels import ExpertMath, GatedFFN, accumulate

Activation = Callable[[Tensor], Tensor]


class _Family(ExpertsAdapter):
    """What the classes below share: a module is known by its class, and keeps all experts in parameters of its own."""

    by_choice = True  # torch.where on [k, T] gives choices first
    family: str
    """The package under transformers.models."""
    name: str
    """Of the class."""
    params: tuple[str, ...]
    """Names, each of a parameter that holds all experts'."""

    def claims(self, module: nn.Module) -> bool:
        cls = type(module)
        return cls.__name__ == self.name and cls.__module__.startswith(f"transformers.models.{self.family}.")

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(module.get_parameter(name).shape[1:]) for name in self.params}

    def places(self, module: nn.Module) -> dict[str, Place]:
        return {name: Place(name) for name in self.params}

    def connect(self, module: nn.Module, rows: Rows) -> None:
        module.forward = self.forward(module, rows)

    @abstractmethod
    def forward(self, module: Any, rows: Rows) -> Callable[..., Any]:
        """The module's forward, its experts computed by `rows`."""


class Llama4(_Family):
    """Llama4TextMoe: inputs are scaled by the score, outputs are not.

    transformers repeats every token for every expert and multiplies most of them by zero, [E * T, H]; here only routed
    rows exist. The two agree bit for bit (up to two experts per token; published models have one) if a row that is
    alone with its expert takes the way through a matrix product that it takes among others: in float32 a single row
    would go through a matrix-vector product, which rounds otherwise.
    """

    family, name = "llama4", "Llama4TextMoe"
    params = ("experts.gate_up_proj", "experts.down_proj")

    def num_experts(self, module: nn.Module) -> int:
        return int(module.get_parameter("experts.down_proj").shape[0])

    def top_k(self, module: Any) -> int:
        return int(module.top_k)

    def routing(self, module: Any) -> Routing:
        def ids(outputs: Sequence[Tensor]) -> Tensor:
            return outputs[1].topk(module.top_k, dim=1).indices  # of the logits [T, E], as the router chose them

        return Routing(module.router, ids)

    def math(self, module: Any) -> ExpertMath:
        return ScaledInputFFN(module.experts.act_fn)

    def forward(self, module: Any, rows: Rows) -> Callable[..., Any]:
        ids_of = self.routing(module).ids
        alone = self.math(module)
        among_others = ScaledInputFFN(module.experts.act_fn, at_least=2)

        def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            hidden = hidden_states.reshape(-1, module.hidden_dim)  # [T, H]
            scores, logits = module.router(hidden)  # [T, E] twice
            ids = ids_of((scores, logits))  # [T, k]
            scaled = hidden.unsqueeze(1) * scores.gather(1, ids).unsqueeze(2)  # [T, k, H]
            made = rows(alone if len(hidden) == 1 else among_others, scaled.flatten(0, 1), rows.routed(ids))
            out = module.shared_expert(hidden)
            out.add_(made.view(scaled.shape).sum(dim=1))
            return out, logits

        return forward

    def reroute(self, module: Any, choose: Choose) -> RemovableHandle:
        return rerouted.scores(module.router, choose, self.routing(module).ids)


@dataclass(frozen=True)
class ScaledInputFFN:
    """Llama 4's expert. at_least: rows that a product is made of; zeros are added to make them up."""

    activate: Activation
    at_least: int = 1

    def __call__(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        n = len(x)
        if n < self.at_least:
            x = torch.cat([x, x.new_zeros(self.at_least - n, x.shape[1])])
        gate, up = torch.mm(x, weights["experts.gate_up_proj"]).chunk(2, dim=-1)  # [n, I] each
        return torch.mm(up * self.activate(gate), weights["experts.down_proj"])[:n]


class Dbrx(_Family):
    """DbrxFFN: three weights per expert, those of all experts merged into one first dimension [E * I, H]."""

    family, name = "dbrx", "DbrxFFN"
    params = ("experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2")

    def num_experts(self, module: Any) -> int:
        return int(module.experts.num_experts)

    def shapes(self, module: Any) -> dict[str, tuple[int, ...]]:
        experts = module.experts
        return dict.fromkeys(self.params, (experts.ffn_hidden_size, experts.hidden_size))

    def top_k(self, module: Any) -> int:
        return int(module.top_k)

    def routing(self, module: Any) -> Routing:
        return Routing(module.router, lambda outputs: module.route_tokens_to_experts(outputs[0])[1])

    def math(self, module: Any) -> ExpertMath:
        mlp = module.experts.mlp

        def math(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
            # the module's own forward takes the weights as arguments
            w1, v1, w2 = (weights[name] for name in self.params)
            out: Tensor = mlp(x, w1, v1, w2)
            return out

        return math

    def forward(self, module: Any, rows: Rows) -> Callable[..., Any]:
        math = self.math(module)

        def forward(hidden_states: Tensor) -> Tensor:
            weights, routed = module.route_tokens_to_experts(module.router(hidden_states))  # [T, k] each
            ids = rows.routed(routed)
            made = rows(math, hidden_states.reshape(-1, hidden_states.shape[-1]), ids)
            return accumulate(made * weights.reshape(-1, 1), ids, hidden_states.dtype).view(hidden_states.shape)

        return forward

    def reroute(self, module: Any, choose: Choose) -> RemovableHandle:
        return rerouted.ids_argument(module.experts, choose)


class JetMoe(_Family):
    """JetMoeMoE, the experts of the feed-forward part.

    The mixture of attention (JetMoeMoA) stays on the device with the dense weights: its experts project the queries of
    every layer and are a small part of the model.
    """

    by_choice = False
    family, name = "jetmoe", "JetMoeMoE"
    params = ("input_linear.weight", "output_linear.weight")

    def num_experts(self, module: nn.Module) -> int:
        return int(module.get_parameter("output_linear.weight").shape[0])

    def top_k(self, module: Any) -> int:
        return int(module.router.top_k)

    def routing(self, module: Any) -> Routing:
        def ids(outputs: Sequence[Tensor]) -> Tensor:
            return outputs[-1].topk(module.router.top_k, dim=1).indices  # of the logits [T, E], as the router chose

        return Routing(module.router, ids)

    def math(self, module: Any) -> ExpertMath:
        def activate(h: Tensor) -> Tensor:
            gate, up = h.chunk(2, dim=-1)  # [n, I] each
            out: Tensor = module.activation(gate) * up
            return out

        up, down = self.params
        return GatedFFN(up=up, activate=activate, down=down)

    def forward(self, module: Any, rows: Rows) -> Callable[..., Any]:
        math = self.math(module)

        def forward(layer_input: Tensor) -> Tensor:
            hidden = layer_input.reshape(-1, layer_input.shape[-1])  # [T, H]
            logits = module.router(hidden)[-1]  # [T, E] float32
            chosen, routed = logits.topk(module.router.top_k, dim=1)  # [T, k]; the router itself gives them sorted
            weights = torch.softmax(chosen, dim=1).type_as(hidden)
            ids = rows.routed(routed)
            made = rows(math, hidden, ids)
            out = accumulate(made * weights.reshape(-1, 1), ids, hidden.dtype).view(layer_input.shape)
            return torch.add(out, module.bias)

        return forward

    def reroute(self, module: Any, choose: Choose) -> RemovableHandle:
        return rerouted.sorted_pairs(module.router, choose)


class LongcatFlash(_Family):
    """LongcatFlashExperts: behind the experts there are identities, which give a token back as it is.

    transformers 5.23 gives the identities rows in gate_up_proj that nothing ever reads. A checkpoint may hold them, as
    those that transformers writes do, or not.
    """

    family, name = "longcat_flash", "LongcatFlashExperts"
    params = ("gate_up_proj", "down_proj")

    def num_experts(self, module: nn.Module) -> int:
        return int(module.get_parameter("down_proj").shape[0])

    def places(self, module: Any) -> dict[str, Place]:
        return {**super().places(module), "gate_up_proj": Place("gate_up_proj", entries=int(module.total_experts))}

    def math(self, module: Any) -> ExpertMath:
        def activate(h: Tensor) -> Tensor:
            gate, up = h.chunk(2, dim=-1)  # [n, I] each
            out: Tensor = module.act_fn(gate) * up
            return out

        return GatedFFN(up="gate_up_proj", activate=activate)

    def forward(self, module: Any, rows: Rows) -> Callable[..., Any]:
        math = self.math(module)

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            ids = rows.routed(top_k_index)
            made = rows(math, hidden_states, ids)  # [T * k, H]
            identity = (ids >= module.num_routed_experts).view(-1, 1)
            made = torch.where(identity, hidden_states.repeat_interleave(ids.shape[1], dim=0), made)
            return accumulate(made * top_k_weights.reshape(-1, 1), ids, hidden_states.dtype)

        return forward

    def nobodys(self, module: Any) -> Sequence[int]:
        return range(module.num_routed_experts, module.total_experts)


class Step3p7(_Family):
    """Step3p7Experts: a registry module in all but the decorator, and with clamps."""

    family, name = "step3p7", "Step3p7Experts"
    params = ("gate_up_proj", "down_proj")

    def num_experts(self, module: nn.Module) -> int:
        return int(module.get_parameter("down_proj").shape[0])

    def math(self, module: Any) -> ExpertMath:
        return GatedFFN(up="gate_up_proj", activate=module._apply_gate)

    def forward(self, module: Any, rows: Rows) -> Callable[..., Any]:
        math = self.math(module)

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            ids = rows.routed(top_k_index)
            made = rows(math, hidden_states, ids)  # [T * k, H]
            return accumulate(made * top_k_weights.reshape(-1, 1), ids, hidden_states.dtype)

        return forward


class _ModuleDict(_Family):
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
            return F.linear(h, weights[f"{down}.weight"], weights.get(f"{down}.bias"))

        return math


class SwitchTransformers(_ModuleDict):
    """SwitchTransformersSparseMLP: one expert per token, and none once the expert's capacity is used up.

    The router's one-hot row of a dropped token is all zero: its id is -1 and its output zero, as in transformers. How
    many are dropped depends on the whole sequence, so a prediction is exact for the very sequence it is made from.
    """

    family, name = "switch_transformers", "SwitchTransformersSparseMLP"
    params = ("wi.weight", "wo.weight")

    def top_k(self, module: nn.Module) -> int:
        return 1

    def routing(self, module: Any) -> Routing:
        return Routing(module.router, lambda outputs: rerouted.ids_of_one_hot(outputs[0].flatten(0, -2)))

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
        return rerouted.one_hot(module.experts, choose)


class NllbMoe(_ModuleDict):
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
            routed, weights = rerouted.ids_of_mask(mask, probs)
            ids = rows.routed(routed)
            weighted = rows(math, hidden, ids) * weights.reshape(-1, 1)
            if kept < 1:
                weighted = weighted * kept
            return accumulate(weighted, ids, hidden.dtype).view(hidden_states.shape)

        return forward

    def reroute(self, module: Any, choose: Choose) -> RemovableHandle:
        return rerouted.mask_as_ids(module.experts, choose)


FAMILIES: tuple[ExpertsAdapter, ...] = (
    Llama4(),
    Dbrx(),
    JetMoe(),
    LongcatFlash(),
    Step3p7(),
    SwitchTransformers(),
    NllbMoe(),
)
