"""Predicts the experts of the next layer while a model runs.

One forward pass is watched. Afterwards the next layer's router is asked early.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from offmoe.hf.predict.route_recorder import RouteRecorder
from offmoe.hf.predict.router_probe import RouterProbe


class NextLayerPredictor:
    """Predicts the experts of a layer from the residual of the layer before it, once one forward pass was watched.

    The encoder and the decoder of a model (`parts`) are watched one after the other. Neither predicts for the other.
    """

    def __init__(self, model: nn.Module, experts: Sequence[nn.Module], parts: Sequence[nn.Module]):
        inside = [set(part.modules()) for part in parts]
        part_of = [next((i for i, modules in enumerate(inside) if module in modules), -1) for module in experts]
        self._starts = {i for i in range(1, len(part_of)) if part_of[i] != part_of[i - 1]}
        self._recorder: RouteRecorder | None = RouteRecorder(model, experts)
        self._probe: RouterProbe | None = None
        self._residuals: dict[int, torch.Tensor] = {}  # only the latest: the residuals of a long prompt are large
        self._foreseen: dict[int, torch.Tensor] = {}  # for the same layer, if it is known

    @property
    def watches(self) -> bool:
        """Whether no pass was watched to its end yet."""
        return self._recorder is not None

    def begin(self) -> None:
        """A forward pass begins."""
        if self._recorder is not None:
            self._recorder.start()

    def end(self, complete: bool) -> None:
        """A forward pass ends. complete: whether the last part of the model has run to its end."""
        self._forget()
        if self._recorder is not None:
            self._recorder.pause()
            if complete:
                self._probe, self._recorder = self._recorder.finish(), None
                self._probe.install(self._keep)

    def _keep(self, layer: int, residual: torch.Tensor) -> None:
        self._forget()
        self._residuals[layer] = residual

    def _forget(self) -> None:
        self._residuals.clear()
        self._foreseen.clear()

    def path(self, layer: int) -> tuple[nn.Module | None, nn.Module] | None:
        """The norm and the router that predict `layer`; None if nothing predicts it."""
        route = None if self._probe is None or layer in self._starts else self._probe.routes[layer]
        return None if route is None else (route.norm, route.router)

    def foresee(self, layer: int, ids: torch.Tensor) -> None:
        """Take what these modules gave for the latest residual, int64 [tokens, p], in place of asking them."""
        self._foreseen[layer] = ids

    def predict(self, layer: int) -> torch.Tensor | None:
        """Expert ids [tokens, p] of `layer`, from the residual before the MoE block of `layer - 1`."""
        residual, foreseen = self._residuals.get(layer - 1), self._foreseen.get(layer)
        if foreseen is not None or residual is None or self._probe is None or self.path(layer) is None:
            return foreseen
        return self._probe.predict(layer, residual)
