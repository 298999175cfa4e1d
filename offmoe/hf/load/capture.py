"""Decoder layers that a step of one token launches as one graph each (`cuda_graphs="auto"`).

A layer under a StaticCache does the same work on the same addresses in every step, and so do the routed kernels of its
experts. The first step on a cache runs as it is and tells which layers launch all their experts without the host. The
second captures them, one by one. In that step and the next, every graph is compared with its layer: outputs, keys,
values and length must have the same bits. Any difference, and any failure to capture, turns all graphs off.

A layer runs as it is where its keys and values do not stand in a `StaticLayer` (sliding windows count in Python), where
a module in it has hooks, and in every pass that is not one token without gradients.

**None of it has run on a GPU.**

Moves: inputs of a graph into its buffers, some kilobytes per layer at most; the mask grows with the cache.
Bound: one launch per layer by the host.
Must never: give a result that the layer itself would not give, or one that the next step overwrites.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from offmoe.device.backend import Capturer
from offmoe.errors import OffmoeError
from offmoe.hf.adapters.find import decoder_layers
from offmoe.hf.load.attach import ATTRIBUTE, AttachedExperts
from offmoe.runtime.device_decode import Captured, DeviceDecode
from offmoe.runtime.executor import ExpertExecutor

logger = logging.getLogger(__name__)

CHECKS = 2
"""Replays of every graph that are compared with the layer itself."""
OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")
"""Arguments, and settings of a model, for which layers hand out more than the next layer takes."""
PLAIN = (type(None), bool, int, float, str)
CACHE = "past_key_values"
"""Stands for the cache among the inputs of a graph, which must not keep it alive."""


def capture_layers(model: PreTrainedModel, executor: ExpertExecutor) -> CapturedLayers | None:
    """Let the decoder layers of a model run as graphs; None where nothing can be captured, which is logged."""
    capturer = executor.backend.capturer()
    if executor.decode is None or capturer is None:
        reason = "steps of one token wait for the host" if capturer else "the device captures nothing"
        logger.warning("cuda_graphs='auto': no layer is captured, since %s", reason)
        return None
    return CapturedLayers(model, executor, executor.decode, capturer)


class CapturedLayers:
    """The graphs of one model, for one cache at a time."""

    def __init__(
        self, model: PreTrainedModel, executor: ExpertExecutor, decode: DeviceDecode, capturer: Capturer
    ) -> None:
        self._executor, self._decode, self._capturer = executor, decode, capturer
        self._device, self._config = executor.backend.device, model.config.get_text_config()
        layers = decoder_layers(model)
        stacks = [*(path.rpartition(".")[0] for path in layers), ""]
        ends = [stack != after for stack, after in pairwise(stacks)]
        self._layers = [_Layer(self, layer, is_last=end) for layer, end in zip(layers.values(), ends, strict=True)]
        self.replays = 0
        """Layers that a graph computed, checks included."""
        self.runs = False
        """Whether the pass under way may use graphs."""
        self._is_on, self._is_settled, self._is_inference = True, False, False
        self._cache: Callable[[], StaticCache | None] = _nothing
        """Refers weakly to the cache of the graphs."""
        self._buffers: dict[tuple[object, ...], torch.Tensor] = {}
        self._filled: dict[int, tuple[torch.Tensor, int]] = {}
        """What each buffer got in this pass: a tensor, and its version."""
        self._last: torch.Tensor | None = None
        """The hidden state that the last graph of this pass gave."""

    @contextmanager
    def step(self, arguments: Mapping[str, Any], tokens: int) -> Iterator[None]:
        """Surround a forward pass of the model. arguments: by name. tokens: of all sequences."""
        cache = arguments.get("past_key_values")
        self.runs = tokens == 1 and self._is_on and self._suits(arguments, cache)
        if self.runs and cache is not None:
            self._prepare(cache)
        self._is_settled = self.runs
        try:
            yield
        finally:
            self.runs, self._last = False, None
            self._filled.clear()

    def run(self, layer: _Layer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A layer's output: a graph's, or the layer's own."""
        cache = self._cache()
        own, leaves = layer.own(cache), _leaves(args, kwargs, cache)
        if layer.state is State.CAPTURES:
            with self._executor.on_device() as decode:
                captured = None if decode is None or own is None else self._captured(layer, own, leaves, args, kwargs)
                if captured is not None and own is not None:
                    return self._replay(layer, own, captured, leaves, functools.partial(layer.forward, *args, **kwargs))
        if layer.state is not State.NEW or own is None or not self._takes(leaves):
            return layer.forward(*args, **kwargs)
        launched, length = self._decode.launched, own.cumulative_length.clone()
        output = layer.forward(*args, **kwargs)
        is_alone = self._decode.launched - launched == len(layer.experts)
        if is_alone and int(own.cumulative_length - length) == 1:
            layer.state = State.CAPTURES  # its kernels have run once now
        return output

    def _suits(self, arguments: Mapping[str, Any], cache: Any) -> bool:
        """Whether a pass of one token can use graphs."""
        asked = any(arguments.get(name) or getattr(self._config, name, False) for name in OUTPUTS)
        is_bare = not torch.is_grad_enabled() and not torch.is_autocast_enabled(self._device.type)
        is_static = type(cache) is StaticCache and not cache.offloading
        return is_static and is_bare and not asked and not _has_any_global_hook()

    def _prepare(self, cache: StaticCache) -> None:
        """Drop graphs of another cache, and after another kind of pass graphs of weights that have moved."""
        mode = torch.is_inference_mode_enabled()
        if self._cache() is not cache or self._is_inference != mode:
            self._drop()
            self._cache, self._is_inference = weakref.ref(cache), mode
        elif not self._is_settled:
            moved = [layer.look() for layer in self._layers]
            if any(moved):
                self._drop()

    def _drop(self) -> None:
        self._decode.captured.clear()
        self._buffers.clear()
        for layer in self._layers:
            layer.look()
            layer.state, layer.inputs = State.NEW, []

    def _stop(self, reason: str) -> None:
        """Use no graphs any more."""
        logger.warning("cuda_graphs: turned off, layers run as they are: %s", reason)
        self._is_on = self.runs = False
        self._drop()

    def _takes(self, leaves: Sequence[Any]) -> bool:
        """Whether a graph can have these inputs."""
        return all(type(x) in PLAIN or (type(x) is torch.Tensor and x.device == self._device) for x in leaves)

    def _captured(
        self, layer: _Layer, own: StaticLayer, leaves: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Captured | None:
        """The layer's graph, captured now if need be; None if it runs as it is."""
        captured = self._decode.captured.get(layer)
        if captured is not None and layer.fits(own, leaves, kwargs):
            return captured
        if captured is not None or not self._takes(leaves):  # inputs that change from step to step
            layer.state = State.RUNS
            return None
        inputs = [self._buffer(i, leaf) if isinstance(leaf, torch.Tensor) else leaf for i, leaf in enumerate(leaves)]
        try:
            work = _with_inputs(layer.forward, inputs, args, kwargs, self._cache())
            captured = self._decode.capture(self._executor, self._capturer, work)
        except OffmoeError:  # an expert could not be read, for one
            raise
        except Exception as error:  # whatever a driver, a library or the model's code may raise
            self._stop(f"a layer cannot be captured ({str(error).partition(chr(10))[0]})")
            return None
        if not isinstance(captured.result, torch.Tensor):
            layer.state = State.RUNS
            return None
        layer.holds(inputs, tuple(kwargs), own)
        self._decode.captured[layer] = captured
        return captured

    def _buffer(self, position: int, leaf: torch.Tensor) -> torch.Tensor:
        """The memory from which a graph reads an input: where the graph before it writes, or a buffer of all graphs."""
        if leaf is self._last:
            return leaf
        form = position, leaf.dtype, leaf.shape, leaf.stride()
        return self._buffers.setdefault(form, torch.empty_like(leaf))

    def _replay(
        self, layer: _Layer, own: StaticLayer, captured: Captured, leaves: Sequence[Any], work: Callable[[], Any]
    ) -> Any:
        """Fill the inputs and replay, the first times beside the layer itself. work: the layer's own."""
        for buffer, leaf in zip(layer.inputs, leaves, strict=True):
            if isinstance(buffer, torch.Tensor) and buffer is not leaf:
                self._fill(buffer, leaf)
        self.replays += 1
        if layer.checks:
            layer.checks -= 1
            expected, same = self._compared(own, captured, work)
            if not same:
                self._stop("a graph differs from its layer")
                return expected
        else:
            self._decode.replay(self._executor, captured)
        self._last = None if layer.is_copied else captured.result
        return captured.result.clone() if layer.is_copied else captured.result

    def _fill(self, buffer: torch.Tensor, leaf: torch.Tensor) -> None:
        """Copy an input to where a graph reads it, once for all layers that take it."""
        version = -1 if leaf.is_inference() else leaf._version
        known, known_version = self._filled.get(id(buffer), (None, -1))
        if known is not leaf or version < 0 or version != known_version:
            buffer.copy_(leaf)
            self._filled[id(buffer)] = leaf, version

    def _compared(self, own: StaticLayer, captured: Captured, work: Callable[[], Any]) -> tuple[Any, bool]:
        """The layer's own output, and whether the graph does the same. Keys and values are the layer's own then."""
        state = _kept(own)
        position = own.cumulative_length.clone()
        expected = work()
        wanted = [x.clone() for x in state]
        for rows in state[:2]:  # a graph that does not write them is found out
            rows.index_fill_(2, position.view(1), float("nan"))
        own.cumulative_length.copy_(position)
        self._decode.replay(self._executor, captured, repeats=True)
        if all(map(torch.equal, (captured.result, *state), (expected, *wanted))):
            return expected, True
        for kept, value in zip(state, wanted, strict=True):
            kept.copy_(value)
        return expected, False


class State(Enum):
    """How a layer runs on the present cache: for the first time, as a graph, or as it is."""

    NEW, CAPTURES, RUNS = range(3)


class _Layer:
    """One decoder layer, whose forward goes through the graphs."""

    def __init__(self, graphs: CapturedLayers, module: nn.Module, *, is_last: bool) -> None:
        self._module, self._is_last = module, is_last
        self.forward: Callable[..., Any] = module.forward
        self.state, self.checks = State.NEW, 0
        self.inputs: list[Any] = []
        """Per input of the graph, its memory, or its value if it is no tensor."""
        self._names: tuple[str, ...] = ()
        self._kept_at: tuple[int, ...] = ()
        self._weights: tuple[int, ...] = ()
        self.look()

        @functools.wraps(module.forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not graphs.runs or self._is_watched:
                return self.forward(*args, **kwargs)
            return graphs.run(self, args, kwargs)

        object.__setattr__(module, "forward", call)

    def look(self) -> bool:
        """Note the modules and weights of the layer; gives whether they are other ones than before."""
        before, (_, *self._modules) = self._weights, self._module.modules()
        self.experts: list[AttachedExperts] = [vars(m)[ATTRIBUTE] for m in self._modules if ATTRIBUTE in vars(m)]
        self._numbers = {n for m in self._modules if isinstance(n := vars(m).get("layer_idx"), int)}
        self._weights = tuple(x.data_ptr() for x in (*self._module.parameters(), *self._module.buffers()))
        return self._weights != before

    @property
    def _is_watched(self) -> bool:
        """Whether somebody hooked a module in the layer, or chooses its experts: a graph would pass them by."""
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)
        return hooked or any(experts.choose is not None for experts in self.experts)

    @property
    def is_copied(self) -> bool:
        """Whether more than the next layer may keep the output."""
        return self._is_last or bool(self._module._forward_hooks)

    def own(self, cache: StaticCache | None) -> StaticLayer | None:
        """The layer's keys and values, if they do the same work in every step."""
        number = next(iter(self._numbers)) if len(self._numbers) == 1 else -1
        found = cache.layers[number] if cache is not None and 0 <= number < len(cache.layers) else None
        return found if type(found) is StaticLayer and found.is_initialized else None

    def holds(self, inputs: list[Any], names: tuple[str, ...], own: StaticLayer) -> None:
        """Note what the layer's new graph works on."""
        self.inputs, self._names, self._kept_at, self.checks = inputs, names, _addresses(own), CHECKS

    def fits(self, own: StaticLayer, leaves: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the graph is one for these inputs."""
        if tuple(kwargs) != self._names or len(leaves) != len(self.inputs) or _addresses(own) != self._kept_at:
            return False
        return all(
            (x.shape, x.dtype, x.device) == (mine.shape, mine.dtype, mine.device)
            if type(x) is type(mine) is torch.Tensor
            else type(x) is type(mine) and x == mine
            for x, mine in zip(leaves, self.inputs, strict=True)
        )


def _nothing() -> None:
    return None


def _kept(own: StaticLayer) -> tuple[torch.Tensor, ...]:
    """What one layer has in the cache: keys and values [1, heads, length, head], and the number of tokens, int64 []."""
    assert own.keys is not None
    assert own.values is not None
    return own.keys, own.values, own.cumulative_length


def _addresses(own: StaticLayer) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in _kept(own))


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any], cache: StaticCache | None) -> list[Any]:
    """All arguments in one list: tuples by their length and their items, the cache by its name."""
    leaves: list[Any] = []
    for value in (*args, *kwargs.values()):
        leaves += (len(value), *value) if type(value) is tuple else (CACHE if value is cache else value,)
    return leaves


def _with_inputs(
    forward: Callable[..., Any], inputs: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any], cache: object
) -> Callable[[], Any]:
    """The call with other leaves."""
    left = iter(inputs)

    def filled(value: object) -> Any:
        first = next(left)
        return tuple(next(left) for _ in range(first)) if type(value) is tuple else cache if first is CACHE else first

    return functools.partial(forward, *map(filled, args), **{name: filled(value) for name, value in kwargs.items()})
