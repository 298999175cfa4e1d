"""A contender: a process that loads one model, with offmoe or with accelerate's offload, and generates on request.

It reads requests from stdin (bench/messages.py) and answers on the stdout that it was started with. Whatever libraries
print goes to stderr. Nothing heavy is imported before the task has arrived. Both runtimes use the same generate() of
transformers, watched and forced by one logits processor, so that only the movement of weights differs.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from itertools import pairwise
from typing import IO, TYPE_CHECKING, Any

import psutil

from offmoe.bench.messages import OFFMOE, Costs, Outcome, Pass, Task, send
from offmoe.errors import ConfigError, OffmoeError

if TYPE_CHECKING:
    import torch

    from offmoe.budget.inspect import Inspected

COMPUTE_SECONDS = 2.0
LINK_BYTES = 64 << 20


def main() -> None:
    """Answer the process that started this one until it closes the pipe."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        for answer in _answers(sys.stdin.buffer):
            send(answers, answer)
    except Exception as error:
        text = " ".join(str(error).split())
        if not isinstance(error, OffmoeError):
            traceback.print_exc()
            text = f"{type(error).__name__}: {text}"
        send(answers, ConfigError(text) if isinstance(error, ConfigError) else OffmoeError(text))
    except KeyboardInterrupt:
        pass  # the process that started this one was interrupted too, and reports it


def _answers(requests: IO[bytes]) -> Iterator[object]:
    with closing(Contender(pickle.load(requests))) as contender:
        yield None
        with suppress(EOFError):
            while True:
                method, *arguments = pickle.load(requests)
                yield getattr(contender, method)(*arguments)


