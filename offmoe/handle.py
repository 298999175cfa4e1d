"""The handle at `model.offload`: statistics, memory, recording and the end of the runtime.

It also surrounds the model's calls (hf/load/attach.py). After `close` no thread, open file or pinned page is left.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from offmoe.budget.memory_plan import MemoryPlan
from offmoe.budget.replan import Loaded
from offmoe.config import OffloadConfig
from offmoe.device.pinning import PinProgress
from offmoe.errors import CLOSED, ConfigError, OffmoeError
from offmoe.hf.load.attach import attach_handle
from offmoe.policy.layer_cache import residents
from offmoe.rows.many import TokenIds, all_results, row_requests
from offmoe.rows.row import RowRequest
from offmoe.rows.session import Session
from offmoe.runtime.calls import Predictor, Slots
from offmoe.runtime.executor import ExpertExecutor
from offmoe.steps import Steps
from offmoe.trace.recorder import TraceWriter
from offmoe.transfer.closing import close_all
from offmoe.transfer.fill_queue import FillProgress
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
        slots: Gives the layouts of all slots by a division.
        closing: Callbacks that end the runtime; the handle takes them over.
        warm: The state of earlier runs.
        steps: What surrounds the model's forward passes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loaded: Loaded,
        executor: ExpertExecutor,
        slots: SlotsOf,
        closing: ExitStack,
        warm: WarmStart,
        steps: Steps,
    ):
        self._loaded, self._slots, self._executor, self._warm = loaded, slots, executor, warm
        self.backend = loaded.backend
        """The device."""
        self._calls = 0
        """Calls of the model that are under way, one inside the other."""
        self._baseline = CacheStats.for_layers(executor.shape.layers)
        self._model = weakref.ref(model)
        self._steps = steps
        steps.follow(model, loaded)
        self.captured = steps.captured
        """The graphs of decoder layers; None without `cuda_graphs`, or where nothing can be captured."""
        # The finalizer must not hold the model, or the model would never be garbage-collected.
        callbacks = closing.pop_all()
        callbacks.callback(executor.end_trace)
        self._finalizer = weakref.finalize(model, close_all, os.getpid(), callbacks)
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

    def pin_progress(self) -> PinProgress:
        """How many RAM slots are pinned by now; experts in the others take longer to the device. Any thread may ask."""
        return self._executor.host_memory.pin_progress

    def expert_map(self) -> tuple[list[list[int]], list[list[int]]]:
        """What each expert of each MoE layer has done, and where it is. Any thread may ask.

        Returns:
            Tokens routed to it since loading, and 2 if it has a slot, 1 if it is in RAM only, 0 if it is on disk only.
        """
        slots, in_ram = residents(self._executor.planner.layers)
        places = [[0] * count for count in self._executor.shape.experts]
        for place, experts in ((1, in_ram), (2, slots)):
            for layer, expert in experts:
                places[layer][expert] = place
        return [list(counts) for counts in self._executor.routed], places

    def predict_with(self, predictor: Predictor) -> None:
        """Predict the experts of the next layer with `predictor` in place of that layer's own router."""
        self._steps.predict_with(predictor)

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
                host_untouched=self._executor.host_memory.untouched_bytes,
            )
            self._executor.resize(config.cache(), lambda num_scratch: self._slots(config, plan, num_scratch))
            self._loaded.backend.trim()
            self._loaded = replace(self._loaded, config=config, plan=plan)
            if (model := self._model()) is not None:
                self._steps.follow(model, self._loaded)
        logger.info("resized: %s", plan.describe())
        return plan

    def generate_many(
        self,
        prompts: Sequence[TokenIds],
        *,
        max_new_tokens: int | Sequence[int],
        batch_size: int | None = None,
        batch_invariant: bool | None = None,
        seed: int | None = None,
        on_done: Callable[[int], None] | None = None,
        **options: Any,
    ) -> list[Any]:
        """Continue many prompts in step, so that each layer's experts are read once for all of them.

        The result is that of `model.generate` for each prompt by itself: bit for bit if `batch_invariant`, else but for
        the last bits of logits. A prompt that ends makes room for the next. Prompts enter as the KV cache
        (`max_context`) and a step (`prefill_chunk`) have room.

        Args:
            prompts: Token ids of each prompt; lists of int, or tensors [n] or [1, n].
            max_new_tokens: Tokens to generate at most: one number, or one per prompt.
            batch_size: Prompts under way at the same time. Default: as many as pay, measured in the first steps.
            batch_invariant: Compute each prompt's numbers by themselves, so that they do not depend on the others.
                Experts are still read once for all. Default: with exactness="bitwise".
            seed: Prompt i samples with `torch.manual_seed(seed + i)`. Default: by chance.
            on_done: Called with the index of each prompt that ends.
            options: Further arguments of transformers' `generate`, the same for all prompts.

        Returns:
            What `generate` returns for each prompt, in their order; an output object has no KV cache in it.

        Raises:
            CapacityError: A prompt does not fit the reserved context. Nothing was computed.
            ConfigError: An option cannot be used.
        """
        requests = row_requests(prompts, max_new_tokens, options, seed)
        return all_results(self.session(requests, batch_size, batch_invariant), on_done)

    def session(
        self, requests: Sequence[RowRequest], batch_size: int | None = None, batch_invariant: bool | None = None
    ) -> Session:
        """What `generate_many` runs, for callers that want each prompt's result or error as soon as it has ended."""
        model, config = self._model(), self._loaded.config
        assert model is not None
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1.")
        if model.config.is_encoder_decoder:
            raise ConfigError("a model with an encoder continues one batch at a time; use generate.")
        apart = not config.is_numeric if batch_invariant is None else batch_invariant
        if apart and not self._executor.is_invariant:
            raise ConfigError(
                "batch_invariant: this device computes several experts in one launch, or leaves some to the host, in "
                "bits that depend on the others. Load the model with exactness='bitwise', or leave the option out."
            )
        return Session(
            model,
            self._executor,
            self._steps,
            requests,
            hold=self.in_use,
            context=self.memory().max_context,
            apart=apart,
            batch_size=batch_size,
        )

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
        return self._steps.checks.chunk(batch, length, past)

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse to be copied or pickled."""
        raise ConfigError("model.offload cannot be copied or pickled: it is slots, files and threads. Copy stats().")

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
            raise OffmoeError(CLOSED)
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

    def step(self, arguments: Mapping[str, Any], is_encoder: bool = False) -> AbstractContextManager[None]:
        """Surround one forward pass of the model, or of its encoder or decoder, as `Steps.step`."""
        return self._steps.step(arguments, is_encoder)
