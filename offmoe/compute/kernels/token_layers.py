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

    def __init__(self, experts: int) -> None:
        """All of them are None."""
        self._experts: list[PreparedExpert | None] = [None] * experts
        self._pointers = (ctypes.c_void_p * experts)()
        self.address = ctypes.addressof(self._pointers)

    def put(self, number: int, expert: PreparedExpert | None) -> None:
        """Let an expert stand at a number. No call may be under way."""
        self._pointers[number] = None if expert is None else expert.address
        self._experts[number] = expert

    @property
    def is_empty(self) -> bool:
        """Whether none can be computed."""
        return not any(self._pointers)


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
    predicted: int64 [1, top_k] of the layer behind it, if that was asked. misses: whether an expert was not there that
    it chose, or predicted and that matters; it was left for something else otherwise.
    """

    normed: torch.Tensor
    ids: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    predicted: torch.Tensor | None = None
    misses: bool = False


class Passage(NamedTuple):
    """A token's way through layers.

    outs: of each complete layer its output, bf16 [1, 1, hidden]; of one that was left, its input plus its attention.
    ids: of each complete layer, the experts that it chose. predicted: of each, those that it predicted for the layer
    behind it, if it predicts. stop: the layer that was left, if one was; it is the last.
    """

    outs: Sequence[torch.Tensor]
    ids: Sequence[Sequence[int]]
    predicted: Sequence[Sequence[int]]
    stop: Stop | None


class _Found(NamedTuple):
    """Where a call writes what it finds. The rows of ids and scores have room for MOST_EXPERTS.

    outs: bf16 [layers, 1, 1, hidden]. normed: bf16 [1, 1, hidden]. ids, predicted: int64 [layers, MOST_EXPERTS].
    scores: float32 [layers, MOST_EXPERTS], or bf16 in the first half of each row.
    """

    outs: torch.Tensor
    normed: torch.Tensor
    ids: torch.Tensor
    predicted: torch.Tensor
    scores: torch.Tensor

    @classmethod
    def empty(cls, layers: int, hidden: int) -> _Found:
        outs = torch.empty((layers, 1, 1, hidden), dtype=torch.bfloat16)
        ids, predicted = torch.empty((2, layers, MOST_EXPERTS), dtype=torch.int64)
        scores = torch.empty((layers, MOST_EXPERTS))
        return cls(outs, torch.empty((1, 1, hidden), dtype=torch.bfloat16), ids, predicted, scores)

    def stop(self, router: TokenRouter | None, number: int, asked: int, misses: bool) -> Stop:
        """A layer of this number that was left. asked: experts that it predicted."""
        if router is None:
            return Stop(self.normed)
        row, (top_k, kind) = slice(number, number + 1), (router.selection.top_k, router.selection.scores)
        predicted = self.predicted[row, :asked] if asked else None
        return Stop(self.normed, self.ids[row, :top_k], self.scores[row].view(kind)[:, :top_k], predicted, misses)

    def passage(self, chosen: Sequence[int], asked: Sequence[int], stop: Stop | None, done: int) -> Passage:
        """All of it. chosen, asked: of each layer, experts that it chooses and predicts. done: complete layers."""
        ids, predicted = (
            [row[:count] for row, count in zip(rows[:done].tolist(), counts, strict=False)]
            for rows, counts in ((self.ids, chosen), (self.predicted, asked))
        )
        return Passage(self.outs.unbind()[: done + (stop is not None)], ids, predicted, stop)


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
        predict: Sequence[int | None] = (),
    ) -> Passage:
        """Compute layers one after the other, up to the first that is left before its experts.

        Args:
            layers: at least one.
            states: of each layer; the new key and value are written there.
            x: bf16 [1, 1, hidden], contiguous.
            cos, sin: bf16 [1, 1, rotary], contiguous.
            predict: of each layer, None, or the second norm and the router of the layer behind it name experts before
                its own are computed; bit i says whether it is left if the i-th of them is not there. Without a layer
                behind it, it is left if any would matter. Default: all None.

        Raises:
            CapacityError: there is no memory.
        """
        hidden = x.shape[-1]
        predict = predict or [None] * len(layers)
        for struct, parts, predicts in zip(self._structs, layers, predict, strict=False):
            _fill(struct, parts, predicts, hidden)
        for place, (keys, values, tokens) in zip(self._states, states, strict=False):
            place.keys, place.values, place.tokens = keys.data_ptr(), values.data_ptr(), tokens
            place.key_step, place.value_step = keys.stride(1), values.stride(1)
        needed = self._kernels.layers_bytes(ctypes.addressof(self._structs), len(layers))
        if needed > len(self._memory):
            self._memory = torch.empty(needed, dtype=torch.uint8)
        found = _Found.empty(len(layers), hidden)
        passage = PassageStruct(
            x=x.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            memory=self._memory.data_ptr(),
            outs=found.outs.data_ptr(),
            normed=found.normed.data_ptr(),
            ids=found.ids.data_ptr(),
            predicted=found.predicted.data_ptr(),
            scores=found.scores.data_ptr(),
            most=MOST_EXPERTS,
        )
        if self._layers(self._structs, self._states, len(layers), self._precision, ctypes.byref(passage)):
            raise CapacityError("no memory for the layers of one token; free some")
        behind = [*layers[1:], None]
        asked = [0 if matter is None else _top_k(parts) for parts, matter in zip(behind, predict, strict=True)]
        stop = None
        if passage.done < len(layers):
            stop = found.stop(layers[passage.done].router, passage.done, asked[passage.done], passage.misses > 0)
        return found.passage([_top_k(parts) for parts in layers], asked, stop, passage.done)


def _top_k(parts: LayerParts | None) -> int:
    """Experts that a layer's router chooses, if it has one."""
    return 0 if parts is None or parts.router is None else parts.router.selection.top_k


def _fill(struct: LayerStruct, parts: LayerParts, predicts: int | None, hidden: int) -> None:
    attention, norms, router, experts = parts
    assert attention.hidden == hidden
    assert router is None or router.selection.top_k <= MOST_EXPERTS
    assert (router is None) == (experts is None)
    struct.attention, struct.hidden = attention.address, hidden
    struct.predicts = -1 if predicts is None else predicts
    struct.router = None if router is None else router.address
    struct.experts = None if experts is None else experts.address
    for i, (norm, weight) in enumerate(norms):
        struct.norms[i], struct.kinds[i], struct.eps[i] = weight.data_ptr(), norm.kind, norm.eps
