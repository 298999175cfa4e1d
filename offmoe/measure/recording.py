"""Records what a model computes for some requests, and finds the first difference between two recordings.

A recording holds the logits of every step, and a checksum per token of what every decoder layer gave. The checksums
stay on the device until the end, because fetching them would make the host wait for each layer. This module loads no
model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LogitsProcessorList

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> the integer that has its bits."""
LEAST_LOG = -1e4
"""Log-probability of a token that is excluded: its share is 0, and no difference with it is NaN."""


class Request(NamedTuple):
    """Prompts of one length, and how many tokens to decode after them.

    Args:
        ids: token ids int64 [rows, length].
        tokens: number of steps.
    """

    ids: torch.Tensor
    tokens: int


class Answer(NamedTuple):
    """What a model computed for one request.

    Args:
        logits: float32 [rows, vocabulary] per step, on the host.
        layers: by module path, per forward pass: a checksum int64 [tokens of all rows] of the layer's output, on the
            host.
    """

    logits: list[torch.Tensor]
    layers: dict[str, list[torch.Tensor]]


class Run(NamedTuple):
    """What a model computed for all requests. `tokens`: the likeliest tokens [rows], per step and request."""

    answers: list[Answer]

    @property
    def tokens(self) -> list[list[torch.Tensor]]:
        return [[step.argmax(-1) for step in answer.logits] for answer in self.answers]

    def digest(self) -> str:
        """Equal for two runs whose logits are equal bit for bit."""
        digest = hashlib.sha256()
        for answer in self.answers:
            for step in answer.logits:
                digest.update(step.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Difference:
    """How a run differs from the reference.

    Args:
        request: number of the first request that differs, from 0.
        step: the first step of it that differs, from 0, which is the pass of the prompt.
        row: the first row of the batch whose logits differ in that step, from 0; None if only layers differ there.
        layer: module path of the first decoder layer whose output differs in that step; None if not known.
        tokens: steps times rows whose likeliest token differs, in all requests; None if the runs have other lengths.
        steps: steps times rows that were compared.
        largest: largest absolute difference of a logit.
        divergence: mean KL(reference, run) in nats per token.
        digest: of the run's logits.
    """

    request: int
    step: int
    row: int | None
    layer: str | None
    tokens: int | None
    steps: int
    largest: float
    divergence: float
    digest: str

    def __str__(self) -> str:
        if self.tokens is None:
            return f"request {self.request + 1} has another number of steps or rows"
        row = "" if self.row is None else f", row {self.row + 1}"
        layer = "" if self.layer is None else f", from {self.layer} on"
        return (
            f"first at new token {self.step + 1} of request {self.request + 1}{row}{layer}; {self.tokens} of "
            f"{self.steps} tokens differ, "
            f"logits by up to {self.largest:.3g}, KL {self.divergence:.3g} nats per token"
        )

    def to_dict(self) -> dict[str, Any]:
        """The difference for JSON."""
        finite = {"largest": self.largest, "divergence": self.divergence}
        return {**asdict(self), **{name: value if value < float("inf") else None for name, value in finite.items()}}


def record(
    model: Any,
    requests: Sequence[Request],
    layers: Sequence[str],
    forced: list[list[torch.Tensor]] | None = None,
    cache: str | None = None,
) -> Run:
    """Decode all requests greedily.

    Args:
        model: of transformers, stock or offloaded.
        requests: prompts, and how many tokens to decode.
        layers: module paths of the decoder layers to watch.
        forced: the tokens that the model is given in place of its own, per request and step; None: its own.
        cache: the KV cache's kind, as `generate` takes `cache_implementation`; None: the model's own.
    """
    kind = {} if cache is None else {"cache_implementation": cache}
    answers = []
    for number, request in enumerate(requests):
        torch.manual_seed(0)  # a block-diffusion model begins with random tokens
        ids = request.ids.to(model.device)
        watch = _Logits(None if forced is None else forced[number])
        with _checksums(model, layers) as sums:
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                max_new_tokens=request.tokens,
                min_new_tokens=request.tokens,
                logits_processor=LogitsProcessorList([watch]),
                disable_compile=True,
                **kind,
            )
        answers.append(Answer(watch.steps, {name: [rows.cpu() for rows in passes] for name, passes in sums.items()}))
    return Run(answers)


