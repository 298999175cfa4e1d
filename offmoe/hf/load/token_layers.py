"""Decoder layers that the C kernels compute for one new token, many in one call (`exactness="numeric"` on a CPU).

A pass of one token enters the first layer's `forward`, which computes as many layers as it can in one call and gives
its own output. The next layers give what was computed for them, if they are called with what the layer before them
gave. A call ends before the experts of a layer whose block is another one, or where an expert is not resident: the
block runs as it is, and the next layer begins a new call.

The first tokens of each layer run both ways and must have the same bits. While several sequences take turns and while a
fill goes on, layers run as they are.

While experts are predicted, a call asks the router of the next layer before the experts of each layer, as the hooks of
`hf.predict` would. It ends, too, where one of these is not resident and would be read ahead.

Moves: what the layers' attention, routers and experts move.
Bound: memory bandwidth.
Must never: keep what was computed for a layer that the model's forward does not call.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import DynamicCache, PreTrainedModel

from offmoe.compute.dense_linear import DenseKernels
from offmoe.compute.kernels.token_layers import Passage, Stop, TokenLayers
from offmoe.hf.adapters.find import decoder_layers
from offmoe.hf.load.own_forward import OwnForward
from offmoe.hf.load.plain_layer import PlainLayer, ReadyLayer, is_plain_layer
from offmoe.policy.prefetch import ALL_RANKS
from offmoe.runtime.calls import Done, RouterPredictor, Tap
from offmoe.runtime.executor import ExpertExecutor

logger = logging.getLogger(__name__)

COMPARED, MOST_TRIES = 2, 8
"""Tokens that each layer computes both ways, with all experts resident; and how many are tried for that."""
SHARED = ("attention_mask", "position_embeddings", "past_key_values")
"""Arguments that are the same objects in all layers of a call."""


@dataclass
class _Run:
    """What one call has computed, until the layers have given it.

    first, next: numbers of its first layer, and of the one that gives its output next. given: what the layer before
    that one gave. layers: as the call took them. options: arguments of its first layer.
    """

    first: int
    next: int
    given: torch.Tensor
    passage: Passage
    layers: Sequence[ReadyLayer]
    options: Mapping[str, Any]

    def goes_on(self, number: int, x: torch.Tensor, options: Mapping[str, Any]) -> bool:
        """Whether a layer is called as the call has assumed."""
        same = all(options.get(name) is self.options.get(name) for name in SHARED)
        return number == self.next and x is self.given and same

    def give(self) -> torch.Tensor:
        """What was computed for the next layer."""
        self.given = self.passage.outs[self.next - self.first]
        self.next += 1
        return self.given

    @property
    def is_over(self) -> bool:
        """Whether all layers have given what was computed for them."""
        return self.next - self.first == len(self.passage.outs)

    def take_back(self) -> None:
        """Leave caches as if the layers that have given nothing yet had not been computed."""
        for layer in self.layers[self.next - self.first :]:
            layer.cache.crop(-1)


class LayerForward(OwnForward):
    """The `forward` of one decoder layer."""

    def __init__(self, plain: PlainLayer, layers: DecoderLayers, number: int) -> None:
        """number: of the layer among all decoder layers of the model."""
        self.plain, self._layers, self._number = plain, weakref.ref(layers), number
        self.left, self.tries = COMPARED, MOST_TRIES
        """Tokens that have to be compared before calls begin, and comparisons that may be made for that."""

    def __call__(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        layers = self._layers()
        if layers is None or arguments or not layers.runs or torch.compiler.is_compiling():
            return self.plain.own(hidden_states, *arguments, **options)
        if not self.left:
            return layers.output(self._number, hidden_states, options)
        if self.tries:
            return layers.compared(self._number, hidden_states, options)
        return self.plain.own(hidden_states, **options)


class DecoderLayers:
    """The decoder layers of one model, for passes of one token of one sequence."""

    def __init__(self, model: PreTrainedModel, executor: ExpertExecutor, owner: DenseKernels) -> None:
        """owner: computes the model's attention, norms and routers."""
        self._executor, self._owner = executor, owner
        self._config = model.config.get_text_config()
        modules = decoder_layers(model)
        self._layers = [
            LayerForward(PlainLayer(module, executor), self, number) if is_plain_layer(module) else None
            for number, module in enumerate(modules.values())
        ]
        stacks = [path.rpartition(".")[0] for path in modules]
        self._ends = [len(stacks) - stacks[::-1].index(stack) for stack in stacks]
        """By number of a layer, the number behind the last layer of its stack."""
        self._depth = max(Counter(stacks).values(), default=0)
        self._calls = TokenLayers(owner.kernels, len(modules))
        self._ahead = len(modules)
        """Layers that the next call may have. Each takes some 60 us before it, in vain behind a missing expert."""
        self.predictor: RouterPredictor | None = None
        """Predicts experts while the model runs; layers run as they are while another one does."""
        self.runs = False
        """Whether the pass under way may be computed here."""
        self._is_given_up = False
        self._run: _Run | None = None
        for module, forward in zip(modules.values(), self._layers, strict=True):
            if forward is not None:
                object.__setattr__(module, "forward", forward)

    @property
    def count(self) -> int:
        """Layers that may be computed here."""
        return sum(layer is not None for layer in self._layers)

    @contextmanager
    def step(self, arguments: Mapping[str, Any], tokens: int) -> Iterator[None]:
        """Surround a forward pass of the model. arguments: by name. tokens: of all sequences."""
        if self._executor.gather is not None:  # one of several passes that take turns
            yield
            return
        self.runs = tokens == 1 and not self._is_given_up and self._suits(arguments.get("past_key_values"))
        try:
            yield
        finally:
            self.runs = False
            self._take_back()

    def _suits(self, cache: object) -> bool:
        is_whole = self._config.num_hidden_layers >= self._depth  # a draft of the model leaves layers out
        return type(cache) is DynamicCache and not cache.offloading and is_whole and not _has_any_global_hook()

    def output(self, number: int, x: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """The output of one layer. x: [1, 1, hidden]. options: its arguments, by name."""
        plain = self._layer(number).plain
        if self._run is not None and not self._run.goes_on(number, x, options):
            self._give_up("they are called in another order")
            return plain.own(x, **options)  # type: ignore[no-any-return]
        run = self._run or self._begin(number, x, options)
        if run is None:
            return plain.own(x, **options)  # type: ignore[no-any-return]
        out = run.give()
        self._run = None if run.is_over else run
        stop = run.passage.stop
        if not run.is_over or stop is None:
            return out
        self._tell(plain, run.layers[-1].tap, stop, out)
        return plain.after(stop, out)

    def _tell(self, plain: PlainLayer, tap: Tap | None, stop: Stop, attended: torch.Tensor) -> None:
        """Let experts be predicted from what a call has left before a layer's experts."""
        if tap is None or self.predictor is None:
            return
        tap.take(attended)
        if stop.predicted is not None:
            self.predictor.foresee(plain.moe_layer + 1, stop.predicted)

    def _begin(self, number: int, x: torch.Tensor, options: Mapping[str, Any]) -> _Run | None:
        """Compute layers from one on; None if its own code computes it."""
        ready, predict = self._ready(number, x, options) if self._may_begin else ([], [])
        passage = self._call(ready, x, options, predict) if ready else None
        if passage is None:
            return None
        done, misses = len(passage.ids), passage.stop is not None and passage.stop.misses
        least, most = 1 + bool(predict[0]), min(2 * len(passage.outs), len(self._layers))
        self._ahead = max(least, 2 * done) if misses else max(self._ahead, most)
        del ready[len(passage.outs) :]
        for one in ready:
            one.cache.extend(one.states.keys, one.states.values)
        computed = enumerate(zip(passage.ids, passage.predicted, strict=True), number)
        self._executor.computed([Done(self._layer(at).plain.moe_layer, *experts) for at, experts in computed])
        return _Run(number, number, x, passage, ready, options)

    def _ready(
        self, number: int, x: torch.Tensor, options: Mapping[str, Any]
    ) -> tuple[list[ReadyLayer], list[int | None]]:
        """Layers from one on for a call, up to one that it leaves before its block anyway, and what they predict."""
        ready, predict = list[ReadyLayer](), list[int | None]()
        for at in range(number, min(self._ends[number], number + self._ahead)):
            layer = self._layers[at]
            if layer is None or layer.left or (ready and layer.plain.has_window):
                break
            one = layer.plain.ready(x, options, ready[0] if ready else None)
            if one is None:
                break
            path = self._path(layer.plain) if one.parts.router is not None else None
            if path is not None and one.tap is None:
                break
            ready.append(one)
            behind = self._layers[at + 1] if at + 1 < self._ends[number] else None
            is_asked = path is not None and behind is not None and path == behind.plain.chooses
            if is_asked:
                predict.append(self._executor.planner.ranks(layer.plain.moe_layer + 1))
            else:  # the call is left before the experts, since others have to be asked
                predict.append(None if path is None else ALL_RANKS)
            if one.parts.router is None or (path is not None and not is_asked):
                break
        return ready, predict

    def _path(self, plain: PlainLayer) -> tuple[nn.Module | None, nn.Module] | None:
        """The norm and the router that are asked, before a layer's experts, for those of the layer behind it."""
        if self.predictor is None or not self._executor.predicts(plain.moe_layer):
            return None
        return self.predictor.path(plain.moe_layer + 1)

    def compared(self, number: int, x: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """The output of one layer by its own code. If a call gives other bits, there are no calls any more."""
        layer, seen = self._layer(number), list[tuple[Any, Any]]()
        hook = layer.plain.block.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
        try:
            own: torch.Tensor = layer.plain.own(x, **options)
        finally:
            hook.remove()
        ready = layer.plain.ready(x, options) if self._may_begin else None
        if ready is None:
            return own
        held = [states for states in (ready.cache.keys, ready.cache.values) if states is not None]
        keys, values = (states.clone(memory_format=torch.contiguous_format) for states in held)
        keys[..., -1:, :] = values[..., -1:, :] = torch.nan
        states = ready.states._replace(keys=keys, values=values, tokens=keys.shape[-2])
        passage = self._call([ready._replace(states=states)], x, options, [None])
        if passage is None:
            return own
        (out,), stop, ((normed, of_block),) = passage.outs, passage.stop, seen
        pairs = [*zip((keys, values), held, strict=True), (out if stop is None else out + of_block, own)]
        if stop is not None:
            pairs.append((stop.normed, normed))
        layer.tries -= 1
        if stop is None or stop.ids is None:
            layer.left -= 1
        if not all(torch.equal(found, wanted) for found, wanted in pairs):
            self._give_up("the C kernels give other bits")
        return own

    @property
    def _may_begin(self) -> bool:
        watches = self.predictor is not None and self.predictor.watches
        return self._executor.is_settled and self._executor.predictor is self.predictor and not watches

    def _layer(self, number: int) -> LayerForward:
        layer = self._layers[number]
        assert layer is not None
        return layer

    def _call(
        self, ready: Sequence[ReadyLayer], x: torch.Tensor, options: Mapping[str, Any], predict: Sequence[int | None]
    ) -> Passage | None:
        """What a call gives; None if the kernels were closed."""
        layers, states = [one.parts for one in ready], [one.states for one in ready]
        return self._owner.run(self._calls, layers, states, x, *options["position_embeddings"], predict)

    def _take_back(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.take_back()

    def _give_up(self, reason: str) -> None:
        self._take_back()
        self._is_given_up, self.runs = True, False
        logger.warning(
            "decoder layers are computed part by part from now on, which costs speed alone: %s. Please report it with "
            "the model's config.json",
            reason,
        )


def attach_layers(model: PreTrainedModel, executor: ExpertExecutor, owner: DenseKernels) -> DecoderLayers | None:
    """Let the kernels compute decoder layers for single tokens; None if they compute none.

    Args:
        model: a loaded model whose experts are attached.
        executor: of its experts.
        owner: computes its attention, norms and routers.
    """
    layers = DecoderLayers(model, executor, owner)
    logger.info("the C kernels compute %d decoder layers of single tokens", layers.count)
    return layers if layers.count else None
