"""Drive a model by a recorded routing, so that random weights ask for experts as trained ones do.

Works on offmoe and on stock transformers alike. The routers still run, and their weights scale the experts' outputs;
only the expert ids come from the trace, copied to the device once per layer and step. The outputs then belong to no
real model, and wherever they are shown that must be said. `detach` removes the hooks without a trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import nn

from offmoe.errors import ConfigError
from offmoe.hf.adapters.find import require_adapter
from offmoe.hf.load.attach import reroute
from offmoe.trace.trace import NONE, Trace
from offmoe.types import CacheShape


class _Layer:
    """Walks through the trace's rows for one MoE layer, one row per token."""

    def __init__(self, rows: torch.Tensor):
        self.all = rows
        self.seek(0)

    def seek(self, row: int) -> None:
        self._next = row % len(self.all)
        self.rows = self.all[:0]
        """The rows of the latest step."""

    def step(self, tokens: int) -> torch.Tensor:
        self.rows = self.all[torch.arange(self._next, self._next + tokens) % len(self.all)]
        self._next = (self._next + tokens) % len(self.all)
        return self.rows


class ReplayedRouting:
    """Gives consecutive tokens the expert ids of consecutive rows of a trace, and starts over after the last row.

    Every layer counts its own tokens, so those of an encoder and of a decoder are counted apart. If these ran in steps
    of their own when the trace was recorded, each gets the rows of its own steps. If the model has more MoE layers than
    the trace, the trace's layers repeat. The object is also a `Predictor` that repeats the recorded predictions.
    """

    def __init__(self, trace: Trace, shape: CacheShape):
        """Prepare to replay `trace` on a model of this `shape`.

        Raises:
            ConfigError: the trace has no token, or a layer's number of experts or top_k differs from the model's.
        """
        for layer, (experts, top_k) in enumerate(zip(shape.experts, shape.top_k, strict=True)):
            recorded = layer % trace.shape.layers
            if (trace.shape.experts[recorded], trace.shape.top_k[recorded]) != (experts, top_k):
                raise ConfigError(
                    f"the trace's layer {recorded} has {trace.shape.experts[recorded]} experts, top_k "
                    f"{trace.shape.top_k[recorded]}; the model's MoE layer {layer} has {experts}, top_k {top_k}. "
                    "Replay a trace of a model with as many."
                )
        self._layers = trace.shape.layers
        self._top_k = shape.top_k
        if not trace.tokens:
            raise ConfigError("the trace has no token; record another.")
        self._ids = torch.from_numpy(trace.experts.astype("int64"))  # [T, layers, k]
        self._predicted = None if trace.predicted is None else torch.from_numpy(trace.predicted.astype("int64"))
        rows = _rows(trace)
        self._steps = [_Layer(rows[layer % self._layers]) for layer in range(shape.layers)]
        self._attached = ExitStack()

    def attach(self, experts: Sequence[nn.Module]) -> None:
        """Route these experts modules by the trace from now on.

        Args:
            experts: the model's experts modules by MoE layer.

        Raises:
            ConfigError: recorded tokens lack an expert, and the module needs one for every choice.
        """
        null_ids = [tuple(require_adapter(module).null_ids(module)) for module in experts]
        for layer, nulls in enumerate(null_ids):
            ids = self._ids_at(layer, self._steps[layer].all)
            # a layer without any recorded expert is, say, one for images, which text does not call
            if not nulls and (ids < 0).any() and not (ids < 0).all():
                raise ConfigError(
                    f"the trace has tokens without all of their experts in layer {layer % self._layers}, and "
                    f"{type(experts[layer]).__name__} needs all of them; record another."
                )
        for layer, (module, nulls) in enumerate(zip(experts, null_ids, strict=True)):
            self._attached.callback(reroute(module, partial(self._choose, layer, nulls)))

    def detach(self) -> None:
        """Let the routers route again."""
        self._attached.close()

    def seek(self, row: int) -> None:
        """Give the next token row `row` of the rows that the trace has for each layer."""
        for layer in self._steps:
            layer.seek(row)

    def predict(self, layer: int) -> torch.Tensor | None:
        """The recorded prediction for MoE layer `layer`: expert ids, int64 [T, p]; None if there is none."""
        recorded = layer % self._layers
        if self._predicted is None or recorded == 0:  # no layer runs before layer 0 and could predict it
            return None
        return self._predicted[self._steps[layer - 1].rows, recorded]

    def _choose(self, layer: int, null_ids: tuple[int, ...], ids: torch.Tensor) -> torch.Tensor:
        """The trace's ids in place of the router's `ids` [T, k]."""
        chosen = self._ids_at(layer, self._steps[layer].step(len(ids)))
        if (chosen < 0).any():
            if not null_ids:
                raise ConfigError(f"the trace has no experts for MoE layer {layer}: record one of the same work.")
            # a different null id for each choice: stock sums a token's choices of one id at once, which rounds
            # differently in bf16
            number = (chosen < 0).cumsum(dim=1) - 1
            chosen = torch.where(chosen < 0, torch.tensor(null_ids)[number % len(null_ids)], chosen)
        return chosen.to(ids.device, ids.dtype)

    def _ids_at(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        return self._ids[rows, layer % self._layers, : self._top_k[layer]]  # [T, k]


def _rows(trace: Trace) -> list[torch.Tensor]:
    """For each layer of the trace, the rows of the tokens that reached it.

    These are all rows, unless parts of the model (encoder, decoder) ran in steps of their own. A layer begins a new
    part if it ran in no step of the part before it.
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
    if len(parts) == 1:  # also where a token has no expert in any layer
        return [torch.arange(trace.tokens)] * trace.shape.layers
    return [torch.from_numpy(np.flatnonzero(ran[part][:, step].any(axis=0))) for part in parts for _ in part]
