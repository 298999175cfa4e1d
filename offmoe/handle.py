"""The handle at `model.offload`: what the runtime did and holds, and the end of it.

It also stands around the model's calls: one user at a time, no step past the reserved context, no move that would
tear slots and weights apart, every step announced to the recording. All of that hangs on the one instance, by
attributes of its own; classes of transformers are never changed. Nothing here may outlive `close`: no thread, no
file, no pinned page."""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from offmoe.budget.device import MemoryPlan
from offmoe.config import OffloadConfig
from offmoe.errors import CapacityError, ConfigError, OffmoeError
from offmoe.hf.predict.route_recorder import RouteRecorder
from offmoe.hf.predict.router_probe import RouterProbe
from offmoe.runtime.executor import ExpertExecutor, Predictor
from offmoe.trace.recorder import TraceWriter
from offmoe.transfer.reader import Reader
from offmoe.types import CacheStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class _Prediction:
    """Experts of a layer from the residual of the layer before it; knows nothing until a forward pass has been
    watched. parts: an encoder and a decoder are watched one after the other, and neither predicts for the other.
    """

    def __init__(self, model: nn.Module, experts: Sequence[nn.Module], parts: Sequence[nn.Module]):
        inside = [set(part.modules()) for part in parts]
        part_of = [next((i for i, modules in enumerate(inside) if module in modules), -1) for module in experts]
        self._starts = {i for i in range(1, len(part_of)) if part_of[i] != part_of[i - 1]}
        self._recorder: RouteRecorder | None = RouteRecorder(model, experts)
        self._probe: RouterProbe | None = None
        self._residuals: dict[int, torch.Tensor] = {}  # the latest only: a long prompt's are large

    def begin(self) -> None:
        if self._recorder is not None:
            self._recorder.start()

    def end(self, complete: bool) -> None:
        """complete: the last part of the model has run to its end."""
        self._residuals.clear()
        if self._recorder is not None:
            self._recorder.pause()
            if complete:
                self._probe, self._recorder = self._recorder.finish(), None
                self._probe.install(self._keep)

    def _keep(self, layer: int, residual: torch.Tensor) -> None:
        self._residuals.clear()
        self._residuals[layer] = residual

    def predict(self, layer: int) -> torch.Tensor | None:
        """Expert ids [tokens, p] of `layer`, from the residual before the MoE block of `layer - 1`."""
        residual = self._residuals.get(layer - 1)
        if residual is None or self._probe is None or layer in self._starts or not self._probe.can_predict(layer):
            return None
        return self._probe.predict(layer, residual)


