"""Architectures outside the registry whose experts are stacked: one parameter holds a weight of all of them.

family.py says what such a class does and must never do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offmoe.compute.kernels import ExpertMath, GatedFFN, accumulate
from offmoe.hf.adapters import reroute
from offmoe.hf.adapters.base import Place, Routing, Rows
from offmoe.hf.adapters.families.family import Activation, Family
from offmoe.hf.adapters.reroute import Choose


class Llama4(Family):
    """Llama4TextMoe: inputs are scaled by the score, outputs are not.

    transformers repeats every token for every expert and multiplies most of them by zero, [E * T, H]; here only routed
    rows exist. The two agree bit for bit (up to two experts per token; published models have one) if the few rows of an
    expert take the way through a matrix product that stock's T rows take: `ScaledInputFFN` sees to that.
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

        def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            hidden = hidden_states.reshape(-1, module.hidden_dim)  # [T, H]
            scores, logits = module.router(hidden)  # [T, E] twice
            ids = ids_of((scores, logits))  # [T, k]
            scaled = hidden.unsqueeze(1) * scores.gather(1, ids).unsqueeze(2)  # [T, k, H]
            math = ScaledInputFFN(module.experts.act_fn, tokens=len(hidden))
            made = rows(math, scaled.flatten(0, 1), rows.routed(ids))
            out = module.shared_expert(hidden)
            out.add_(made.view(scaled.shape).sum(dim=1))
            return out, logits

        return forward

    def reroute(self, module: Any, choose: Choose) -> RemovableHandle:
        return reroute.scores(module.router, choose, self.routing(module).ids)


FULL_ROWS = 4
"""Of so many rows, or a multiple, a float32 product gives every row the bits that it has among any larger number."""


@dataclass(frozen=True)
class ScaledInputFFN:
    """Llama 4's expert. tokens: of the step, which are the rows of stock's products; zeros are added to take their way.

    In float32 a row's last bits depend on how many rows a product has. With torch 2.13 (MKL) a single row is otherwise
    than two or more on Intel (Cascade Lake), and one to three are otherwise than four or more on AMD (avx512_bf16);
    beyond that neither their number nor a row's place matters on one thread. Two threads share the rows of 5 to 11
    between them, and some are again among too few; not those of a multiple of four. bf16 has one way for all.
    """

    activate: Activation
    tokens: int = 1

    def __call__(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        n = len(x)
        missing = self.tokens - n if self.tokens < FULL_ROWS else -n % FULL_ROWS
        if missing > 0:
            x = torch.cat([x, x.new_zeros(missing, x.shape[1])])
        gate, up = torch.mm(x, weights["experts.gate_up_proj"]).chunk(2, dim=-1)  # [n, I] each
        return torch.mm(up * self.activate(gate), weights["experts.down_proj"])[:n]


class Dbrx(Family):
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
        return reroute.ids_argument(module.experts, choose)


class JetMoe(Family):
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
        return GatedFFN(up=up, activate=activate, down=down, autocasts=True)

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
        return reroute.sorted_pairs(module.router, choose)


class LongcatFlash(Family):
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

        return GatedFFN(up="gate_up_proj", activate=activate, autocasts=True)

    def forward(self, module: Any, rows: Rows) -> Callable[..., Any]:
        math = self.math(module)

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            ids = rows.routed(top_k_index)
            made = rows(math, hidden_states, ids)  # [T * k, H]
            identity = (ids >= module.num_routed_experts).view(-1, 1)
            weights = top_k_weights.reshape(-1, 1)
            same = hidden_states.repeat_interleave(ids.shape[1], dim=0)
            # Weighted one by one: under autocast they may have two dtypes, and each is rounded in its own.
            weighted = torch.where(identity, (same * weights).to(same.dtype), (made * weights).to(same.dtype))
            return accumulate(weighted, ids, same.dtype)

        return forward

    def nobodys(self, module: Any) -> Sequence[int]:
        return range(module.num_routed_experts, module.total_experts)


class Step3p7(Family):
    """Step3p7Experts: a registry module in all but the decorator, and with clamps."""

    family, name = "step3p7", "Step3p7Experts"
    params = ("gate_up_proj", "down_proj")

    def num_experts(self, module: nn.Module) -> int:
        return int(module.get_parameter("down_proj").shape[0])

    def math(self, module: Any) -> ExpertMath:
        return GatedFFN(up="gate_up_proj", activate=module._apply_gate, autocasts=True)

    def forward(self, module: Any, rows: Rows) -> Callable[..., Any]:
        math = self.math(module)

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            ids = rows.routed(top_k_index)
            made = rows(math, hidden_states, ids)  # [T * k, H]
            return accumulate(made * top_k_weights.reshape(-1, 1), ids, hidden_states.dtype)

        return forward
