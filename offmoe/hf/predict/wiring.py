"""Which modules predict a layer's experts from the residual stream, found by watching one real forward.

Nothing moves at discovery: for every module call of one forward it is noted in which memory its input and outputs
stood, and forgotten at the next experts call. Weak references stand in for tensors and their storage, so a long prompt
costs no memory, and memory that is given back and taken again is told apart. No names are used:

    top_k_index of the experts call   -- same memory -->  the module that put it out             = router
                                                          (or the module that the adapter says)
    input of the router               -- same memory -->  the childless module that put it out   = norm
    input of the norm                                                                            = residual stream

Before it is trusted, router(norm(residual)) is run on the spot and must give the very ids that the experts got.
At run time a prediction costs one norm and one router of the device's time; bounded by launch overhead.

What it must never do: keep an activation after `finish()`, change what the model computes, or predict with a router
that needs more than the residual (arguments that differ per call).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from offmoe.hf.adapters.base import Routing, ids_as_they_are
from offmoe.hf.adapters.find import adapter_of


class Place(NamedTuple):
    """Enough to recognize a tensor, or a view of the whole of it, also after it is gone: no address is used twice."""

    storage: StorageWeakRef
    offset: int
    numel: int
    dtype: torch.dtype


NOT_CALLED = "its experts were not called"
NO_ROUTER = "no module puts out its experts' ids"
PER_CALL = "its router takes arguments that differ from call to call"
OTHER_WIDTH = "the residual of the layer before is of another width"
AWAY = "its router's weights are on the device only while it runs"
NOT_PROVEN = "its router does not give the same ids from the residual alone"


@dataclass(frozen=True)
class Route:
    """How one layer's ids come from a residual. norm None: the router takes the residual itself.

    read: the router's outputs -> the ids. rows: the router wants [tokens, hidden], not [batch, length, hidden]. extra,
    extra_by_name: its further arguments, parameters or buffers of the model.
    """

    norm: nn.Module | None
    router: nn.Module
    read: Callable[[Sequence[Tensor]], Tensor]
    rows: bool
    extra: tuple[Tensor | None, ...]
    extra_by_name: dict[str, Tensor | None]

    @property
    def stays(self) -> bool:
        """Whether its weights are there now."""
        modules = (self.router,) if self.norm is None else (self.norm, self.router)
        return not any(param.is_meta for module in modules for param in module.parameters())

    def ids(self, residual: Tensor) -> Tensor:
        """residual [..., hidden] -> int64 [tokens, top_k]."""
        # .forward: the recorders that transformers hooks onto routers must not see a prediction
        hidden = residual if self.norm is None else self.norm.forward(residual)
        hidden = hidden.reshape(-1, hidden.shape[-1]) if self.rows else hidden
        out = self.router.forward(hidden, *self.extra, **self.extra_by_name)
        return self.read(list(_tensors(out))).to(torch.int64)


class RouterWiring:
    """For each MoE layer, what predicts its experts from the residual of the layer before.

    `routes[l]` is None where no prediction is possible, and `reasons[l]` says why; `taps[l]` is the module whose input
    is layer l's residual.
    """

    def __init__(
        self, routes: Sequence[Route | None], taps: Sequence[nn.Module | None], reasons: Sequence[str | None]
    ) -> None:
        self.routes = tuple(routes)
        self.taps = tuple(taps)
        self.reasons = tuple(reasons)

    @classmethod
    def discover(cls, model: nn.Module, experts: Sequence[nn.Module], run: Callable[[], object]) -> RouterWiring:
        """Watch `run()`, which must run one forward of `model`; experts: its experts modules by MoE layer."""
        recorder = WiringRecorder(model, experts)
        recorder.start()
        try:
            run()
        finally:
            wiring = recorder.finish()
        return wiring

    def can_predict(self, layer: int) -> bool:
        """Whether `predict` works for this layer."""
        return self.routes[layer] is not None

    @torch.no_grad()
    def predict(self, layer: int, residual: Tensor) -> Tensor:
        """Experts that `layer` will want if its residual is like this one, [..., hidden] -> int64 [tokens, top_k]."""
        route = self.routes[layer]
        assert route is not None, f"layer {layer} cannot be predicted"
        return route.ids(residual)

    def install(self, keep: Callable[[int, Tensor], None]) -> list[RemovableHandle]:
        """Call keep(layer, residual [..., hidden]) whenever a layer's residual is there, before its experts run."""

        def tap(layer: int) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
            def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
                keep(layer, next(_tensors((args, kwargs))))

            return hook

        return [
            module.register_forward_pre_hook(tap(layer), with_kwargs=True)
            for layer, module in enumerate(self.taps)
            if module is not None
        ]


