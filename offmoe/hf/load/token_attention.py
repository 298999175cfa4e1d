"""Attention of one new token by two calls of the C kernels, on a CPU (`exactness="numeric"`).

Which modules compute plain attention is decided by their code, not by their family: it is that of one of the modules in
`PLAIN_ATTENTION`, and what it does for a token is written once, in C. The first tokens are computed both ways. If the
results differ by more than rounding, modules of that kind stay as they are.

Moves: the weights of the projections, and the layer's keys and values, once.
Bound: memory bandwidth.
Must never: take a call whose result the module's own code would make of anything but its input, its weights, the cache
and the position.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from offmoe.compute.dense_linear import DenseKernels
from offmoe.compute.kernels.token_attention import (
    MAX_ROTARY,
    HeadNorms,
    Projections,
    TokenAttention,
)
from offmoe.errors import CLOSED, OffmoeError
from offmoe.hf.load.class_code import code_of
from offmoe.hf.load.grouped_attention import IMPLEMENTATION, NOT_PLAIN, STOCK
from offmoe.hf.load.kernel_linears import LinearForward
from offmoe.hf.load.kernel_norms import KnownNorm, weight_of
from offmoe.hf.load.own_forward import OwnForward, StockForward, has_hooks, is_plain
from offmoe.hf.upstream import attention_name, plain_attention

logger = logging.getLogger(__name__)

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
ROTATIONS = ("apply_rotary_pos_emb", "rotate_half")
"""Functions that modules of transformers rotate heads with. Those of one name differ between families."""
COMPARED = 2
"""Tokens that modules of one kind compute both ways."""
TOLERANCE = 0.05
"""Largest relative difference (L2) of keys, values and outputs. Rounding in bf16 makes 0.4 %, int8 activations of the
output's projection 1 to 2 %; another rotation makes 100 %."""


class Part(NamedTuple):
    """A module of an attention module, as it was when its weight was prepared."""

    module: nn.Module
    forward: object
    weight: torch.Tensor
    address: int

    @classmethod
    def of(cls, module: nn.Module) -> Part:
        weight = module._parameters["weight"]
        assert weight is not None
        return cls(module, module.__dict__.get("forward"), weight, _address(weight))

    def is_unchanged(self, module: nn.Module | None) -> bool:
        return (
            module is self.module
            and module.__dict__.get("forward") is self.forward
            and module._parameters["weight"] is self.weight
            and _address(self.weight) == self.address
            and not has_hooks(module)
        )


@dataclass
class Trial:
    """How the calls of modules of one kind compare with their own code so far."""

    left: int = COMPARED
    differs: bool = False


