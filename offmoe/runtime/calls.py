"""What callers hand to the executor, and what it asks of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from offmoe.compute.expert_layer import ExpertLayer
from offmoe.device.backend import Backend
from offmoe.storage.layout import ExpertLayout

Slots = tuple[Sequence[ExpertLayout], Sequence[ExpertLayout]]
"""The layouts of the device's slots, and of scratch slots in RAM."""


class Predictor(Protocol):
    """Predicts the experts of a layer before its router runs."""

    def predict(self, layer: int) -> torch.Tensor | None:
        """Expert ids int64 [T, p] that `layer` will probably want in this step; None if unknown."""


class RouterPredictor(Predictor, Protocol):
    """Predicts with the layers' own norms and routers, from the residuals before them."""

    @property
    def watches(self) -> bool:
        """Whether it is still finding out how to predict."""

    def path(self, layer: int) -> tuple[nn.Module | None, nn.Module] | None:
        """The norm and the router that predict `layer`; None if nothing predicts it."""

    def foresee(self, layer: int, ids: torch.Tensor) -> None:
        """Take what these modules gave for the latest residual, int64 [T, p]."""


class Tap:
    """Takes the residual before one MoE layer's experts: as a hook on the module that it enters, or by a call."""

    def __init__(self, layer: int, keep: Callable[[int, torch.Tensor], None]) -> None:
        self._layer, self._keep = layer, keep

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self.take(next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)))

    def take(self, residual: torch.Tensor) -> None:
        """residual: [..., H]."""
        self._keep(self._layer, residual)


class Done(NamedTuple):
    """An access of one token that was carried out already: a layer, its experts, and those predicted for the next."""

    layer: int
    experts: Sequence[int]
    predicted: Sequence[int]


class LayerCall(NamedTuple):
    """What one caller asks of a layer: rows to compute, where they go, and what the next layer will probably want.

    layer: the caller's. hidden: [T, H], or [T * k, H] an input for each (token, expert) pair. ids: int [T, k], as
    routed. predicted: int [T, p], or None.
    """

    layer: ExpertLayer
    hidden: torch.Tensor
    ids: torch.Tensor
    predicted: torch.Tensor | None


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all parts. A single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def to_host(calls: Sequence[LayerCall], backend: Backend) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids [T, k] of all callers on the host, and predictions [T, p] if all of them have some."""
    if len(calls) == 1 and calls[0].predicted is None:
        return backend.to_host([calls[0].ids])[0], None
    ids, known = joined([call.ids for call in calls]), [c.predicted for c in calls if c.predicted is not None]
    if len(known) < len(calls):
        return backend.to_host([ids])[0], None
    host_ids, predicted = backend.to_host([ids, joined(known)])
    return host_ids, predicted
