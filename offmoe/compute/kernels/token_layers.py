"""Decoder layers for one new token by one call of the C kernels.

Between two calls of C a layer's Python takes 0.1 to 0.3 ms, because the weights that pass in between evict its code and
data from the caches. Qwen3-30B's layers had six such calls each, a quarter of a token's time.

Moves: what the layers' attention, routers and experts move.
Bound: memory bandwidth.
Must never: read a weight that changed since it was prepared, or be called after the kernels were closed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from offmoe.compute.kernels.cpu import CpuKernels, PreparedExpert
from offmoe.compute.kernels.library import LayerStruct, PassageStruct, StatesStruct
from offmoe.compute.kernels.token_attention import RowNorm, TokenAttention
from offmoe.compute.kernels.token_router import TokenRouter
from offmoe.errors import CapacityError

MOST_EXPERTS = 15
"""Experts of a token. torch adds up to 15 rows one by one, as `combine` of layers.c does, and more in another order."""


class ExpertTable:
    """The experts of one layer as the kernels are given them; None stands for one that cannot be computed now."""

    def __init__(self, experts: Sequence[PreparedExpert | None]) -> None:
        self._alive = experts
        self._pointers = (ctypes.c_void_p * len(experts))(*[e.address if e is not None else None for e in experts])
        self.address = ctypes.addressof(self._pointers)


class LayerNorm(NamedTuple):
    """An RMS norm and its weight, bf16 [hidden]."""

    norm: RowNorm
    weight: torch.Tensor


class LayerParts(NamedTuple):
    """What one decoder layer consists of.

    norms: before attention, and before what follows it. router, experts: both None where kernels have no such block.
    """

    attention: TokenAttention
    norms: tuple[LayerNorm, LayerNorm]
    router: TokenRouter | None = None
    experts: ExpertTable | None = None


class States(NamedTuple):
    """Where a layer keeps keys and values.

    keys, values: bf16 [1, groups, room, width]; a group's rows are contiguous. tokens: rows in use, with the new one.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tokens: int


class Stop(NamedTuple):
    """A layer that was left before its experts.

    normed: the second norm, bf16 [1, 1, hidden]. ids int64 and scores [1, top_k]: of its router, if it has one.
    """

    normed: torch.Tensor
    ids: torch.Tensor | None
    scores: torch.Tensor | None


class Passage(NamedTuple):
    """A token's way through layers.

    outs: of each complete layer its output, bf16 [1, 1, hidden]; of one that was left, its input plus its attention.
    ids: of each complete layer, the experts that it chose. stop: the layer that was left, if one was; it is the last.
    """

    outs: Sequence[torch.Tensor]
    ids: Sequence[Sequence[int]]
    stop: Stop | None


class TokenLayers:
    """Calls for decoder layers of one model in a row; one thread at a time."""

    def __init__(self, kernels: CpuKernels, most_layers: int) -> None:
        """Nothing of a layer is kept between calls.

        Args:
            kernels: whose threads compute.
            most_layers: layers of a call.
        """
        self._kernels = kernels
        self._layers, self._precision = kernels.function("offmoe_layers"), kernels.precision
        self._structs, self._states = (LayerStruct * most_layers)(), (StatesStruct * most_layers)()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def __call__(
        self,
        layers: Sequence[LayerParts],
        states: Sequence[States],
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> Passage:
        """Compute layers one after the other, up to the first that is left before its experts.

        Args:
            layers: at least one.
            states: of each layer; the new key and value are written there.
            x: bf16 [1, 1, hidden], contiguous.
            cos, sin: bf16 [1, 1, rotary], contiguous.

        Raises:
            CapacityError: there is no memory.
        """
        hidden = x.shape[-1]
        for struct, parts in zip(self._structs, layers, strict=False):
            _fill(struct, parts, hidden)
        for place, (keys, values, tokens) in zip(self._states, states, strict=False):
            place.keys, place.values, place.tokens = keys.data_ptr(), values.data_ptr(), tokens
            place.key_step, place.value_step = keys.stride(1), values.stride(1)
        needed = self._kernels.layers_bytes(ctypes.addressof(self._structs), len(layers))
        if needed > len(self._memory):
            self._memory = torch.empty(needed, dtype=torch.uint8)
        outs = torch.empty((len(layers), 1, 1, hidden), dtype=torch.bfloat16)
        normed = torch.empty((1, 1, hidden), dtype=torch.bfloat16)
        ids = torch.empty((len(layers), MOST_EXPERTS), dtype=torch.int64)
        scores = torch.empty((len(layers), MOST_EXPERTS))  # or bf16 in the first half of each row
        passage = PassageStruct(
            x=x.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            memory=self._memory.data_ptr(),
            outs=outs.data_ptr(),
            normed=normed.data_ptr(),
            ids=ids.data_ptr(),
            scores=scores.data_ptr(),
            most=MOST_EXPERTS,
        )
        if self._layers(self._structs, self._states, len(layers), self._precision, ctypes.byref(passage)):
            raise CapacityError("no memory for the layers of one token; free some")
        done, stop = passage.done, None
        if done < len(layers):
            router = layers[done].router
            stop = Stop(normed, None, None)
            if router is not None:
                top_k, kind = router.selection.top_k, router.selection.scores
                stop = Stop(normed, ids[done : done + 1, :top_k], scores[done : done + 1].view(kind)[:, :top_k])
        routed = [
            row[: parts.router.selection.top_k] if parts.router is not None else ()
            for row, parts in zip(ids[:done].tolist(), layers, strict=False)
        ]
        return Passage(outs.unbind()[: done + (stop is not None)], routed, stop)


def _fill(struct: LayerStruct, parts: LayerParts, hidden: int) -> None:
    attention, norms, router, experts = parts
    assert attention.hidden == hidden
    assert router is None or router.selection.top_k <= MOST_EXPERTS
    assert (router is None) == (experts is None)
    struct.attention, struct.hidden = attention.address, hidden
    struct.router = None if router is None else router.address
    struct.experts = None if experts is None else experts.address
    for i, (norm, weight) in enumerate(norms):
        struct.norms[i], struct.kinds[i], struct.eps[i] = weight.data_ptr(), norm.kind, norm.eps