class Contender:
    """One loaded model that does passes and measures them."""

    def __init__(self, task: Task):
        import torch

        from offmoe.api import load
        from offmoe.hf.quiet import quiet

        if task.threads:
            torch.set_num_threads(task.threads)
        quiet(verbose=False, json=True)
        self._task = task
        self._inspected = self._inspect()
        self.model: Any = load(self._inspected) if task.runtime == OFFMOE else self._stock()
        self._offload: Any = self.model.offload if task.runtime == OFFMOE else None
        self._replayed = None if not task.routing else self._replay()
        self._watch = _Watch()

    def run(self, work: Pass) -> Outcome:
        """Do one pass. The KV cache is dropped afterwards; experts stay in their slots.

        Block-diffusion models emit several tokens per step. Their time after the first step is divided evenly over the
        tokens.
        """
        import torch
        from transformers import LogitsProcessorList

        torch.manual_seed(0)  # a block-diffusion model begins with random tokens
        if self._replayed is not None:
            self._replayed.seek(work.row)
        ids = torch.tensor([work.prompt], device=self._inspected.backend.device)
        before = self._offload.stats if self._offload is not None else lambda: None
        self._watch.begin(work.forced, before)
        read = _read_bytes()
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=work.new_tokens,
            min_new_tokens=work.new_tokens,
            logits_processor=LogitsProcessorList([self._watch]),
            disable_compile=True,
        )
        times = self._watch.times
        token_s = [b - a for a, b in pairwise(times[1:])]
        if self._watch.blocks:
            tokens = getattr(out, "sequences", out).shape[1] - ids.shape[1]
            token_s = [sum(token_s) / tokens] * tokens
        after = before()
        return Outcome(
            tokens=tuple(self._watch.tokens),
            digest=self._watch.digest.hexdigest(),
            ttft_s=times[1] - times[0],
            token_s=tuple(token_s),
            stats=None if after is None else (after - self._watch.prefilled).to_dict(),
            read_bytes=None if read is None else (_read_bytes() or 0) - read,
        )

    def costs(self) -> Costs:
        """Measure computing alone, with the routing fixed to resident experts, and copies to the device.

        Call it after the passes: the router probe watches the first pass, and needs the model's own routing there.
        """
        from offmoe.measure.calibrate import FixedRouting
        from offmoe.measure.probes import copy_gb_s

        if self._offload is None:
            return Costs(None, None)
        if self._replayed is not None:
            self._replayed.detach()
        compute_s = None
        if not self._watch.blocks:  # the number of steps per block is unknown
            fixed = FixedRouting(self.model, self._inspected, decoding=True)
            empty, extra = fixed.measure(COMPUTE_SECONDS)
            compute_s = empty + max(0.0, extra) / fixed.share
        if self._replayed is not None:
            self._replayed.attach(self._experts())
        backend = self._inspected.backend
        link = None if backend.unified_memory else copy_gb_s(backend, LINK_BYTES)
        return Costs(compute_s, link)

    def peak(self) -> dict[str, int | None]:
        """Peak memory in bytes so far: of the process (rss), and of a device with memory of its own."""
        return {"rss": _rss_peak(), "cgroup": None, "device": self._inspected.backend.peak_bytes()}

    def close(self) -> None:
        if self._offload is not None:
            self._offload.close()

    def _inspect(self) -> Inspected:
        from offmoe.budget.inspect import inspect
        from offmoe.config import OffloadConfig
        from offmoe.hf.load.options import ModelOptions
        from offmoe.policy.eviction.registry import import_eviction

        task = self._task
        config = OffloadConfig(device=task.device)
        if task.runtime == OFFMOE:
            import_eviction(task.options.get("eviction", ""))
            config = replace(config, device_memory=task.device_memory, **task.options)
        return inspect(task.model, config, dtype=task.dtype, asked=ModelOptions(plain=True))

    def _stock(self) -> Any:
        """The model in transformers with accelerate's offload: first on the device, then in RAM, then on disk."""
        from offmoe.hf.load.generation import plain_generation

        inspected, task = self._inspected, self._task
        budget: dict[int | str, int] = {"cpu": task.device_memory}
        if not inspected.backend.unified_memory:
            ram = int(psutil.virtual_memory().available * 0.7)
            budget = {inspected.backend.device.index: task.device_memory, "cpu": ram}
        load: Callable[..., Any] = inspected.model_class.from_pretrained
        model = load(
            inspected.folder,
            config=inspected.hf_config,
            dtype=inspected.dtype,
            device_map="auto",
            max_memory=budget,
            offload_folder=task.scratch,
            generation_config=plain_generation(inspected.generation_folder, inspected.hf_config),
        )
        # As offmoe does. For one row of bf16 on a CPU, torch uses another kernel, with other last bits, for weights
        # that could have a gradient, even if none is computed.
        model.requires_grad_(False)
        model.eval()
        return model

    def _experts(self) -> list[Any]:
        from offmoe.hf.adapters.find import find_experts

        modules = find_experts(self.model)
        return [modules[layer.name] for layer in self._inspected.catalog.layers]

    def _replay(self) -> Any:
        from offmoe.hf.replay import ReplayedRouting
        from offmoe.trace.trace import read_trace

        replayed = ReplayedRouting(read_trace(self._task.routing), self._inspected.catalog.shape)
        replayed.attach(self._experts())
        if self._offload is not None:
            self._offload.predict_with(replayed)
        return replayed


class _Watch:
    """Logits processor that records the time, the likeliest token and a digest of the logits, and can force a token.

    Attributes:
        blocks: whether the model emits blocks of tokens, with logits [1, n, V] in place of [1, V].
        prefilled: statistics after the prompt.
    """

    blocks = False

    def begin(self, forced: tuple[int, ...], stats: Callable[[], Any]) -> None:
        self._forced, self._stats = forced, stats
        self.digest = hashlib.sha256()
        self.tokens: list[int] = []
        self.prefilled: Any = None
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        host = scores.float().cpu()  # on a GPU this waits for the logits
        self.times.append(time.perf_counter())
        if self.prefilled is None:
            self.prefilled = self._stats()
        self.digest.update(host.numpy().tobytes())
        self.tokens += host.argmax(dim=-1).flatten().tolist()
        self.blocks = scores.ndim == 3
        if self.blocks and self._forced:
            raise ConfigError("the model emits blocks of tokens, so tokens cannot be forced on it.")
        token = len(self.times) - 2
        if token < len(self._forced):
            scores = scores.new_full(scores.shape, -float("inf"))
            scores[:, self._forced[token]] = 0
        return scores


def _read_bytes() -> int | None:
    """Bytes that this process read from disk; None if the system does not tell."""
    try:
        return int(psutil.Process().io_counters().read_bytes)
    except (AttributeError, psutil.Error):
        return None


def _rss_peak() -> int:
    with suppress(ImportError):
        import resource

        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return int(psutil.Process().memory_info().rss)
