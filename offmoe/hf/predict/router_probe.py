"""Predict the experts of the next MoE layer: run its own norm and router on this layer's residual stream.

A residual changes little from one layer to the next, so the next router, asked a layer early, mostly names the experts
that it will name in earnest. A prediction costs one norm and one router, which on a GPU is bound by launch overhead.
`RouteRecorder` (route_recorder.py) finds norm and router of every layer. A layer whose router needs more than the
residual has no route and is never predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offmoe.runtime.calls import Tap

NOT_CALLED = "its experts were not called"
NO_ROUTER = "no module puts out its experts' ids"
PER_CALL = "its router takes arguments that differ from call to call"
OTHER_WIDTH = "the residual of the layer before is of another width"
AWAY = "its router's weights are on the device only while it runs"
NOT_PROVEN = "its router does not give the same ids from the residual alone"


@dataclass(frozen=True)
class Route:
    """How to compute one layer's expert ids from a residual: residual -> norm -> router -> ids."""

    norm: nn.Module | None
    """The norm before the router; None if the router takes the residual itself."""
    router: nn.Module
    """The module whose outputs hold the ids."""
    read: Callable[[Sequence[Tensor]], Tensor]
    """Takes the router's outputs, returns the ids [T, k]."""
    rows: bool
    """Whether the router wants [T, H]; else it wants [batch, length, H]."""
    extra: tuple[Tensor | None, ...]
    """Further positional arguments of the router: parameters and buffers of the model, or None."""
    extra_by_name: dict[str, Tensor | None]
    """Further keyword arguments of the router, as `extra`."""

    @property
    def is_resident(self) -> bool:
        """Whether the weights of norm and router are on the device now."""
        modules = (self.router,) if self.norm is None else (self.norm, self.router)
        return not any(param.is_meta for module in modules for param in module.parameters())

    def ids(self, residual: Tensor) -> Tensor:
        """Expert ids, int64 [T, k], from a residual [..., H]."""
        # .forward, not a call: the recorders that transformers hooks onto routers must not see a prediction
        hidden = residual if self.norm is None else self.norm.forward(residual)  # [..., H]
        hidden = hidden.reshape(-1, hidden.shape[-1]) if self.rows else hidden  # [T, H]
        outputs = self.router.forward(hidden, *self.extra, **self.extra_by_name)
        return self.read(list(tensors_in(outputs))).to(torch.int64)


class RouterProbe:
    """Predicts each MoE layer's experts from the residual of the layer before it."""

    def __init__(
        self, routes: Sequence[Route | None], taps: Sequence[nn.Module | None], reasons: Sequence[str | None]
    ) -> None:
        self.routes = tuple(routes)
        """The route of each MoE layer; None where the layer cannot be predicted."""
        self.taps = tuple(taps)
        """The module of each MoE layer whose input is the layer's residual: its norm or its router."""
        self.reasons = tuple(reasons)
        """Why each MoE layer cannot be predicted; None where it can."""

    def can_predict(self, layer: int) -> bool:
        """Whether `predict` works for MoE layer `layer`."""
        return self.routes[layer] is not None

    @torch.no_grad()
    def predict(self, layer: int, residual: Tensor) -> Tensor:
        """Expert ids that the router of `layer` gives for a residual.

        Args:
            layer: MoE layer, counted from 0; `can_predict(layer)` must be true.
            residual: [..., H], the layer's own residual or, to predict, that of the layer before.

        Returns:
            int64 [T, k].
        """
        route = self.routes[layer]
        assert route is not None, f"layer {layer} cannot be predicted"
        return route.ids(residual)

    def install(self, keep: Callable[[int, Tensor], None]) -> list[RemovableHandle]:
        """Hook the model so that it calls keep(layer, residual [..., H]) before each layer's experts run.

        Returns:
            The handles that remove the hooks.
        """

        return [
            module.register_forward_pre_hook(Tap(layer, keep), with_kwargs=True)
            for layer, module in enumerate(self.taps)
            if module is not None
        ]


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested outputs or arguments, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