class OwnStates:
    """The cache as a module's own code sees it once the calls have put their key and value there: with its own ones."""

    def __init__(self, states: tuple[torch.Tensor, torch.Tensor]) -> None:
        """states: keys and values of all tokens, [1, groups, T, width]; they are not changed."""
        self._states = states
        self.own: tuple[torch.Tensor, torch.Tensor] | None = None
        """The key and the value that the module's code made."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        self.own = keys, values
        return tuple(torch.cat([s[:, :, :-1], new], 2) for s, new in zip(self._states, self.own, strict=True))


class TokenForward(OwnForward):
    """The `forward` of one attention module."""

    def __init__(
        self, module: nn.Module, owner: DenseKernels, weights: Projections, norms: HeadNorms | None, trial: Trial
    ) -> None:
        self._stock, self._owner, self._trial = StockForward(module), owner, trial
        self._weights, self._norms = weights, norms
        self._parts = {name: Part.of(child) for name, child in module.named_children()}
        self._attention: TokenAttention | None = None

    def __call__(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        module: Any = self._stock.module
        attention = None if arguments else self.prepared(hidden_states, options)
        if attention is None:
            return self._stock(hidden_states, *arguments, **options)
        heads = self._owner.run(attention.heads, hidden_states, *options["position_embeddings"])
        if heads is None:  # the kernels were closed
            return self._stock(hidden_states, **options)
        cache, states = options.get("past_key_values"), (heads.key, heads.value)
        if cache is not None:
            states = cache.update(*states, module.layer_idx)
        out = self._attended(attention, heads.queries, *states)
        if self._trial.left and states[0].shape[2] > 1:  # a first token is not rotated, so it shows nothing
            out = self._compared(out, states, hidden_states, options)
        return out, None

    @property
    def is_compared(self) -> bool:
        """Whether the calls have been compared with the module's own code, and give the same."""
        return not self._trial.left and not self._trial.differs

    def prepared(self, x: torch.Tensor, options: Mapping[str, Any]) -> TokenAttention | None:
        """The calls for an input, with options as the module takes them; None if its own code computes it."""
        module: Any = self._stock.module
        angles = options.get("position_embeddings")
        if (
            self._trial.differs
            or x.shape[:-1] != (1, 1)
            or angles is None
            or options.get("attention_mask") is not None
            or options.get("output_attentions")
            or any(options.get(name) is not None for name in NOT_PLAIN)
            or module.training
            or attention_name(module.config) not in (STOCK, IMPLEMENTATION)
            or not is_plain(x)
            or any(not part.is_unchanged(module._modules.get(name)) for name, part in self._parts.items())
        ):
            return None
        cos, sin = angles
        if not (cos.dtype is sin.dtype is torch.bfloat16 and cos.is_contiguous() and sin.is_contiguous()):
            return None
        rotary = cos.shape[-1]
        if self._attention is None:
            if rotary % 2 or rotary > min(module.head_dim, MAX_ROTARY):
                return None
            self._attention = TokenAttention(
                self._owner.kernels,
                self._weights,
                width=module.head_dim,
                rotary=rotary,
                scale=float(module.scaling),
                norms=self._norms,
            )
        attention = self._attention
        fits = x.shape[-1] == attention.hidden and cos.numel() == sin.numel() == rotary == attention.rotary
        return attention if fits else None

    def _attended(
        self, attention: TokenAttention, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        keys, values = (_in_rows(states.to(torch.bfloat16)) for states in (keys, values))
        out = self._owner.run(attention.attend, queries, keys, values)
        if out is None:
            raise OffmoeError(CLOSED)
        return out

    def _compared(
        self,
        out: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor],
        x: torch.Tensor,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """The output of the calls, if the module's own code gives the same; else its own, and the calls are given up.

        The output of a token is the same whether it was compared or not.

        Args:
            out: the output of the calls.
            states: keys and values of all tokens, as the cache holds them.
            x: the input.
            options: of the module's code.
        """
        cache = OwnStates(states)
        own: torch.Tensor = self._stock(x, **{**options, "past_key_values": cache})[0]
        assert cache.own is not None, "code that was read before updates its cache"
        self._trial.left -= 1
        pairs = [*((held[:, :, -1:], new) for held, new in zip(states, cache.own, strict=True)), (out, own)]
        if all(_is_close(found, wanted) for found, wanted in pairs):
            return out
        self._trial.differs = True
        for held, new in zip(states, cache.own, strict=True):
            held[:, :, -1:] = new
        logger.warning(
            "%s is computed by transformers' code: the C kernels' attention differs from it, which costs speed "
            "alone. Please report it with the model's config.json",
            type(self._stock.module).__name__,
        )
        return own


def _in_rows(states: torch.Tensor) -> torch.Tensor:
    """[1, groups, T, width] whose groups are contiguous each."""
    width = states.shape[-1]
    return states if states.stride()[2:] == (width, 1) else states.contiguous()


def _address(weight: torch.Tensor) -> int:
    return 0 if weight.is_meta else weight.data_ptr()


def _is_close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    difference, size = (found.float() - wanted.float()).norm(), wanted.float().norm()
    return bool(difference <= TOLERANCE * size)


def attach_token_attention(model: nn.Module, owner: DenseKernels, norms: Mapping[nn.Module, KnownNorm]) -> int:
    """Let the kernels compute plain attention of single tokens.

    Args:
        model: a loaded model on the CPU whose linear layers the kernels compute.
        owner: these kernels.
        norms: the model's RMS norms that kernels compute.

    Returns:
        The number of modules.
    """
    trials: dict[object, Trial] = {}
    count = 0
    for module in model.modules():
        weights = _projections(module)
        if weights is None or not _is_plain_code(type(module)):
            continue
        children = module._modules
        of_heads = None
        if len(children) > len(LINEARS):
            q, k = (children[name] for name in NORMS)
            assert q is not None and k is not None  # noqa: PT018
            if q not in norms or k not in norms or norms[q] != norms[k]:
                continue
            kind, eps = norms[q]
            of_heads = HeadNorms(weight_of(q), weight_of(k), eps, kind)
            if {len(of_heads.q), len(of_heads.k)} != {module.head_dim}:
                continue
        shape = tuple((weight.struct.rows, weight.struct.cols) for weight in weights)
        trial = trials.setdefault((type(module), module.head_dim, module.scaling, shape), Trial())
        object.__setattr__(module, "forward", TokenForward(module, owner, weights, of_heads, trial))
        count += 1
    return count


def _projections(module: nn.Module) -> Projections | None:
    """The prepared weights of a module that has what plain attention needs, and nothing else."""
    children = module._modules
    if children.keys() not in ({*LINEARS}, {*LINEARS, *NORMS}) or module._parameters or module._buffers:
        return None
    forwards = [vars(children[name]).get("forward") for name in LINEARS]
    linears = [forward for forward in forwards if isinstance(forward, LinearForward)]
    if len(linears) < len(LINEARS) or "forward" in vars(module):
        return None
    weights = Projections(*[forward.prepared for forward in linears])
    width = getattr(module, "head_dim", None)
    if not isinstance(width, int) or not isinstance(getattr(module, "scaling", None), float):
        return None
    return weights if weights.fit(width) else None


def _is_plain_code(cls: type[nn.Module]) -> bool:
    """Whether a class computes what one of the known modules computes, by its code and that of its rotation."""
    found = _codes(cls)
    return None not in found and found in [_codes(known) for known in plain_attention()]


def _codes(cls: type[nn.Module]) -> list[str | None]:
    """The code of a class's `forward` and of the functions of its module that rotate heads."""
    names = cls.forward.__globals__
    return [code_of(function) for function in (cls.forward, *(names.get(name) for name in ROTATIONS))]
