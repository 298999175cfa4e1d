"""Architectures outside the registry whose experts are stacked: one parameter holds a weight of all experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from offmoe.compute.expert_layer import TokenOrder
from offmoe.compute.kernels.torch_ffn import ExpertMath, GatedFFN, accumulate
from offmoe.hf.adapters import reroute
from offmoe.hf.adapters.base import Activation, Experts, FamilyExperts, Place, Routing
from offmoe.hf.adapters.reroute import Choose


def _gated(activate: Activation) -> Activation:
    """The activation of a gate and an up projection that one product gives, [n, 2 * I] -> [n, I]."""

    def gated(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)  # [n, I] each
        return activate(gate) * up

    return gated


class Llama4(FamilyExperts):
    """Llama4TextMoe: the score scales an expert's input, not its output.

    transformers repeats every token for every expert, [E * T, H], and multiplies most of the rows by zero; here only
    routed rows exist. The two agree bit for bit for up to two experts per token (published models have one), because
    `ScaledInputFFN` pads an expert's few rows until a matrix product rounds them as it rounds stock's T rows.
    """

    family, name = "llama4", "Llama4TextMoe"
    params = ("experts.gate_up_proj", "experts.down_proj")

    def routing(self, module: Any) -> Routing:
        def ids(outputs: Sequence[Tensor]) -> Tensor:
            return outputs[1].topk(module.top_k, dim=1).indices  # of the logits [T, E], as the router chose them

        return Routing(module.router, ids)

    def math(self, module: Any) -> ExpertMath:
        return ScaledInputFFN(module.experts.act_fn)

    def forward(self, module: Any, experts: Experts, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden_states.reshape(-1, module.hidden_dim)  # [T, H]
        scores, logits = module.router(hidden)  # [T, E] twice
        ids = self.routing(module).ids((scores, logits))  # [T, k]
        scaled = hidden.unsqueeze(1) * scores.gather(1, ids).unsqueeze(2)  # [T, k, H]
        math = ScaledInputFFN(module.experts.act_fn, tokens=len(hidden))
        outputs = experts.with_math(math)(scaled.flatten(0, 1), experts.routed(ids))
        out = module.shared_expert(hidden)
        out.add_(outputs.view(scaled.shape).sum(dim=1))
        return out, logits

    def reroute(self, module: Any, choose: Choose) -> RemovableHandle:
        return reroute.scores(module.router, choose, self.routing(module).ids)


FULL_ROWS = 4
"""A float32 product of 4 rows, or a multiple of 4, gives every row the bits that it has among any larger number."""


@dataclass(frozen=True)
class ScaledInputFFN:
    """Llama 4's expert, with rows of zeros added so that a matrix product rounds as stock's product of all tokens.

    In float32 a row's last bits depend on the number of rows in the product. With torch 2.13 (MKL), one row rounds
    differently from two or more on Intel (Cascade Lake), and one to three rows differently from four or more on AMD
    (avx512_bf16). On one thread, larger numbers and a row's position make no difference. Two threads divide 5 to 11
    rows between them, so that one thread may get too few; multiples of four are safe. bf16 always rounds the same.
    """

    activate: Activation
    tokens: int = 1
    """Tokens of the step: the number of rows in stock's product."""

    def __call__(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        n = len(x)
        missing = self.tokens - n if self.tokens < FULL_ROWS else -n % FULL_ROWS
        if missing > 0:
            x = torch.cat([x, x.new_zeros(missing, x.shape[1])])
        gate, up = torch.mm(x, weights["experts.gate_up_proj"]).chunk(2, dim=-1)  # [n, I] each
        return torch.mm(up * self.activate(gate), weights["experts.down_proj"])[:n]


class Dbrx(FamilyExperts):
    """DbrxFFN: three weights per expert; all experts of a weight are merged into the first dimension, [E * I, H]."""

    family, name = "dbrx", "DbrxFFN"
    params = ("experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2")

    def num_experts(self, module: Any) -> int:
        return int(module.experts.num_experts)

    def shapes(self, module: Any) -> dict[str, tuple[int, ...]]:
        experts = module.experts
        return dict.fromkeys(self.params, (experts.ffn_hidden_size, experts.hidden_size))

    def routing(self, module: Any) -> Routing:
        return Routing(module.router, lambda outputs: module.route_tokens_to_experts(outputs[0])[1])

    def math(self, module: Any) -> ExpertMath:
        mlp = module.experts.mlp

        def math(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
            # DbrxExpertGLU.forward takes the weights as arguments
            w1, v1, w2 = (weights[name] for name in self.params)
            out: Tensor = mlp(x, w1, v1, w2)
            return out

        return math

    def forward(self, module: Any, experts: Experts, hidden_states: Tensor) -> Tensor:
        weights, routed = module.route_tokens_to_experts(module.router(hidden_states))  # [T, k] each
        ids = experts.routed(routed)
        outputs = experts(hidden_states.reshape(-1, hidden_states.shape[-1]), ids)
        return accumulate(outputs * weights.reshape(-1, 1), ids, hidden_states.dtype).view(hidden_states.shape)

    def reroute(self, module: Any, choose: Choose) -> RemovableHandle:
        return reroute.ids_argument(module.experts, choose)


class JetMoe(FamilyExperts):
    """JetMoeMoE, the experts of the feed-forward part.

    The mixture of attention heads (JetMoeMoA) stays on the device with the dense weights: its experts project the
    queries of every layer and are a small part of the model.
    """

    order = TokenOrder.SORTED_IDS
    family, name = "jetmoe", "JetMoeMoE"
    params = ("input_linear.weight", "output_linear.weight")

    def top_k(self, module: Any) -> int:
        return int(module.router.top_k)

    def routing(self, module: Any) -> Routing:
        def ids(outputs: Sequence[Tensor]) -> Tensor:
            return outputs[-1].topk(module.router.top_k, dim=1).indices  # of the logits [T, E], as the router chose

        return Routing(module.router, ids)

    def math(self, module: Any) -> ExpertMath:
        up, down = self.params
        return GatedFFN(up=up, activate=_gated(module.activation), down=down, autocasts=True)

    def forward(self, module: Any, experts: Experts, layer_input: Tensor) -> Tensor:
        hidden = layer_input.reshape(-1, layer_input.shape[-1])  # [T, H]
        logits = module.router(hidden)[-1]  # [T, E] float32
        chosen, routed = logits.topk(module.router.top_k, dim=1)  # [T, k]; the router itself gives them sorted
        weights = torch.softmax(chosen, dim=1).type_as(hidden)
        ids = experts.routed(routed)
        outputs = experts(hidden, ids)
        out = accumulate(outputs * weights.reshape(-1, 1), ids, hidden.dtype).view(layer_input.shape)
        return torch.add(out, module.bias)

    def reroute(self, module: Any, choose: Choose) -> RemovableHandle:
        return reroute.sorted_pairs(module.router, choose)


class LongcatFlash(FamilyExperts):
    """LongcatFlashExperts: ids above the last expert are identities, which return a token unchanged.

    transformers 5.23 gives the identities rows in gate_up_proj that nothing ever reads. A checkpoint that transformers
    wrote has these rows; others may lack them.
    """

    family, name = "longcat_flash", "LongcatFlashExperts"
    params = ("gate_up_proj", "down_proj")

    def places(self, module: Any) -> dict[str, Place]:
        return {**super().places(module), "gate_up_proj": Place("gate_up_proj", entries=int(module.total_experts))}

    def math(self, module: Any) -> ExpertMath:
        return GatedFFN(up="gate_up_proj", activate=_gated(module.act_fn), autocasts=True)

    def forward(
        self, module: Any, experts: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        ids = experts.routed(top_k_index)
        outputs = experts(hidden_states, ids)  # [T * k, H]
        identity = (ids >= module.num_routed_experts).view(-1, 1)
        weights = top_k_weights.reshape(-1, 1)
        same = hidden_states.repeat_interleave(ids.shape[1], dim=0)
        # Each is weighted before they are joined: under autocast they may differ in dtype and rounding.
        weighted = torch.where(identity, (same * weights).to(same.dtype), (outputs * weights).to(same.dtype))
        return accumulate(weighted, ids, same.dtype)

    def null_ids(self, module: Any) -> Sequence[int]:
        return range(module.num_routed_experts, module.total_experts)


class Step3p7(FamilyExperts):
    """Step3p7Experts: like a registry module, but without the decorator and with clamped activations."""

    family, name = "step3p7", "Step3p7Experts"
    params = ("gate_up_proj", "down_proj")

    def math(self, module: Any) -> ExpertMath:
        return GatedFFN(up="gate_up_proj", activate=module._apply_gate, autocasts=True)

    def forward(
        self, module: Any, experts: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        ids = experts.routed(top_k_index)
        outputs = experts(hidden_states, ids)  # [T * k, H]
        return accumulate(outputs * top_k_weights.reshape(-1, 1), ids, hidden_states.dtype)
