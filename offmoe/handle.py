"""The handle at `model.offload`: statistics, memory, recording and the end of the runtime.

It also surrounds the model's calls (`in_use`, `step`), which hf/load/attach.py connects to the model. After `close` no
thread, open file or pinned page is left.
"""

from __future__ import annotations

import logging
import operator
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from offmoe.budget.memory_plan import MemoryPlan
from offmoe.budget.pass_check import PassCheck
from offmoe.budget.replan import Loaded
from offmoe.budget.resolve import pass_room
from offmoe.config import OffloadConfig
from offmoe.errors import CapacityError, ConfigError, OffmoeError
from offmoe.hf.load.attach import attach_handle, encoder_and_decoder
from offmoe.hf.predict.next_layer import NextLayerPredictor
from offmoe.runtime.executor import ExpertExecutor, Predictor, Slots
from offmoe.trace.recorder import TraceWriter
from offmoe.transfer.fill_queue import FillProgress
from offmoe.transfer.reader import Reader
from offmoe.types import CacheShape, CacheStats
from offmoe.warm_start import WarmStart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    class OffloadedModel(PreTrainedModel):
        """The type of a loaded model for editors and type checkers: its architecture's own class, and the handle."""

        offload: Offload

        def __getattr__(self, name: str) -> Any:
            """Everything else that the architecture's class has, such as `generate` and `model`."""


logger = logging.getLogger(__name__)

SlotsOf = Callable[[OffloadConfig, MemoryPlan, int], Slots]
"""slots(options, plan, number of scratch slots) gives the layouts of all slots."""


