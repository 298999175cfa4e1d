"""Find how each layer's router is fed, by watching one real forward pass of the model. No module names are used.

For every module call the recorder notes in which memory the input and the outputs stood. It forgets the notes at the
next experts call. It holds weak references only, so a long prompt costs no memory, and memory that was freed and taken
again is not mistaken for the same tensor. It reads each layer backward:

    ids that the experts get  -- same memory -->  the module that put them out (or that the adapter names)  = router
    input of the router       -- same memory -->  the childless module that put it out                      = norm
    input of the norm                                                                                        = residual

Before a route is trusted, router(norm(residual)) is run on the spot and must give the very ids that the experts got.
The recorder keeps no activation after `finish()` and does not change what the model computes.

`unpredictable_reasons` watches a pass on the meta device instead, before any weight is loaded. The pass computes shapes
only and takes tenths of a second; the experts do nothing in it. It shows how each router is fed, and proves no route.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from offmoe.hf.adapters.base import Routing, ids_as_they_are
from offmoe.hf.adapters.find import adapter_of
from offmoe.hf.predict.router_probe import (
    AWAY,
    NO_ROUTER,
    NOT_CALLED,
    NOT_PROVEN,
    OTHER_WIDTH,
    PER_CALL,
    Route,
    RouterProbe,
    tensors_in,
)

NUM_TOKENS = 4
"""Length of the prompt without values. More than one, so that a batch of tokens cannot be taken for a single token."""


class Memory(NamedTuple):
    """Where a tensor stands. Recognizes the tensor, or a view of all of it, even after both are freed.

    storage is a weak reference, which is never equal to that of a later storage at the same address.
    """

    storage: StorageWeakRef
    offset: int
    numel: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Memory:
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(storage, int(tensor.storage_offset()), tensor.numel(), tensor.dtype)


class _PerCall:
    """Stands for an argument that is not the model's own and may differ at the next call."""


_PER_CALL = _PerCall()


@dataclass(frozen=True)
class _Call:
    """One module call. hidden is its first tensor argument that is no weight of the model."""

    module: nn.Module
    source: Memory | None
    """Where `hidden` stands."""
    dims: int
    """Dimensions of `hidden`."""
    width: int
    """Size of the last dimension of `hidden`."""
    hidden: weakref.ref[Tensor] | None
    memories: tuple[Memory, ...]
    """Where the outputs stand."""
    outputs: tuple[weakref.ref[Tensor], ...]
    extra: tuple[Tensor | _PerCall | None, ...]
    extra_by_name: dict[str, Tensor | _PerCall | None]


