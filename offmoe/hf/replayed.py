"""A recorded routing in place of the routers' own: what drives models of random weights like trained ones.

What moves: the ids of a step, from a trace in RAM to the device, once per layer. The routers still run and weight what
the experts give back; only which experts are asked is the recording's. It enters by a pre-hook on the experts modules
(torch's own), so that it drives offmoe and stock transformers in the same way. Results are then no model's: say so
wherever they are shown.

Must never change a module for good: `detach` leaves no trace of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offmoe.errors import ConfigError
from offmoe.trace import NONE, Trace
from offmoe.types import CacheShape


class ReplayedRouting:
    """Ids of consecutive rows of a trace for consecutive tokens; after the last row comes the first again.

    A model with more MoE layers than the trace has takes its layers in turn. Also a `Predictor`, of what the trace's
    run had predicted.
    """

    def __init__(self, trace: Trace, shape: CacheShape, *, dropped: bool = False):
        """shape: of the model. dropped: rows may name no expert; offmoe skips them, stock implementations do not.

        ConfigError where the trace does not fit the model.
        """
        for layer, (experts, top_k) in enumerate(zip(shape.experts, shape.top_k, strict=True)):
            there = layer % trace.shape.layers
            if (trace.shape.experts[there], trace.shape.top_k[there]) != (experts, top_k):
                raise ConfigError(
                    f"the trace's layer {there} has {trace.shape.experts[there]} experts, top_k "
                    f"{trace.shape.top_k[there]}; the model's MoE layer {layer} has {experts}, top_k {top_k}. Replay a "
                    "trace of a model with as many."
                )
        if not trace.tokens or (not dropped and (trace.experts == NONE).any()):
            raise ConfigError("the trace has no token, or tokens without all of their experts; record another.")
        self._layers = trace.shape.layers
        self._top_k = shape.top_k
        self._ids = torch.from_numpy(trace.experts.astype("int64"))  # [T, layers, k]
        self._predicted = None if trace.predicted is None else torch.from_numpy(trace.predicted.astype("int64"))
        self._next = 0
        self._rows = torch.zeros(0, dtype=torch.int64)  # of the step under way
        self._hooks: list[RemovableHandle] = []

    @property
    def predicts(self) -> bool:
        """Whether the recorded run predicted."""
        return self._predicted is not None

    def attach(self, experts: Sequence[nn.Module]) -> None:
        """Route these experts modules, MoE layer 0 first, from now on."""
        for layer, module in enumerate(experts):
            self._hooks.append(module.register_forward_pre_hook(partial(self._route, layer), with_kwargs=True))

    def detach(self) -> None:
        """Let the routers route again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def seek(self, row: int) -> None:
        """The next token gets this row of the trace."""
        self._next = row % len(self._ids)

    def predict(self, layer: int) -> torch.Tensor | None:
        """Expert ids int64 [tokens, p] that the recorded run had predicted for `layer`; None if it had not."""
        there = layer % self._layers
        if self._predicted is None or there == 0:  # nothing comes before layer 0 that could predict it
            return None
        return self._predicted[self._rows, there].to(self._ids.device)

    def _route(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise ConfigError(f"the routing of {type(module).__name__} cannot be replayed: it is given no expert ids.")
        if layer == 0:
            self._rows = torch.arange(self._next, self._next + len(ids)) % len(self._ids)
            self._next = (self._next + len(ids)) % len(self._ids)
        chosen = self._ids[self._rows, layer % self._layers, : self._top_k[layer]].to(ids.device, ids.dtype)  # [T, k]
        if "top_k_index" in kwargs:
            return args, {**kwargs, "top_k_index": chosen}
        return (args[0], chosen, *args[2:]), kwargs