class _Logits:
    """Logits processor that keeps the logits of each step, and can force its tokens."""

    def __init__(self, forced: list[torch.Tensor] | None) -> None:
        self._forced = forced
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = len(self.steps)
        self.steps.append(scores.float().cpu().flatten(0, -2))  # the host waits, as it does for every token
        if self._forced is None or step >= len(self._forced) or scores.ndim != 2:  # a block of tokens is not forced
            return scores
        only = scores.new_full(scores.shape, -float("inf"))
        return only.scatter_(1, self._forced[step].to(scores.device)[:, None], 0.0)


@contextmanager
def _checksums(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Watch layers while the block runs; yields the checksums of each pass by layer, which stay on the device."""
    sums: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    factors: dict[int, torch.Tensor] = {}

    def keep(name: str, module: nn.Module, given: object, output: object) -> None:
        rows = output[0] if isinstance(output, tuple | list) else output
        if isinstance(rows, torch.Tensor):
            if rows.shape[-1] not in factors:  # once: the host waits for this copy
                factors[rows.shape[-1]] = checksum_factors(rows.shape[-1]).to(rows.device)
            sums[name].append(checksum(rows, factors[rows.shape[-1]]))

    hooks = [model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in layers]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def checksum_factors(width: int) -> torch.Tensor:
    """Odd numbers int64 [width], the same ones in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(1 << 62), 1 << 62, (width,), generator=generator) * 2 + 1


def checksum(rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """A checksum of the bits of each row.

    Args:
        rows: [..., H], of any dtype.
        factors: odd numbers int64 [H], on the same device.

    Returns:
        int64 [n], on the same device: the sum of the bits of the H elements, each times its factor, modulo 2^64.
    """
    bits = rows.detach().reshape(-1, rows.shape[-1]).contiguous().view(BITS[rows.element_size()])  # [n, H]
    return (bits.long() * factors).sum(-1)


def difference(reference: Run, run: Run) -> Difference | None:
    """The first difference of a run from the reference, and how large all of them are; None if there is none."""
    first: tuple[int, int, int | None, str | None] | None = None
    tokens = steps = 0
    largest = divergence = 0.0
    for number, (want, got) in enumerate(zip(reference.answers, run.answers, strict=True)):
        if [a.shape for a in want.logits] != [b.shape for b in got.logits]:
            return Difference(number, 0, None, None, None, steps, largest, divergence, run.digest())
        first = first or _first(number, want, got)
        for a, b in zip(want.logits, got.logits, strict=True):
            steps += len(a)
            tokens += int((a.argmax(-1) != b.argmax(-1)).sum())
            apart = torch.where(a == b, 0.0, (a - b).abs()).max().item()  # excluded tokens are -inf in both
            largest = max(largest, float("inf") if apart != apart else apart)
            divergence += _divergence(a, b)
    if first is None:
        return None
    mean = divergence / steps
    return Difference(*first, tokens, steps, largest, float("inf") if mean != mean else mean, run.digest())


def _first(number: int, want: Answer, got: Answer) -> tuple[int, int, int | None, str | None] | None:
    """The first request, step, row and layer in which two answers differ."""
    layer, layer_step = _first_layer(want, got)
    for step, (a, b) in enumerate(zip(want.logits, got.logits, strict=True)):
        if layer is not None and layer_step < step:  # the logits of that step were equal all the same
            return number, layer_step, None, layer
        rows = (a.view(torch.int32) != b.view(torch.int32)).any(-1).nonzero()
        if len(rows):
            return number, step, int(rows[0]), layer if layer_step == step else None
    return None if layer is None else (number, layer_step, None, layer)


def _first_layer(want: Answer, got: Answer) -> tuple[str | None, int]:
    """The first pass with a layer whose outputs differ, and its first such layer; None where passes cannot be told."""
    shapes = [[[len(rows) for rows in passes] for passes in answer.layers.values()] for answer in (want, got)]
    steps = len(want.logits)
    if shapes[0] != shapes[1] or any(len(passes) != steps for passes in want.layers.values()):
        return None, 0
    for step in range(steps):
        for name, passes in want.layers.items():
            if not torch.equal(passes[step], got.layers[name][step]):
                return name, step
    return None, 0


def _divergence(want: torch.Tensor, got: torch.Tensor) -> float:
    """Sum over rows of KL(want, got) in nats. want, got: logits float32 [rows, vocabulary]."""
    a, b = (logits.log_softmax(-1).clamp_min(LEAST_LOG) for logits in (want, got))
    return float(F.kl_div(b, a, reduction="sum", log_target=True))
