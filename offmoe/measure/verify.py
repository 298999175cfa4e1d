"""Proves on the user's machine what offmoe promises: the same tokens and logits, wherever experts are.

The model is loaded once per set-up (set_ups.py) and decodes the same prompts. The first set-up that runs is the
reference: stock transformers where it fits. Every other one is given its tokens, so that one difference does
not hide the next. Each decoder layer leaves a checksum of its output on the device; nothing waits for it, because a
wait per layer would hide a missing one.

Moves: nothing by itself; every set-up moves experts in its own way.
Bound: one load and one decode per set-up.
Must never: read or keep the state of a run, or call a set-up proven whose mechanism did not come into play.
"""

from __future__ import annotations

import copy
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from offmoe.api import load
from offmoe.budget.inspect import Inspected
from offmoe.budget.needs import catalog_needs
from offmoe.budget.resolve import check_config, divide
from offmoe.errors import CapacityError, ConfigError, out_of_memory
from offmoe.hf.adapters.find import decoder_layers
from offmoe.hf.load.generation import plain_generation
from offmoe.measure.recording import Difference, Request, Run, difference, record
from offmoe.measure.set_ups import NAMES, SetUp, set_ups
from offmoe.text import format_size

logger = logging.getLogger(__name__)

STOCK = NAMES[0]
PROMPT_TOKENS = 48
"""Tokens of the random prompt: most experts get several rows, and the smallest workspace holds it whole."""
DEFAULT_TOKENS = 16
BATCH, BATCH_TOKENS = 3, 16
"""Sequences of the second request, so that decode steps of several rows are compared too, and tokens of each prompt:
together as many as of the first."""
DIVERGENCE = 0.01
"""Most nats per token that sums in another order may cost on average. Quantizing the demo's experts to 4 bits costs
0.0124 (docs/measurements.md); one wrong expert costs much more."""
LOADING = 1.25
"""Memory that stock transformers takes while it loads, in sizes of the model."""
RAM_SHARE = 0.8


@dataclass(frozen=True)
class Outcome:
    """What one set-up gave.

    Args:
        name: of the set-up.
        what: it is, in a few words.
        status: "reference"; "same" bit for bit; "close" within the bound of numeric; "differs", a broken promise;
            "not used", equal but the mechanism did not come into play; "left out".
        reason: why it was left out or not used; "" otherwise.
        difference: from the reference; None if it was not compared, or is the same.
        stats: counts of the run, as `CacheStats.to_dict`; None without offmoe.
        seconds: loading included.
    """

    name: str
    what: str
    status: str
    reason: str = ""
    difference: Difference | None = None
    stats: dict[str, Any] | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The outcome for JSON."""
        apart = None if self.difference is None else self.difference.to_dict()
        return {**vars(self), "difference": apart, "seconds": round(self.seconds, 2)}


def verify(
    fetched: Inspected,
    *,
    tokens: int = DEFAULT_TOKENS,
    prompt: torch.Tensor | None = None,
    only: Sequence[str] = NAMES,
    numeric: bool = True,
    implementation: str | None = None,
    begins: Callable[[str], object] = lambda name: None,
) -> Iterator[Outcome]:
    """Run the model in every set-up and compare it with the reference.

    Args:
        fetched: the model, inspected and fetched (`offmoe.api.fetch`). Its options hold for every set-up.
        tokens: tokens to decode after each prompt.
        prompt: token ids int64 [1, n] to begin with; None: random ones.
        only: names of the set-ups to run.
        numeric: whether set-ups with sums in another order run as well.
        implementation: experts implementation of stock transformers; None: its default.
        begins: called with the name of each set-up before it loads.

    Yields:
        One outcome per set-up, as soon as it is known. One that does not fit is "left out".

    Raises:
        ConfigError: the prompt is too long for the model, or `only` names no set-up.
        OffmoeError: whatever else loading and running a model raise, but for a lack of memory.
    """
    unknown = [name for name in only if name not in NAMES]
    if unknown:
        raise ConfigError(f"there is no set-up {unknown[0]!r}; use some of: {', '.join(NAMES)}.")
    comparison = _Comparison(fetched, _requests(fetched, tokens, prompt), implementation)
    if STOCK in only:
        begins(STOCK)
        yield comparison.stock()
    backend = fetched.backend
    for set_up in set_ups(fetched.requested, fetched.shape, unified_memory=backend.unified_memory, numeric=numeric):
        if set_up.name in only:
            begins(set_up.name)
            yield comparison.offmoe(set_up)


def broken(outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence per broken promise, and one about what they have in common; [] if all promises were kept."""
    differing = [outcome for outcome in outcomes if outcome.status == "differs"]
    if not differing:
        return []
    lines = [f"{outcome.name}: {outcome.difference}" for outcome in differing]
    reference = next(outcome.name for outcome in outcomes if outcome.status == "reference")
    digests = {outcome.difference.digest for outcome in differing if outcome.difference is not None}
    is_alone = not any(outcome.status in ("same", "not used") for outcome in outcomes)
    if reference == STOCK and is_alone and len(differing) > 1 and len(digests) == 1:
        lines.append(
            f"the {len(differing)} set-ups agree with each other bit for bit: they all differ from {STOCK}, and where "
            "experts are makes no difference"
        )
    return lines


