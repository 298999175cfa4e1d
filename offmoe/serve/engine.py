"""The engine: one loaded model, a queue of answers to compute, and the threads that take turns at it.

Nothing here knows HTTP. Several answers interleave in slices of forward passes, each with a KV cache and random numbers
of its own, so every answer is the one that it would be alone.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, cast

from offmoe.device.openmp import release_threads
from offmoe.dialogue.constraint import GrammarSource
from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.templates import ResponseFormat, response_format
from offmoe.errors import ConfigError, OffmoeError
from offmoe.hf.adapters.find import decoder_layers
from offmoe.hf.load.own_forward import Onlooker
from offmoe.serve.answering import Answering, Cancelled
from offmoe.serve.job import CANCELLED, Began, Broke, Ended, Job, Usage
from offmoe.serve.kept import EXACT, MODES, NUMERIC, Kept, KeptCaches, reuse_kind
from offmoe.serve.meters import Meters
from offmoe.serve.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offmoe.handle import Offload

logger = logging.getLogger(__name__)

RESIDENT_CHUNK, RAM_CHUNK, DISK_CHUNK = 64, 256, 512
"""Tokens per piece of a prompt, by where experts come from. Each piece demands nearly all experts: on the demo 434
tokens missed 15 experts in one piece and 105 in pieces of 64."""
QUEUE = 32


class QueueFullError(RequestError):
    """Too many answers wait. `retry_s`: seconds after which it is worth asking again."""

    def __init__(self, waiting: int, retry_s: int):
        super().__init__(f"{waiting} requests wait already; try again in {retry_s} s.", None, "queue_full", 429)
        self.retry_s = retry_s


class Engine(GrammarSource):
    """Answers requests with one model. A context manager; `close` ends it and leaves the model open.

    While it is open it alone may use the model: `generate` of anybody else is refused.

    Args:
        model: A loaded model, with its runtime at `model.offload`.
        tokenizer: Its tokenizer.
        parallel: Answers that are computed in turns; further ones wait.
        queue: Answers that may wait.
        prefix_reuse: "exact", "numeric", "off", or "auto": as the model's `exactness`.
        prefill_chunk: Tokens per piece of a prompt; None: by where experts come from. With "numeric" reuse all of a
            prompt that fits passes at once.

    Raises:
        ConfigError: An option cannot be used, or the model is no decoder that chats.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        parallel: int = 1,
        queue: int = QUEUE,
        prefix_reuse: str = "auto",
        prefill_chunk: int | None = None,
    ):
        if parallel < 1 or queue < 0:
            raise ConfigError(f"parallel={parallel} must be at least 1, queue={queue} at least 0.")
        if prefix_reuse not in (*MODES, "auto"):
            raise ConfigError(f"prefix_reuse={prefix_reuse!r} must be one of {', '.join(MODES)}, auto.")
        if model.config.is_encoder_decoder:
            raise ConfigError("a model with an encoder does not go on with a conversation; use offmoe generate.")
        super().__init__(model, tokenizer)
        self.offload = cast("Offload", model.offload)
        self.max_context: int = self.offload.memory().max_context
        self.answers: ResponseFormat | None = response_format(tokenizer, model.config.model_type)
        self.meters = Meters()
        mode = prefix_reuse
        if mode == "auto":
            mode = EXACT if self.offload.config.exactness == "bitwise" else NUMERIC
        self.chunk = prefill_chunk or self._chunk()
        self.reuse_kind = reuse_kind(model)
        self.kept = KeptCaches(self.max_context, self.chunk, mode, self.reuse_kind)
        self._default_tokens = self.max_context // parallel
        self._turns = Turns(self.offload.backend)
        self._changed = threading.Condition()
        self._queue: deque[tuple[Job, int]] = deque()
        self._queue_limit = queue
        self._running: dict[int, Answering] = {}
        """By thread."""
        self._closing = False
        self._ending = ExitStack()
        self._ending.enter_context(self.offload.shared(self._turns.is_mine))
        self._install_hooks()
        release_threads()  # of this thread, which has loaded the model
        self._threads = [
            threading.Thread(target=self._work, name=f"offmoe-engine-{i}", daemon=True) for i in range(parallel)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Queue an answer. Its updates go to the job's sink.

        Raises:
            RequestError: The prompt does not fit the context, or an option has no possible value.
            QueueFullError: Too many wait.
        """
        request = job.request
        request.sampling.check()
        prompt = len(request.prompt.ids)
        room = self.max_context - prompt + 1  # the last token is not fed back
        if prompt < 1:
            raise RequestError("the prompt has no tokens; there is nothing to continue.", "prompt")
        if prompt >= self.max_context:
            raise RequestError(
                f"the prompt has {prompt} tokens, and memory is reserved for {self.max_context} tokens of context; "
                f"shorten it, or start the server with --max-context {prompt + 256} or more.",
                "messages" if request.is_chat else "prompt",
                "context_length_exceeded",
            )
        new_tokens = min(request.sampling.max_tokens or max(self._default_tokens - prompt, 256), room)
        with self._changed:
            if self._closing:
                raise RequestError("the server is shutting down.", None, "shutting_down", 503)
            # What running threads will take at once does not wait.
            idle = len(self._threads) - len(self._running)
            if len(self._queue) >= self._queue_limit + idle:
                raise QueueFullError(len(self._queue), 1 + len(self._queue) // len(self._threads))
            self._queue.append((job, new_tokens))
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Answers in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Answers under way."""
        return len(self._running)

    def close(self, grace_s: float = 0.0) -> None:
        """Cancel what waits, let running answers finish for `grace_s`, then cancel them too; end the threads."""
        with self._changed:
            self._closing = True
            waiting, self._queue = list(self._queue), deque()
            self._changed.notify_all()
            for job, _ in waiting:
                job.cancel()
            self._changed.wait_for(lambda: not self._running, timeout=grace_s)
            for answering in self._running.values():
                answering.job.cancel()
        for job, _ in waiting:
            self._end_unseen(job)
        for thread in self._threads:
            thread.join()
        self.kept.clear()
        self._ending.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _chunk(self) -> int:
        """Tokens per piece of a prompt: the model's option, else by where experts come from and what fits."""
        config = self.offload.config
        if config.prefill_chunk is not None and "prefill_chunk" in config.explicit:
            return config.prefill_chunk
        plan, experts = self.offload.memory(), sum(self.offload.shape.experts)
        slots = sum(plan.slots_per_layer)
        in_ram = slots + (0 if plan.host is None else sum(plan.host.slots_per_layer))
        chunk = RESIDENT_CHUNK if slots >= experts else RAM_CHUNK if in_ram >= experts else DISK_CHUNK
        return min(chunk, self.offload.prefill_chunk(1, self.max_context))

    def _install_hooks(self) -> None:
        """Look for cancellation before every decoder layer, and change turns before every forward pass."""

        before_layer = Onlooker(lambda: self.running_here.check_cancelled())

        def before_pass(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            answering = self.running_here
            self._turns.pass_on()
            answering.check_cancelled()
            answering.before_pass(kwargs.get("past_key_values"))

        def after_pass(_: object, args: tuple[Any, ...], output: Any) -> None:
            self.running_here.after_pass(output.logits)

        self._ending.callback(self.model.register_forward_pre_hook(before_pass, with_kwargs=True).remove)
        self._ending.callback(self.model.register_forward_hook(after_pass).remove)
        for layer in decoder_layers(self.model).values():
            self._ending.callback(layer.register_forward_pre_hook(before_layer).remove)

    @property
    def running_here(self) -> Answering:
        """The answer that the calling thread computes."""
        return self._running[threading.get_ident()]

    def _work(self) -> None:
        """Body of a thread."""
        while (answering := self._next()) is not None:
            try:
                self._answer(answering)
            finally:
                with self._changed:
                    del self._running[threading.get_ident()]
                    self._changed.notify_all()

    def _next(self) -> Answering | None:
        """The next answer that has room, in the order of asking; None: the engine closes."""
        while True:
            with self._changed:
                self._changed.wait_for(self._has_next)
                if self._closing:
                    return None
                job, new_tokens = self._queue.popleft()
                if not job.is_cancelled:
                    ids = job.request.prompt.ids
                    answering = Answering(self, job, new_tokens, self.kept.begin(ids, _reserved(job, new_tokens)))
                    self._running[threading.get_ident()] = answering
                    return answering
            self._end_unseen(job)

    def _has_next(self) -> bool:
        return self._closing or (
            bool(self._queue) and (self._queue[0][0].is_cancelled or self.kept.has_room(_reserved(*self._queue[0])))
        )

    def _answer(self, answering: Answering) -> None:
        """Compute an answer, keep its cache, and report how it ended."""
        job = answering.job
        kept: Kept | None = None
        ended: Ended | Broke
        try:
            with self._turns:
                job.sink(Began(answering.cached))
                self.meters.began(answering.prompt_tokens, answering.cached)
                with suppress(Cancelled):
                    answering.run()
                kept = answering.kept(self.kept)
            ended = answering.ended()
        except OffmoeError as error:
            ended = Broke(error)
        except Exception as error:
            logger.exception("an answer failed")
            ended = Broke(RequestError(f"the answer failed: {type(error).__name__}: {error}", status=500))
        finally:
            with self._changed:
                self.kept.end(_reserved(job, answering.new_tokens), kept)
                self._changed.notify_all()
        self.meters.ended(ended.finish if isinstance(ended, Ended) else "error")
        job.sink(ended)

    def _end_unseen(self, job: Job) -> None:
        """Report the end of an answer that never began."""
        self.meters.ended(CANCELLED)
        job.sink(Ended(CANCELLED, None, Usage(len(job.request.prompt.ids), 0, 0, 0)))


def _reserved(job: Job, new_tokens: int) -> int:
    """Tokens of context that an answer may take. The last token is not fed back."""
    return len(job.request.prompt.ids) + new_tokens - 1
