"""A recorded routing in place of the routers' own: what drives models of random weights like trained ones.

What moves: the ids of a step, from a trace in RAM to the device, once per layer. The routers still run and weight what
the experts give back; only which experts are asked is the recording's. It drives offmoe and stock transformers in the
same way. Results are then no model's: say so wherever they are shown.

Must never change a module for good: `detach` leaves no trace of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from offmoe.errors import ConfigError
from offmoe.hf.adapters.find import require_adapter
from offmoe.hf.load.attach import Removable, reroute
from offmoe.trace.trace import NONE, Trace
from offmoe.types import CacheShape


class _Layer:
    """One MoE layer, and the rows of the trace that its tokens get in turn; `rows` are those of its latest tokens."""

    def __init__(self, rows: torch.Tensor):
        self.all = rows
        self.seek(0)

    def seek(self, row: int) -> None:
        self._next = row % len(self.all)
        self.rows = self.all[:0]

    def step(self, tokens: int) -> torch.Tensor:
        self.rows = self.all[torch.arange(self._next, self._next + tokens) % len(self.all)]
        self._next = (self._next + tokens) % len(self.all)
        return self.rows


class ReplayedRouting:
    """Ids of consecutive rows of a trace for consecutive tokens; after the last row comes the first again.

    Every layer counts the tokens that come to it, so an encoder's and a decoder's are counted apart; where they ran in
    steps of their own when the trace was recorded, each part gets the rows of its own. A model with more MoE layers
    than the trace has takes its layers in turn. Also a `Predictor`, of what the trace's run had predicted.
    """

    def __init__(self, trace: Trace, shape: CacheShape):
        """shape: of the model. ConfigError where the trace does not fit it."""
        for layer, (experts, top_k) in enumerate(zip(shape.experts, shape.top_k, strict=True)):
            there = layer % trace.shape.layers
            if (trace.shape.experts[there], trace.shape.top_k[there]) != (experts, top_k):
                raise ConfigError(
                    f"the trace's layer {there} has {trace.shape.experts[there]} experts, top_k "
                    f"{trace.shape.top_k[there]}; the model's MoE layer {layer} has {experts}, top_k {top_k}. Replay a "
                    "trace of a model with as many."
                )
        self._layers = trace.shape.layers
        self._top_k = shape.top_k
        if not trace.tokens:
            raise ConfigError("the trace has no token; record another.")
        self._ids = torch.from_numpy(trace.experts.astype("int64"))  # [T, layers, k]
        self._predicted = None if trace.predicted is None else torch.from_numpy(trace.predicted.astype("int64"))
        rows = _rows(trace)
        self._steps = [_Layer(rows[layer % self._layers]) for layer in range(shape.layers)]
        self._attached: list[Removable] = []

    @property
    def predicts(self) -> bool:
        """Whether the recorded run predicted."""
        return self._predicted is not None

    def attach(self, experts: Sequence[nn.Module]) -> None:
        """Route these experts modules, MoE layer 0 first, from now on; ConfigError where tokens lack an expert."""
        nobodys = [tuple(require_adapter(module).nobodys(module)) for module in experts]
        for layer, nobody in enumerate(nobodys):
            ids = self._ids_at(layer, self._steps[layer].all)
            if not nobody and (ids < 0).any() and not (ids < 0).all():  # all: it is not called for text, say
                raise ConfigError(
                    f"the trace has tokens without all of their experts in layer {layer % self._layers}, and "
                    f"{type(experts[layer]).__name__} needs all of them; record another."
                )
        for layer, (module, nobody) in enumerate(zip(experts, nobodys, strict=True)):
            self._attached.append(reroute(module, partial(self._choose, layer, nobody)))

    def detach(self) -> None:
        """Let the routers route again."""
        for routing in self._attached:
            routing.remove()
        self._attached.clear()

    def seek(self, row: int) -> None:
        """The next token gets this row, of those that the trace has for the layer."""
        for layer in self._steps:
            layer.seek(row)

    def predict(self, layer: int) -> torch.Tensor | None:
        """Expert ids int64 [tokens, p] that the recorded run had predicted for `layer`; None if it had not."""
        there = layer % self._layers
        if self._predicted is None or there == 0:  # nothing comes before layer 0 that could predict it
            return None
        return self._predicted[self._steps[layer - 1].rows, there]

    def _choose(self, layer: int, nobodys: tuple[int, ...], ids: torch.Tensor) -> torch.Tensor:
        """Those of the trace in place of ids [T, k]."""
        chosen = self._ids_at(layer, self._steps[layer].step(len(ids)))
        if (chosen < 0).any():
            if not nobodys:
                raise ConfigError(f"the trace has no experts for MoE layer {layer}: record one of the same work.")
            # each its own: stock adds up a token's choices of one id at once, which in bf16 rounds otherwise
            number = (chosen < 0).cumsum(dim=1) - 1
            chosen = torch.where(chosen < 0, torch.tensor(nobodys)[number % len(nobodys)], chosen)
        return chosen.to(ids.device, ids.dtype)

    def _ids_at(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        return self._ids[rows, layer % self._layers, : self._top_k[layer]]  # [T, k]


def _rows(trace: Trace) -> list[torch.Tensor]:
    """Tokens that came to each layer of the trace: all, unless parts of the model ran in steps of their own.

    A layer begins a part if it ran in no step of the part before it.
    """
    _, step = np.unique(trace.step, return_inverse=True)  # [T], from 0
    ran = np.zeros((trace.shape.layers, int(step.max()) + 1), bool)  # [layers, steps]
    tokens, layers = np.nonzero((trace.experts != NONE).any(axis=2))
    ran[layers, step[tokens]] = True
    parts = [[0]]
    for layer in range(1, trace.shape.layers):
        before = ran[parts[-1]].any(axis=0)
        if before.any() and ran[layer].any() and not (before & ran[layer]).any():
            parts.append([])
        parts[-1].append(layer)
    if len(parts) == 1:  # a token may have been nobody's in all layers
        return [torch.arange(trace.tokens)] * trace.shape.layers
    return [torch.from_numpy(np.flatnonzero(ran[part][:, step].any(axis=0))) for part in parts for _ in part]