def _requests(fetched: Inspected, tokens: int, prompt: torch.Tensor | None) -> list[Request]:
    """One prompt alone, and several short ones at once."""
    text = fetched.hf_config.get_text_config()
    limit = fetched.needs.bytes.context_limit
    length = min(PROMPT_TOKENS, max(1, limit - tokens)) if prompt is None else prompt.shape[1]
    if length + tokens > limit:
        raise ConfigError(f"{length} prompt tokens and {tokens} new ones exceed the model's {limit}; give fewer.")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, int(text.vocab_size), (1 + BATCH, length), generator=generator)  # [1 + BATCH, n]
    first = rows[:1] if prompt is None else prompt
    batch = torch.cat([first, rows[2:]])[:, :BATCH_TOKENS]  # [BATCH, n]
    return [Request(first, tokens), Request(batch, max(1, tokens // 2))]


class _Comparison:
    """The set-ups of one model, one after the other, against the first that ran."""

    def __init__(self, fetched: Inspected, requests: list[Request], implementation: str | None) -> None:
        self._fetched, self._requests, self._implementation = fetched, requests, implementation
        self._layers = tuple(decoder_layers(fetched.meta))
        self._hf_config = copy.deepcopy(fetched.hf_config)  # before anything of offmoe is attached
        self._reference: Run | None = None
        self._is_stock = False

    def stock(self) -> Outcome:
        """Stock transformers, if it fits and can load the checkpoint."""
        what, began = "transformers without offmoe", time.monotonic()
        refusal = self._stock_refusal()
        if refusal is not None:
            return Outcome(STOCK, what, "left out", refusal)
        model = None
        try:
            model = self._load_stock()
            run = record(model, self._requests, self._layers)
        except Exception as error:  # whatever transformers says of this checkpoint on this machine
            reason = "it does not fit" if out_of_memory(error) else f"{type(error).__name__}: {error}"
            return Outcome(STOCK, what, "left out", " ".join(reason.split())[:300])
        finally:
            del model
            self._collect()
        self._is_stock = True
        return self._compared(SetUp(STOCK, what), run, time.monotonic() - began, None)

    def offmoe(self, set_up: SetUp) -> Outcome:
        """offmoe in one set-up."""
        began = time.monotonic()
        try:
            run, stats, moved = self._run(set_up)
        except CapacityError as error:
            return Outcome(set_up.name, set_up.what, "left out", str(error), seconds=time.monotonic() - began)
        outcome = self._compared(set_up, run, time.monotonic() - began, stats.to_dict())
        if outcome.status in ("same", "close") and not moved:
            return replace(outcome, status="not used", reason="nothing had to move as this set-up would move it")
        return outcome

    def _compared(self, set_up: SetUp, run: Run, seconds: float, stats: dict[str, Any] | None) -> Outcome:
        outcome = Outcome(set_up.name, set_up.what, "reference", stats=stats, seconds=seconds)
        if self._reference is None:
            self._reference = run
            return outcome
        apart = difference(self._reference, run)
        if apart is None:
            return replace(outcome, status="same")
        allowed = set_up.is_numeric or self._fetched.requested.is_numeric
        # How a quantized checkpoint is computed with is up to the kernels that stock transformers finds.
        allowed = allowed or (self._is_stock and self._fetched.quantization is not None)
        is_close = allowed and apart.tokens is not None and apart.divergence <= DIVERGENCE
        return replace(outcome, status="close" if is_close else "differs", difference=apart)

    def _run(self, set_up: SetUp) -> tuple[Run, Any, bool]:
        """Load the set-up and run it; gives too whether its mechanism was used. The model is closed again."""
        inspected = self._divided(set_up)
        model: Any = load(inspected)
        try:
            for request in self._requests:
                rows, length = request.ids.shape
                chunk = model.offload.prefill_chunk(rows, length)
                if chunk < length and not inspected.config.is_numeric:
                    raise CapacityError(f"the prompt would pass in chunks of {chunk} tokens, which rounds otherwise.")
            forced = None if self._reference is None else self._reference.tokens
            captured = model.offload.captured
            cache = None if captured is None else "static"
            run, stats = record(model, self._requests, self._layers, forced, cache), model.offload.stats()
            is_used = not set_up.captures or (captured is not None and captured.replays > 0)
            return run, stats, is_used and set_up.moved(stats)
        finally:
            model.offload.close()
            del model
            self._collect()

    def _divided(self, set_up: SetUp) -> Inspected:
        """The model with the memory divided as the set-up asks."""
        fetched, backend = self._fetched, self._fetched.backend
        asked: dict[str, Any] = {"max_context": self._context(), **set_up.options, "fill": False}
        config = replace(fetched.requested.overridden(**asked), state=None)
        check_config(config, backend)
        catalog, needs = fetched.catalog, fetched.needs
        if config.is_numeric and backend.unified_memory and not fetched.requested.is_numeric:
            catalog = catalog.for_kernels(fetched.meta)
            needs = catalog_needs(catalog, fetched.meta, fetched.dtype, fetched.stored, unified_memory=True)
            needs = needs.with_dense(fetched.meta, config.dense, fetched.dtype, catalog.stored)
        resolved, plan = divide(config, needs, backend, backend.free_bytes())
        if set_up.smallest:
            config = replace(config, device_memory=plan.smallest)
            resolved, plan = divide(config, needs, backend, backend.free_bytes())
        logger.info("%s: %s", set_up.name, plan.describe())
        return replace(
            fetched, requested=config, config=resolved, plan=plan, catalog=catalog, needs=needs, temporary=None
        )

    def _context(self) -> int | None:
        """Tokens of KV cache to reserve, unless the options say so; None for an encoder's tokens, which differ."""
        if self._fetched.requested.max_context is not None or self._hf_config.is_encoder_decoder:
            return self._fetched.requested.max_context
        return max(rows.shape[0] * (rows.shape[1] + tokens) for rows, tokens in self._requests)

    def _stock_refusal(self) -> str | None:
        """Why stock transformers is not run; None if it is."""
        fetched = self._fetched
        if fetched.requested.experts != "native":
            return f"experts={fetched.requested.experts!r} are other weights than the checkpoint's"
        if fetched.checkpoint.gguf is not None:
            return "transformers reads no experts from GGUF files as they are"
        nbytes = int(fetched.needs.parameters.total * fetched.dtype.itemsize * LOADING)
        free = int(psutil.virtual_memory().available * RAM_SHARE)
        if not fetched.backend.unified_memory:
            free = min(free, fetched.backend.auto_bytes(fetched.backend.free_bytes()))
        elif fetched.requested.device_memory != "auto":
            free = min(free, int(fetched.requested.device_memory))
        return None if nbytes <= free else f"it needs about {format_size(nbytes)}, and {format_size(free)} are free"

    def _load_stock(self) -> Any:
        fetched = self._fetched
        loading: Callable[..., Any] = fetched.model_class.from_pretrained
        model = loading(
            fetched.folder,
            config=copy.deepcopy(self._hf_config),
            dtype=fetched.dtype,
            generation_config=plain_generation(fetched.generation_folder, fetched.hf_config),
            **({} if self._implementation is None else {"experts_implementation": self._implementation}),
        )
        # As offmoe does. On a CPU, torch takes another kernel with other last bits for a weight that could have a
        # gradient, and for one at an odd address of a mapped file.
        model.requires_grad_(False).eval()
        if not fetched.backend.unified_memory:
            return model.to(fetched.backend.device)
        for weight in [*model.parameters(), *model.buffers()]:
            weight.data = weight.data.clone()
        return model

    def _collect(self) -> None:
        """Give back the memory of the model that was closed."""
        gc.collect()
        self._fetched.backend.trim()