class Offload:
    """The runtime of one model. Its constructor puts it at `model.offload`; as a context manager it closes itself.

    Args:
        model: The loaded model.
        loaded: The options with every "auto" resolved, and the division of memory that the model was loaded by.
        executor: The runtime of the experts.
        experts: The experts module of each MoE layer.
        slots: Gives the layouts of all slots by a division.
        closing: Callbacks that end the runtime; the handle takes them over.
        warm: The state of earlier runs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loaded: Loaded,
        executor: ExpertExecutor,
        experts: Sequence[nn.Module],
        slots: SlotsOf,
        closing: ExitStack,
        warm: WarmStart,
    ):
        self._loaded, self._slots, self._executor, self._warm = loaded, slots, executor, warm
        self._calls = 0
        """Calls of the model that are under way, one inside the other."""
        self._baseline = CacheStats.for_layers(executor.shape.layers)
        self._model, self._experts = weakref.ref(model), experts
        self._prediction: NextLayerPredictor | None = None
        self._encoded = False
        """Whether the encoder has run for requests that the decoder has not begun yet."""
        self._follow_plan(model)
        # The finalizer must not hold the model, or the model would never be garbage-collected.
        callbacks = closing.pop_all()
        callbacks.callback(executor.end_trace)
        self._finalizer = weakref.finalize(model, _close_all, os.getpid(), callbacks)
        attach_handle(model, self)

    @property
    def config(self) -> OffloadConfig:
        """The options as resolved. An "auto" left in prefetch or on_miss is a policy that decides while running."""
        return self._loaded.config

    @property
    def trace(self) -> TraceWriter | None:
        """The recording in progress; None if the model was loaded without trace=."""
        return self._executor.trace

    @property
    def shape(self) -> CacheShape:
        """The MoE layers: how many experts each has, how large they are, and how many a token uses."""
        return self._executor.shape

    def stats(self) -> CacheStats:
        """Counts since loading or the last `reset_stats`. Two snapshots can be subtracted."""
        return self._executor.stats - self._baseline

    def reset_stats(self) -> None:
        """Let `stats` count from zero again."""
        self._baseline = self._executor.stats.copy()

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write how often each expert was used, and which ones are resident, for `from_pretrained(state=path)`.

        Counts of the state that the model was loaded with go on. The file gets its name only when it is whole.

        Args:
            path: The file to write; one that exists is replaced.

        Raises:
            OffmoeError: The file cannot be written, or another thread is generating.
        """
        with self._executor.user:
            self._warm.save(path, self._executor)

    def fill(self) -> None:
        """Begin to read experts into free slots and RAM in the background, as `fill=True` does after loading.

        A fill under way, or one that has ended, goes on with what is free now.

        Raises:
            OffmoeError: Another thread is generating, or the model was closed.
        """
        with self.in_use():
            self._executor.fill(self._warm.order())

    def fill_progress(self) -> FillProgress:
        """How far the background fill has come: experts and bytes of all that it set out to bring. Any thread may ask.

        All of it is zero for a model that was loaded without `state` and `fill`.
        """
        return self._executor.fill_progress

    def expert_map(self) -> tuple[list[list[int]], list[list[int]]]:
        """What each expert of each MoE layer has done, and where it is. Any thread may ask.

        Returns:
            Tokens routed to it since loading, and 2 if it has a slot, 1 if it is in RAM only, 0 if it is on disk only.
        """
        slots, in_ram = self._executor.residents()
        places = [[0] * count for count in self._executor.shape.experts]
        for place, experts in ((1, in_ram), (2, slots)):
            for layer, expert in experts:
                places[layer][expert] = place
        return [list(counts) for counts in self._executor.routed], places

    def predict_with(self, predictor: Predictor) -> None:
        """Predict the experts of the next layer with `predictor` in place of that layer's own router."""
        self._prediction = None
        self._executor.predictor = predictor

    def memory(self) -> MemoryPlan:
        """The division of memory: bytes of every part, as planned before loading or by the last `resize`."""
        return self._loaded.plan

    def resize(
        self,
        *,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        max_context: int | None = None,
        slots_per_layer: int | tuple[int, ...] | None = None,
    ) -> MemoryPlan:
        """Divide the memory anew between two generations, without loading the model again.

        Slots become fewer or more. The experts that the eviction policy values most stay, and their bytes are not read
        again. Dense weights stay where they are. Statistics go on; experts that lose their slots here do not count as
        evictions. A recording is written and ends. An option that is None stays as it is, but with another
        device_memory slots_per_layer follows from it.

        Args:
            device_memory: Most memory to use on the device, as `OffloadConfig.device_memory`.
            host_memory: Most RAM for experts between disk and device, as `OffloadConfig.host_memory`.
            max_context: Tokens of KV cache to reserve memory for.
            slots_per_layer: Experts resident on the device per MoE layer.

        Returns:
            The new division, which `memory` gives from now on.

        Raises:
            CapacityError: It does not fit; the message names what would. Nothing has changed.
            ConfigError: An option cannot be used. Nothing has changed.
            OffmoeError: The model was closed, or is generating. Nothing has changed.
        """
        if self._calls:
            raise OffmoeError("the model is generating and cannot be resized; call resize between two generations.")
        with self.in_use():
            config, plan = self._loaded.divide(
                device_memory=device_memory,
                host_memory=host_memory,
                max_context=max_context,
                slots_per_layer=slots_per_layer,
            )
            self._executor.resize(config.cache(), lambda num_scratch: self._slots(config, plan, num_scratch))
            self._loaded.backend.trim()
            self._loaded = replace(self._loaded, config=config, plan=plan)
            if (model := self._model()) is not None:
                self._follow_plan(model)
        logger.info("resized: %s", plan.describe())
        return plan

    def _follow_plan(self, model: PreTrainedModel) -> None:
        """Check passes by the present division; let experts be predicted if some have no slot and nothing does it."""
        config, plan = self._loaded.config, self._loaded.plan
        self._passes = PassCheck(plan, pass_room(config, self._loaded.needs, plan), model.config, model.dtype)
        short = any(map(operator.lt, plan.slots_per_layer, self._executor.shape.experts))
        if short and config.prefetch != 0 and self._executor.predictor is None:
            self._prediction = NextLayerPredictor(model, self._experts, encoder_and_decoder(model))
            self._executor.predictor = self._prediction

    def prefill_chunk(self, batch: int, length: int, past: int = 0) -> int:
        """Tokens of each sequence that pass at once when `generate` prefills; `length` if the prompt passes whole.

        It is the `prefill_chunk_size` with which stock transformers gives the same bits.

        Args:
            batch: sequences of the prompt, with num_beams or num_return_sequences all of them.
            length: tokens of each, padding included.
            past: tokens of each that the KV cache holds already.

        Raises:
            CapacityError: The context is longer than the reserved one.
        """
        return self._passes.chunk(batch, length, past)

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse to be copied or pickled."""
        raise ConfigError(
            "model.offload cannot be copied or pickled: it is the slots, files and threads of this process. Take what "
            "is needed from it, such as stats()."
        )

    def close(self) -> None:
        """End the reader threads, write the recording, free the slots and close the files.

        The model cannot run afterwards. A second call does nothing.
        """
        self._finalizer()

    def __enter__(self) -> Offload:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the model for one user; OffmoeError if it was closed, or another thread or call uses it."""
        if not self._finalizer.alive:
            raise OffmoeError("the model was closed; load it again with from_pretrained.")
        with self._executor.user:
            self._calls += 1
            try:
                yield
            finally:
                self._calls -= 1

    @contextmanager
    def shared(self, holds: Callable[[], bool]) -> Iterator[None]:
        """Give the model to threads that take turns, until the block ends; other threads cannot use it meanwhile.

        Args:
            holds: Whether the calling thread has the turn. At most one thread may have it.

        Raises:
            OffmoeError: The model is in use, or was closed.
        """
        with self.in_use():
            pass
        with self._executor.user.lend(holds):
            yield

    @contextmanager
    def step(self, arguments: Mapping[str, Any], is_encoder: bool = False) -> Iterator[None]:
        """Surround one forward pass of the model, or of its encoder or decoder.

        The pass is checked against the reserved context (CapacityError), recorded, and watched for predictions.

        Args:
            arguments: Arguments of the forward pass, by name.
            is_encoder: Whether the encoder of an encoder-decoder model runs.
        """
        ids = arguments.get("input_ids")  # [batch, length]
        rows = ids if isinstance(ids, torch.Tensor) else arguments.get("inputs_embeds")  # [batch, length(, hidden)]
        batch, length = (int(rows.shape[0]), int(rows.shape[1])) if isinstance(rows, torch.Tensor) else (1, 0)
        past = self._passes.check(batch, length, arguments, is_encoder)
        if self.trace is not None:
            if past == 0 and (is_encoder or not self._encoded):
                self.trace.next_requests()
            request = np.repeat(np.arange(batch, dtype=np.int32), length)  # [batch * length]
            token = ids.reshape(-1).cpu().numpy() if isinstance(ids, torch.Tensor) else None
            self.trace.begin_step(batch * length, request, token)
        self._encoded = is_encoder
        try:
            with self._watched(is_encoder):
                yield
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"the device ran out of memory in a pass of {batch * length} tokens. Give fewer tokens at once, or "
                "load the model with a smaller device_memory or slots_per_layer, which leaves more of the device free."
            ) from error

    @contextmanager
    def _watched(self, is_encoder: bool) -> Iterator[None]:
        """Surround a pass that predictions learn from."""
        if self._prediction is None:
            yield
            return
        self._prediction.begin()
        complete = False
        try:
            yield
            complete = not is_encoder
        finally:
            self._prediction.end(complete)


def _close_all(process: int, closing: ExitStack) -> None:
    """Run the callbacks, but not in a fork of the process, which would overwrite the recording with half of it."""
    if os.getpid() != process:
        return
    if isinstance(threading.current_thread(), Reader):
        threading.Thread(target=_close_all, args=(process, closing), name="offmoe-closing").start()
        return
    closing.close()