class Offload:
    """Runtime of one model; making it puts it at `model.offload`. Also a context manager that closes it."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: OffloadConfig,
        plan: MemoryPlan,
        executor: ExpertExecutor,
        experts: Sequence[nn.Module],
        closing: ExitStack,
    ):
        self.config = config
        """The options with every "auto" resolved, but for prefetch and on_miss, where "auto" is a policy that goes on
        deciding."""
        self._plan = plan
        self._executor = executor
        self._baseline = CacheStats.for_layers(executor.shape.layers)
        self._prediction: _Prediction | None = None
        self._encoded = False
        """Whether an encoder has run for requests that a decoder has not begun yet."""
        parts = _parts(model)
        if config.prefetch != 0 and any(
            q < e for q, e in zip(plan.slots_per_layer, executor.shape.experts, strict=True)
        ):
            self._prediction = _Prediction(model, experts, parts)
            executor.predictor = self._prediction
        # What ends the runtime must not hold the model, or the model would never be collected.
        kept = closing.pop_all()
        kept.callback(executor.end_trace)
        self._finalizer = weakref.finalize(model, _close_all, os.getpid(), kept)
        self._install(model, parts)

    @property
    def trace(self) -> TraceWriter | None:
        """The recording under way."""
        return self._executor.trace

    def stats(self) -> CacheStats:
        """Counts since loading or the last `reset_stats`; snapshots subtract."""
        return self._executor.stats - self._baseline

    def reset_stats(self) -> None:
        self._baseline = self._executor.stats.copy()

    def predict_with(self, predictor: Predictor) -> None:
        """Let `predictor` say what the next layer will want, in place of that layer's own router."""
        self._prediction = None
        self._executor.predictor = predictor

    def memory(self) -> MemoryPlan:
        """The ledger: bytes of each tier, as planned before loading and held to."""
        return self._plan

    def close(self) -> None:
        """End the reader threads, write the recording, release slots' files; idempotent. The model cannot run
        afterwards.
        """
        self._finalizer()

    def __enter__(self) -> Offload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _install(self, model: PreTrainedModel, parts: Sequence[nn.Module]) -> None:
        cls: Any = type(model)
        reference = weakref.ref(model)
        parts_run = bool(parts)
        for part in parts:
            self._install_part(part, is_encoder=part is parts[0])

        @functools.wraps(cls.generate)
        def generate(*args: Any, **kwargs: Any) -> Any:
            kwargs.setdefault(
                "disable_compile", True
            )  # a static cache would compile, and a graph cannot call the planner
            with self._in_use():
                return cls.generate(reference(), *args, **kwargs)

        @functools.wraps(cls.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._in_use(), nullcontext() if parts_run else self._step(args, kwargs):
                return cls.forward(reference(), *args, **kwargs)

        def apply(convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module | None:
            model = reference()
            assert model is not None
            probe = next(model.parameters()).detach()[:0]
            moved = convert(probe)
            if (moved.device, moved.dtype) != (probe.device, probe.dtype):
                raise ConfigError(
                    f"the model stays on {probe.device} in {probe.dtype}: its experts are in slots there. "
                    "Load it again with from_pretrained(device=..., dtype=...)."
                )
            return model

        def refuse_copy(*_: object) -> Any:
            raise ConfigError(
                "the model cannot be copied or pickled: its experts are slots, files and threads of this process. "
                "Load it once more with from_pretrained, or save_pretrained it."
            )

        def refuse_experts(*_: object, **__: object) -> None:
            raise ConfigError(
                "the experts of this model are not in it, so no other experts implementation can run. Load the model "
                "with stock transformers for that."
            )

        # Instance attributes: the class, and every other model of it, stays as transformers made it.
        for name, value in (
            ("offload", self),
            ("generate", generate),
            ("forward", forward),
            ("_apply", apply),
            ("__reduce_ex__", refuse_copy),  # where copy and pickle both look
            ("set_experts_implementation", refuse_experts),
        ):
            object.__setattr__(model, name, value)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        if not self._finalizer.alive:
            raise OffmoeError("the model was closed; load it again with from_pretrained.")
        with self._executor.user:
            yield

    def _install_part(self, part: nn.Module, is_encoder: bool) -> None:
        """Make each forward of an encoder or of a decoder a step; generate() runs the encoder by itself."""
        cls: Any = type(part)
        reference = weakref.ref(part)

        @functools.wraps(cls.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._in_use(), self._step(args, kwargs, is_encoder):
                return cls.forward(reference(), *args, **kwargs)

        object.__setattr__(part, "forward", forward)

    @contextmanager
    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any], is_encoder: bool = False) -> Iterator[None]:
        """One forward pass, of the model or of its encoder or decoder: checked against the reserved context, announced
        to the recording, watched for predictions.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        rows = ids if isinstance(ids, torch.Tensor) else kwargs.get("inputs_embeds")
        batch, length = (int(rows.shape[0]), int(rows.shape[1])) if isinstance(rows, torch.Tensor) else (1, 0)
        cache: Any = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        encoded = kwargs.get("encoder_hidden_states")
        whole = past + length + (int(encoded.shape[1]) if isinstance(encoded, torch.Tensor) else 0)
        if batch * whole > self._plan.max_context:
            raise CapacityError(
                f"{batch} x {whole} tokens of context do not fit the {self._plan.max_context} that memory is "
                f"reserved for. Load the model with max_context={batch * whole} or more."
            )
        trace = self._executor.trace
        if trace is not None:
            if past == 0 and (is_encoder or not self._encoded):
                trace.next_requests()
            request = np.repeat(np.arange(batch, dtype=np.int32), length)
            token = ids.reshape(-1).cpu().numpy() if isinstance(ids, torch.Tensor) else None
            trace.begin_step(batch * length, request, token)
        self._encoded = is_encoder
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


def _parts(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The encoder and the decoder of a model that has both."""
    if not model.config.is_encoder_decoder:
        return ()
    return model.get_encoder(), model.get_decoder()


def _close_all(process: int, closing: ExitStack) -> None:
    """Close what a process has opened; a fork of it must not write its recording over the whole one."""
    if os.getpid() != process:
        return
    if isinstance(threading.current_thread(), Reader):
        threading.Thread(target=_close_all, args=(process, closing), name="offmoe-closing").start()
        return
    closing.close()
