"""What surrounds the forward passes of a model: the check of memory, the recording, and what predictions learn."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from offmoe.budget.needs import kv_growth_per_token
from offmoe.budget.pass_check import PassCheck
from offmoe.budget.replan import Loaded
from offmoe.budget.resolve import pass_room
from offmoe.compute.dense_linear import FEW_ROWS
from offmoe.compute.torch_threads import MOST_KV_BYTES, TorchThreads
from offmoe.errors import CapacityError
from offmoe.hf.load.attach import encoder_and_decoder
from offmoe.hf.load.capture import CapturedLayers, capture_layers
from offmoe.hf.load.roomy_cache import give_room
from offmoe.hf.load.token_layers import DecoderLayers
from offmoe.hf.predict.next_layer import NextLayerPredictor
from offmoe.runtime.calls import Predictor
from offmoe.runtime.executor import ExpertExecutor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shared = Callable[[torch.Tensor | None], None]
"""Takes the token ids [batch, length] of a pass that is a part of a step of several sequences; None: unknown."""


class Steps:
    """Surrounds every forward pass of one model.

    Args:
        executor: The runtime of the experts.
        experts: The experts module of each MoE layer.
    """

    def __init__(self, executor: ExpertExecutor, experts: Sequence[nn.Module]) -> None:
        self._executor, self._experts = executor, experts
        self.threads: TorchThreads | None = None
        """Torch's threads, if the C kernels compute the linear layers."""
        self.layers: DecoderLayers | None = None
        """The decoder layers, if the C kernels compute some for single tokens."""
        self._kv_per_token = 0
        """Most bytes of the keys and values of a token in one layer."""
        self._prediction: NextLayerPredictor | None = None
        self._encoded = False
        """Whether the encoder has run for requests that the decoder has not begun yet."""
        self.captured: CapturedLayers | None = None
        """The graphs of decoder layers; None without `cuda_graphs`, or where nothing can be captured."""
        self.shared: Shared | None = None
        """Set while several sequences are computed in step: it records the step, not each of its passes."""

    def follow(self, model: PreTrainedModel, loaded: Loaded) -> None:
        """Check passes by this division; let experts be predicted if some have no slot and nothing predicts them."""
        config, plan = loaded.config, loaded.plan
        self.checks = PassCheck(plan, pass_room(config, loaded.needs, plan), model.config, model.dtype)
        self._kv_per_token = 2 * kv_growth_per_token(model.config, model.dtype)
        short = any(map(operator.lt, plan.slots_per_layer, self._executor.shape.experts))
        if short and config.prefetch != 0 and self._executor.predictor is None:
            self._prediction = NextLayerPredictor(model, self._experts, encoder_and_decoder(model))
            self._executor.predictor = self._prediction
            if self.layers is not None:
                self.layers.predictor = self._prediction
        if config.cuda_graphs and self.captured is None:
            self.captured = capture_layers(model, self._executor)

    def predict_with(self, predictor: Predictor) -> None:
        """Predict the experts of the next layer with `predictor` in place of that layer's own router."""
        self._prediction = None
        self._executor.predictor = predictor

    @property
    def watches(self) -> bool:
        """Whether predictions still have to watch a whole pass, which must not mix with others."""
        return self._prediction is not None and self._prediction.watches

    @contextmanager
    def step(self, arguments: Mapping[str, Any], is_encoder: bool = False) -> Iterator[None]:
        """Surround one forward pass of the model, or of its encoder or decoder.

        Args:
            arguments: Arguments of the forward pass, by name.
            is_encoder: Whether the encoder of an encoder-decoder model runs.

        Raises:
            CapacityError: The pass does not fit the reserved context, or the device ran out of memory.
        """
        ids = arguments.get("input_ids")  # [batch, length]
        rows = ids if isinstance(ids, torch.Tensor) else arguments.get("inputs_embeds")  # [batch, length(, hidden)]
        batch, length = (int(rows.shape[0]), int(rows.shape[1])) if isinstance(rows, torch.Tensor) else (1, 0)
        past = self.checks.check(batch, length, arguments, is_encoder)
        if self.threads is not None:
            give_room(arguments.get("past_key_values"))
        trace = self._executor.trace
        if self.shared is not None and not self.watches:
            self.shared(ids if isinstance(ids, torch.Tensor) else None)
        elif trace is not None:
            if past == 0 and (is_encoder or not self._encoded):
                trace.next_requests()
            request = np.repeat(np.arange(batch, dtype=np.int32), length)  # [batch * length]
            token = ids.reshape(-1).cpu().numpy() if isinstance(ids, torch.Tensor) else None
            trace.begin_step(batch * length, request, token)
        self._encoded = is_encoder
        captured, layers = (
            nullcontext() if surrounds is None else surrounds.step(arguments, batch * length)
            for surrounds in (self.captured, self.layers)
        )
        try:
            try:
                few = self._few_threads(batch * length, batch * (past + length))
                with self._watched(is_encoder), few, captured, layers:
                    yield
            finally:
                self._executor.end_step()
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"the device ran out of memory in a pass of {batch * length} tokens. Give fewer tokens at once, or "
                "load the model with a smaller device_memory or slots_per_layer, which leaves more of the device free."
            ) from error

    def _few_threads(self, tokens: int, context: int) -> AbstractContextManager[None]:
        """Surround a pass in which torch computes little.

        Args:
            tokens: New ones of all sequences.
            context: Tokens that attention reads, of all sequences.
        """
        if self.threads is None or tokens > FEW_ROWS:
            return nullcontext()
        attends = tokens > 1 or not self.threads.kernels_attend
        return nullcontext() if attends and context * self._kv_per_token > MOST_KV_BYTES else self.threads.one()

    @contextmanager
    def _watched(self, is_encoder: bool) -> Iterator[None]:
        """Surround a pass that predictions learn from."""
        prediction = self._prediction
        if prediction is None or (self.shared is not None and not prediction.watches):
            yield
            return
        prediction.begin()
        complete = False
        try:
            yield
            complete = not is_encoder
        finally:
            prediction.end(complete)