class RouteRecorder:
    """Watches one forward pass that happens anyway.

    Call `start()` before the forward pass and `finish()` after it, also if it failed.
    """

    def __init__(self, model: nn.Module, experts: Sequence[nn.Module], *, prove: bool = True) -> None:
        """Prepare to watch `model`; no hook is set yet.

        Args:
            experts: the model's experts modules by MoE layer.
            prove: run every route once and compare ids. Without it, a route says only how the router is fed.
        """
        self._prove = prove
        # without the model itself: its own hooks call start and finish
        self._modules = [module for module in model.modules() if module is not model]
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
        self._proving = False

    def start(self) -> None:
        """Hook all modules."""
        assert not self._handles, "already started"
        for module in self._modules:
            if module in self._layer_of:
                self._handles.append(module.register_forward_pre_hook(self._on_experts, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._on_call, with_kwargs=True))

    def pause(self) -> None:
        """Remove all hooks until the next `start`. An encoder and a decoder run one after the other."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()

    def finish(self) -> RouterProbe:
        """Remove all hooks and return the routes that were found.

        A layer gets no route if it was not called, if its router's weights are not on the device between passes, or if
        its residual has another width than that of the layer before.
        """
        self.pause()
        routes, reasons = list(self._routes), list(self._reasons)
        for layer, route in enumerate(routes):
            before = self._widths[layer - 1] if layer else 0
            if route is not None and before not in (0, self._widths[layer]):
                routes[layer], reasons[layer] = None, OTHER_WIDTH
            elif route is not None and self._prove and not route.is_resident:
                routes[layer], reasons[layer] = None, AWAY
        return RouterProbe(routes, self._taps, reasons)

    def _on_call(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        if self._proving or not self._unseen:
            return
        self._calls.append(self._noted(module, args, kwargs, output))
        if module in self._routed_by:
            layer, routing = self._routed_by[module]
            calls, self._calls = self._calls, []
            if layer in self._unseen:
                self._unseen.remove(layer)
                self._settle(layer, calls, routing.ids, routing.ids(list(tensors_in(output))))

    def _noted(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> _Call:
        named = list(kwargs.items())
        values: list[object] = [*args, *(value for _, value in named)]
        at = next((i for i, v in enumerate(values) if isinstance(v, Tensor) and id(v) not in self._constants), None)
        hidden = None if at is None else values[at]
        assert hidden is None or isinstance(hidden, Tensor)
        # an argument after the hidden state can be repeated; one before it makes the call unrepeatable
        repeatable = at == 0 or (not args and at is not None)
        return _Call(
            module=module,
            source=None if hidden is None else Memory.of(hidden),
            dims=0 if hidden is None else hidden.dim(),
            width=0 if hidden is None or not hidden.dim() else hidden.shape[-1],
            hidden=None if hidden is None else weakref.ref(hidden),
            memories=tuple(Memory.of(t) for t in tensors_in(output)),
            outputs=tuple(weakref.ref(t) for t in tensors_in(output)),
            extra=tuple(map(self._constant, args[1:])) if repeatable else (_PER_CALL,),
            extra_by_name={name: self._constant(v) for i, (name, v) in enumerate(named, len(args)) if i != at},
        )

    def _constant(self, value: object) -> Tensor | _PerCall | None:
        """A parameter, a buffer or None as it is; anything else may differ per call."""
        return None if value is None else self._constants.get(id(value), _PER_CALL)

    def _on_experts(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        layer = self._layer_of[module]
        routing = self._routing[layer]
        if routing is not None and routing.router is not None:  # the router is inside this module and has yet to run
            return
        calls, self._calls = self._calls, []
        if layer not in self._unseen:
            return
        self._unseen.remove(layer)
        self._reasons[layer] = NO_ROUTER if routing is not None else PER_CALL
        if routing is None:
            return
        tensors = tensors_in((args, kwargs))
        ids = next((t for t in tensors if not t.is_floating_point() and t.dtype != torch.bool), None)
        if ids is None:
            return
        memory, read = Memory.of(ids), routing.ids
        # the first to put the ids out is the innermost: callers that pass them on complete later
        at = next((i for i, call in enumerate(calls) if memory in call.memories), None)
        if at is None:
            return
        index = calls[at].memories.index(memory)
        self._settle(layer, calls[: at + 1], lambda outputs: read(outputs[index : index + 1]), read([ids]))

    def _settle(self, layer: int, calls: list[_Call], read: Callable[[Sequence[Tensor]], Tensor], ids: Tensor) -> None:
        """Build and prove the route of a layer through its router, the last of `calls`, which gave it `ids`."""
        router = calls[-1]
        norm = _producer(calls[:-1], router)
        first = norm or router
        self._taps[layer], self._widths[layer] = first.module, first.width
        route = _route(norm, router, read)
        if route is None:
            self._reasons[layer] = PER_CALL
        elif self._prove and not self._is_proven(route, norm, router, ids):
            self._reasons[layer] = NOT_PROVEN
        else:
            self._routes[layer], self._reasons[layer] = route, None

    def _is_proven(self, route: Route, norm: _Call | None, router: _Call, ids: Tensor) -> bool:
        """Whether the route gives `ids` from what the model still holds."""
        first = norm or router
        residual = None if first.hidden is None else first.hidden()
        if residual is not None:
            return self._reproduces(route, residual, ids)
        # The model has dropped the residual. Only a norm's output that is still alive is sure to be the router's input.
        normed = None if norm is None else norm.outputs[0]()
        return normed is not None and self._reproduces(replace(route, norm=None), normed, ids)

    def _reproduces(self, route: Route, residual: Tensor, ids: Tensor) -> bool:
        self._proving = True
        try:
            with torch.no_grad():
                computed = route.ids(residual)
        except (RuntimeError, TypeError, ValueError, IndexError):  # the router needs more than this route gives it
            return False
        finally:
            self._proving = False
        return torch.equal(computed, ids.to(torch.int64))


def _routing_of(module: nn.Module) -> Routing | None:
    adapter = adapter_of(module)
    return Routing(None, ids_as_they_are) if adapter is None else adapter.routing(module)


def _producer(calls: Sequence[_Call], router: _Call) -> _Call | None:
    """The childless module that put out the router's input, but not one that passes its own input on (dropout)."""
    for call in reversed(calls):
        leaf = next(call.module.children(), None) is None
        if leaf and router.source is not None and router.source in call.memories and call.source is not None:
            if call.source[:2] == router.source[:2]:
                continue
            if call.memories == (router.source,) and call.source.numel == router.source.numel:
                return call
    return None


def _route(norm: _Call | None, router: _Call, read: Callable[[Sequence[Tensor]], Tensor]) -> Route | None:
    """The route through two calls; None if they need more than the residual and the model's own tensors."""
    if norm is not None and any(value is not None for value in (*norm.extra, *norm.extra_by_name.values())):
        return None
    extra = [v for v in router.extra if not isinstance(v, _PerCall)]
    by_name = {name: v for name, v in router.extra_by_name.items() if not isinstance(v, _PerCall)}
    if len(extra) < len(router.extra) or len(by_name) < len(router.extra_by_name):
        return None
    return Route(None if norm is None else norm.module, router.module, read, router.dims == 2, tuple(extra), by_name)


def unpredictable_reasons(meta_model: PreTrainedModel, experts: Sequence[nn.Module]) -> tuple[str | None, ...] | None:
    """Say for each MoE layer why its experts cannot be predicted.

    Args:
        meta_model: the model on the meta device, experts included.
        experts: its experts modules by MoE layer.

    Returns:
        Per MoE layer a reason, or None if the layer can be predicted. None instead of the tuple if only a run of the
        model with weights can tell: an architecture whose forward looks at values cannot run on the meta device.
    """
    routings = map(_routing_of, experts)
    if any(routing is not None and routing.router is not None for routing in routings):
        return None  # a router is inside an experts module, which does nothing here
    ids = torch.zeros((1, NUM_TOKENS), dtype=torch.int64, device="meta")  # [batch, length]
    inputs = {"input_ids": ids}
    if meta_model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    recorder = RouteRecorder(meta_model, experts, prove=False)
    recorder.start()
    for module in experts:
        object.__setattr__(module, "forward", _nothing)  # on this instance, which holds no weights
    try:
        with torch.no_grad():
            meta_model(**inputs)
    except Exception:  # an architecture may do anything with values that are absent
        return None
    finally:
        for module in experts:
            object.__delattr__(module, "forward")
        reasons = recorder.finish().reasons
    return reasons


def _nothing(hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty_like(hidden_states)