class _PerCall:
    """Stands in for an argument that is not the model's own and may differ at the next call."""


_PER_CALL = _PerCall()


@dataclass(frozen=True)
class _Call:
    """One module call, without holding on to anything it computed."""

    module: nn.Module
    source: Place | None
    dims: int
    width: int
    held: weakref.ref[Tensor] | None
    outputs: tuple[Place, ...]
    made: tuple[weakref.ref[Tensor], ...]
    extra: tuple[Tensor | _PerCall | None, ...]
    extra_by_name: dict[str, Tensor | _PerCall | None]


class WiringRecorder:
    """Discovery inside a forward that happens anyway: `start()` before it, `finish()` after it, also when it failed.

    prove: try every route on the spot; without it a route is only what the architecture looks like.
    """

    def __init__(self, model: nn.Module, experts: Sequence[nn.Module], *, prove: bool = True) -> None:
        self._prove = prove
        self._modules = [
            module for module in model.modules() if module is not model
        ]  # its own hooks call start and finish
        self._layer_of = {module: layer for layer, module in enumerate(experts)}
        self._routing = [_routing_of(module) for module in experts]
        self._routed_by = {r.router: (layer, r) for layer, r in enumerate(self._routing) if r and r.router is not None}
        self._constants: dict[int, Tensor | _PerCall] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._routes: list[Route | None] = [None] * len(experts)
        self._taps: list[nn.Module | None] = [None] * len(experts)
        self._widths = [0] * len(experts)
        self._reasons: list[str | None] = [NOT_CALLED] * len(experts)
        self._unseen = set(range(len(experts)))
        self._calls: list[_Call] = []
        self._handles: list[RemovableHandle] = []
        self._trying = False

    def start(self) -> None:
        """Hook all modules."""
        assert not self._handles, "already started"
        for module in self._modules:
            if module in self._layer_of:
                self._handles.append(module.register_forward_pre_hook(self._on_experts, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._on_call, with_kwargs=True))

    def pause(self) -> None:
        """Remove all hooks until the next `start`: a model may run in parts."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()

    def finish(self) -> RouterWiring:
        """Remove all hooks and return what was found.

        A layer that was not called cannot be predicted, nor one whose router has no weights between passes, nor one
        whose residual is of another width than that of the layer before.
        """
        self.pause()
        routes, reasons = list(self._routes), list(self._reasons)
        for layer, route in enumerate(routes):
            before = self._widths[layer - 1] if layer else 0
            if route is not None and before not in (0, self._widths[layer]):
                routes[layer], reasons[layer] = None, OTHER_WIDTH
            elif route is not None and self._prove and not route.stays:
                routes[layer], reasons[layer] = None, AWAY
        return RouterWiring(routes, self._taps, reasons)

    def _on_call(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        if self._trying or not self._unseen:
            return
        named = list(kwargs.items())
        given: list[object] = [*args, *(value for _, value in named)]
        at = next((i for i, v in enumerate(given) if isinstance(v, Tensor) and id(v) not in self._constants), None)
        hidden = None if at is None else given[at]
        assert hidden is None or isinstance(hidden, Tensor)
        # what stands after the hidden state is an argument to repeat; anything before it makes the call unrepeatable
        repeatable = at == 0 or (not args and at is not None)
        self._calls.append(
            _Call(
                module=module,
                source=None if hidden is None else _place(hidden),
                dims=0 if hidden is None else hidden.dim(),
                width=0 if hidden is None or not hidden.dim() else hidden.shape[-1],
                held=None if hidden is None else weakref.ref(hidden),
                outputs=tuple(_place(t) for t in _tensors(output)),
                made=tuple(weakref.ref(t) for t in _tensors(output)),
                extra=tuple(map(self._constant, args[1:])) if repeatable else (_PER_CALL,),
                extra_by_name={name: self._constant(v) for i, (name, v) in enumerate(named, len(args)) if i != at},
            )
        )
        if module in self._routed_by:
            layer, routing = self._routed_by[module]
            calls, self._calls = self._calls, []
            if layer in self._unseen:
                self._unseen.remove(layer)
                self._settle(layer, calls, routing.ids, routing.ids(list(_tensors(output))))

    def _constant(self, value: object) -> Tensor | _PerCall | None:
        """A parameter, a buffer or None as it is; anything else is per call."""
        return None if value is None else self._constants.get(id(value), _PER_CALL)

    def _on_experts(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        layer = self._layer_of[module]
        routing = self._routing[layer]
        if routing is not None and routing.router is not None:  # inside this module, and to come
            return
        calls, self._calls = self._calls, []
        if layer not in self._unseen:
            return
        self._unseen.remove(layer)
        self._reasons[layer] = NO_ROUTER if routing is not None else PER_CALL
        if routing is None:
            return
        given = next((t for t in _tensors((args, kwargs)) if not t.is_floating_point() and t.dtype != torch.bool), None)
        if given is None:
            return
        place, read = _place(given), routing.ids
        # the first to put it out is the innermost: callers that pass it on complete later
        at = next((i for i, call in enumerate(calls) if place in call.outputs), None)
        if at is None:
            return
        index = calls[at].outputs.index(place)
        self._settle(layer, calls[: at + 1], lambda outputs: read(outputs[index : index + 1]), read([given]))

    def _settle(self, layer: int, calls: list[_Call], read: Callable[[Sequence[Tensor]], Tensor], ids: Tensor) -> None:
        """Try the route of a layer through its router, the last of `calls`, which gave it `ids`."""
        router = calls[-1]
        norm = _producer(calls[:-1], router)
        first = norm or router
        self._taps[layer], self._widths[layer] = first.module, first.width
        route = _route(norm, router, read)
        residual = None if first.held is None else first.held()
        if route is None:
            self._reasons[layer] = PER_CALL
            return
        if not self._prove:
            proven = True
        elif residual is not None:
            proven = self._reproduces(route, residual, ids)
        else:  # the model has dropped it; then the norm's output must live, or the router's input may be other memory
            normed = None if norm is None else norm.made[0]()
            proven = normed is not None and self._reproduces(replace(route, norm=None), normed, ids)
        self._reasons[layer] = None if proven else NOT_PROVEN
        if proven:
            self._routes[layer] = route

    def _reproduces(self, route: Route, residual: Tensor, ids: Tensor) -> bool:
        self._trying = True
        try:
            with torch.no_grad():
                found = route.ids(residual)
        except (RuntimeError, TypeError, ValueError, IndexError):  # it needs something that this route does not give it
            return False
        finally:
            self._trying = False
        return torch.equal(found, ids.to(torch.int64))


def _routing_of(module: nn.Module) -> Routing | None:
    adapter = adapter_of(module)
    return Routing(None, ids_as_they_are) if adapter is None else adapter.routing(module)


def _producer(calls: Sequence[_Call], router: _Call) -> _Call | None:
    """The childless module that put out what the router reads; one that passes its input on (dropout) is not it."""
    for call in reversed(calls):
        leaf = next(call.module.children(), None) is None
        if leaf and router.source is not None and router.source in call.outputs and call.source is not None:
            if call.source[:2] == router.source[:2]:
                continue
            if call.outputs == (router.source,) and call.source.numel == router.source.numel:
                return call
    return None


def _route(norm: _Call | None, router: _Call, read: Callable[[Sequence[Tensor]], Tensor]) -> Route | None:
    """The route through these two calls, if the residual and the model's own tensors are all they need."""
    if norm is not None and any(value is not None for value in (*norm.extra, *norm.extra_by_name.values())):
        return None
    extra = [v for v in router.extra if not isinstance(v, _PerCall)]
    by_name = {name: v for name, v in router.extra_by_name.items() if not isinstance(v, _PerCall)}
    if len(extra) < len(router.extra) or len(by_name) < len(router.extra_by_name):
        return None
    return Route(None if norm is None else norm.module, router.module, read, router.dims == 2, tuple(extra), by_name)


def _place(tensor: Tensor) -> Place:
    return Place(StorageWeakRef(tensor.untyped_storage()), int(tensor.storage_offset()), tensor.numel(), tensor.dtype)


def _tensors(value: object) -> Iterator[Tensor]:
    """Tensors in (nested) outputs or arguments, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
