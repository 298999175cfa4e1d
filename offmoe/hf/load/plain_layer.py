"""A decoder layer as the C kernels take it, if they compute its attention, its norms and perhaps its experts.

Which layers these are is decided by their code, not by their family: it is that of one of the layers in
`upstream.plain_layers`, and what follows the second norm is a router and its experts if its code is that of one of the
blocks in `upstream.plain_blocks`.

Must never: describe a layer that a hook of others watches, or one with a weight that has changed unseen.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import DynamicCache

from offmoe.compute.kernels.token_attention import TokenAttention
from offmoe.compute.kernels.token_layers import MOST_EXPERTS, LayerNorm, LayerParts, States, Stop
from offmoe.compute.kernels.token_router import TokenRouter
from offmoe.hf.load.attach import ATTRIBUTE, AttachedExperts
from offmoe.hf.load.class_code import code_of
from offmoe.hf.load.kernel_norms import NormForward
from offmoe.hf.load.kernel_routers import RouterForward
from offmoe.hf.load.own_forward import Onlooker, StockForward, has_hooks
from offmoe.hf.load.roomy_cache import RoomyLayer
from offmoe.hf.load.token_attention import TokenForward
from offmoe.hf.load.unchanged import Place, Unchanged
from offmoe.hf.upstream import plain_blocks, plain_layers
from offmoe.runtime.calls import Tap
from offmoe.runtime.executor import ExpertExecutor

PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
"""What plain layers consist of."""


class ReadyLayer(NamedTuple):
    """A layer for one call.

    parts, states: as the call takes them. cache: where the layer keeps its keys and values. tap: takes the residual
    before the second norm, for predictions.
    """

    parts: LayerParts
    states: States
    cache: RoomyLayer
    tap: Tap | None


class _Found(NamedTuple):
    """What a layer consists of, as long as its modules are `unchanged`.

    number: of the layer in a cache. forward: the attention module's. router, experts: None where the block is another
    one. tap: as ReadyLayer's.
    """

    unchanged: Unchanged
    number: int
    forward: TokenForward
    attention: TokenAttention
    norms: tuple[LayerNorm, LayerNorm]
    router: TokenRouter | None
    experts: AttachedExperts | None
    tap: Tap | None


class PlainLayer:
    """One decoder layer that is a norm, attention, a norm and a block, with two residuals."""

    def __init__(self, module: nn.Module, executor: ExpertExecutor) -> None:
        self.own, self._executor = StockForward(module), executor
        block = self.block
        self._block = weakref.ref(block)
        self._has_plain_block = code_of(type(block).forward) in _codes(plain_blocks())
        self._found: _Found | None = None

    @property
    def block(self) -> nn.Module:
        """What follows the second norm."""
        return cast("nn.Module", self.own.module._modules["mlp"])

    @property
    def has_window(self) -> bool:
        """Whether the layer's attention may have a mask that others have not."""
        return getattr(self.own.module._modules["self_attn"], "sliding_window", None) is not None

    def ready(self, x: torch.Tensor, options: Mapping[str, Any], first: ReadyLayer | None = None) -> ReadyLayer | None:
        """The layer for a call; None if its own code computes it.

        Args:
            x: an input of the layer's kind, [1, 1, hidden].
            options: arguments of the layer, by name.
            first: the first layer of the call, which has looked at both already.
        """
        found = self._found
        is_found = found is not None and not (torch.is_grad_enabled() or self.own.module.training)
        if found is None or not is_found or not found.unchanged.holds():
            found = self._find(x, options)
            is_whole = found is not None and (found.experts is not None or not self._has_plain_block)
            self._found = found if is_whole else None  # who hooked the router may take the hook away again
        elif first is None and found.forward.prepared(x, options) is not found.attention:
            return None
        if found is None:
            return None
        _, number, _, attention, norms, router, experts, tap = found
        if first is not None and attention.rotary != first.parts.attention.rotary:
            return None
        cache = _grows(options.get("past_key_values"), number)
        room = None if cache is None else cache.claim(*attention.like_states)
        if cache is None or room is None:
            return None
        table = None
        if experts is not None:
            layers = self._executor.planner.layers
            table = self._executor.resident.table(experts.layer, layers[experts.layer.index])
        parts = LayerParts(attention, norms, None if table is None else router, table)
        return ReadyLayer(parts, States(*room, cache.get_seq_length() + 1), cache, tap)

    def _find(self, x: torch.Tensor, options: Mapping[str, Any]) -> _Found | None:
        module: Any = self.own.module
        parts: list[Any] = [module._modules[name] for name in PARTS]
        attention, block, *norms = parts
        if module.training or block is not self._block() or has_hooks(module, besides=Onlooker):
            return None
        if any(map(has_hooks, parts[:-1])) or has_hooks(parts[-1], besides=Tap):
            return None
        forward = vars(attention).get("forward")
        if not isinstance(forward, TokenForward) or not forward.is_compared:
            return None
        prepared, (first, second) = forward.prepared(x, options), (_norm(norm, x) for norm in norms)
        if prepared is None or first is None or second is None:
            return None
        router, experts = self._routed(x) or (None, None)
        read = [*parts, *attention.children()]
        places: list[Place] = [(vars(attention.config), "_attn_implementation_internal")]
        if experts is not None:
            read += self.block.children()
            places += [(vars(self.block._modules["experts"]), ATTRIBUTE), (vars(experts), "choose")]
        unchanged = Unchanged(module, read, places)
        return _Found(
            unchanged, attention.layer_idx, forward, prepared, (first, second), router, experts, _tap(norms[1])
        )

    def _routed(self, x: torch.Tensor) -> tuple[TokenRouter, AttachedExperts] | None:
        """Router and experts, if the block has nothing else and the kernels compute them."""
        block = self.block
        gate, experts = (block._modules.get(name) for name in ("gate", "experts"))
        if not self._has_plain_block or gate is None or experts is None or "forward" in vars(block):
            return None
        attached: AttachedExperts | None = vars(experts).get(ATTRIBUTE)
        if attached is None or attached.choose is not None or "forward" in vars(experts):
            return None
        forward = vars(gate).get("forward")
        if not isinstance(forward, RouterForward) or has_hooks(gate) or has_hooks(experts):
            return None
        router = forward.prepared(x.view(1, -1))
        return None if router is None or router.selection.top_k > MOST_EXPERTS else (router, attached)

    @property
    def chooses(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The second norm and the router, which make experts' ids of a residual."""
        return self.own.module._modules[PARTS[3]], self.block._modules.get("gate")

    @property
    def moe_layer(self) -> int:
        """The layer's number among those with experts."""
        experts: AttachedExperts = vars(self.block._modules["experts"])[ATTRIBUTE]
        return experts.layer.index

    def after(self, stop: Stop, attended: torch.Tensor) -> torch.Tensor:
        """The output of a layer that a call left before its experts. attended: its input plus its attention."""
        block: Any = self.block
        if stop.ids is None:
            out = block(stop.normed)
        else:
            out = block.experts(stop.normed.view(1, -1), stop.ids, stop.scores).view(attended.shape)
        return attended + out  # type: ignore[no-any-return]


def is_plain_layer(module: nn.Module) -> bool:
    """Whether a module is a decoder layer of known code, with the parts that it names, and nobody has changed it."""
    has_parts = all(module._modules.get(name) is not None for name in PARTS)
    return has_parts and "forward" not in vars(module) and code_of(type(module).forward) in _codes(plain_layers())


def _tap(norm: nn.Module) -> Tap | None:
    """Who takes the input of a norm for predictions."""
    return next((hook for hook in norm._forward_pre_hooks.values() if isinstance(hook, Tap)), None)


def _codes(classes: tuple[type[nn.Module], ...]) -> set[str]:
    return {code for cls in classes if (code := code_of(cls.forward)) is not None}


def _grows(cache: object, index: int) -> RoomyLayer | None:
    """Where a cache keeps a layer's keys and values, if it grows in place."""
    layers: list[Any] = cache.layers if type(cache) is DynamicCache else []
    return layers[index] if index < len(layers) and type(layers[index]) is RoomyLayer else None


def _norm(module: nn.Module, x: torch.Tensor) -> LayerNorm | None:
    """A norm for an input; None if its own code computes it."""
    forward = vars(module).get("forward")
    if not isinstance(forward, NormForward):
        return None
    weight = forward.prepared(x)
    return None if weight is None else LayerNorm(forward.norm, weight)
