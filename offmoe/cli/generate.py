"""`offmoe generate MODEL PROMPT`: text on stdout as it comes, then on stderr what the expert cache did.

stdout is the text and nothing else (with `--json` the JSON object), so that it can be piped. Bound: generating. Times:
the first token counts from the call of generate() to its arrival, the rate is that of the tokens after it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from offmoe.cli import options, prompts
from offmoe.cli.output import Output
from offmoe.errors import CheckpointError, ConfigError
from offmoe.text import format_size, percent

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from offmoe.handle import Offload
    from offmoe.types import CacheStats


def parser() -> options.Parser:
    parser = options.Parser("generate", "Continue a prompt with a model whose experts stay outside the device.")
    options.add_loading(parser)
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="the text; '-' reads stdin (a final newline is dropped)"
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file instead")
    group = prompts.add_generating(parser)
    group.add_argument("--trace", metavar="FILE", help="record the routing into this .npz file")
    options.add_cache(parser)
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    config, hub = options.offload_config(args), options.hub_options(args)
    sampling = prompts.sampling(args)
    prompt = _prompt(args)
    import torch

    from offmoe.api import fetch, load
    from offmoe.budget.inspect import inspect
    from offmoe.hf.quiet import hide_bars, quiet

    quiet(args.verbose, args.json)
    inspected = inspect(args.model, config, dtype=args.dtype, **hub)
    tokenizer = prompts.load_tokenizer(inspected.folder)
    ids = prompts.encode(tokenizer, prompt, args.chat_template)
    taken = prompts.context_taken(inspected.hf_config, ids)
    new_tokens = prompts.room(args.max_new_tokens, taken, inspected.plan.max_context, out)
    out.note(f"memory on {inspected.config.device}: {inspected.plan.describe()}")
    inspected = fetch(inspected)
    hide_bars()
    model = load(inspected, name=args.model, trace=args.trace)
    offload = cast("Offload", model.offload)
    with offload:
        prompts.check_vocabulary(model, ids)
        if args.seed is None:
            torch.seed()
        else:
            torch.manual_seed(args.seed)
        ids = ids.to(model.device)
        stream = TextStream(tokenizer, out)
        try:
            cast("Callable[..., object]", model.generate)(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                streamer=stream,
                num_beams=1,  # a generation_config may ask for more, and beams cannot be streamed
                num_return_sequences=1,
                **sampling,
            )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise CheckpointError(
                "the model's probabilities are not numbers. Computing in float16 overflows in many models: try --dtype "
                "bfloat16 or float32; otherwise the weights are damaged: download them again."
            ) from error
        stats, memory, trace = offload.stats(), offload.memory(), offload.trace
        if trace is not None:
            trace.pieces.update(prompts.pieces(tokenizer, trace.tokens_seen()))
    waited = f", {stats.stall_s:.2f} s of it waiting for experts" if stats.stall_s >= 0.005 else ""
    out.details(
        _table(stats),
        f"{ids.shape[1]} prompt tokens, {stream.count} new; first after {_seconds(stream.first_s)}, "
        f"then {_rate(stream.tokens_per_s)}{waited}",
        f"read from disk {format_size(stats.disk_bytes)}, moved into slots {format_size(stats.h2d_bytes)}",
        f"memory on {offload.config.device}: {memory.describe()}",
    )
    if args.trace is not None:
        out.note(f"routing recorded in {args.trace}; replay it with: offmoe simulate {args.trace}")
    out.json(
        {
            "text": stream.text,
            "prompt_tokens": ids.shape[1],
            "new_tokens": stream.count,
            "ttft_s": stream.first_s,
            "tokens_per_s": stream.tokens_per_s,
            "stats": stats.to_dict(),
            "memory": memory.to_dict(),
        }
    )


class TextStream:
    """Streamer for `generate`: shows new tokens as text at once, and takes the times.

    Decodes a short window, so that a token costs the same however long the text is; characters that need several tokens
    wait for the last of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: Output):
        self._tokenizer, self._out = tokenizer, out
        self._ids: list[int] = []
        self._window, self._shown = 0, 0
        self._pieces: list[str] = []
        self._started = time.perf_counter()
        self._first: float | None = None
        self._last = self._started
        self._prompt_came = False

    def put(self, tokens: Tensor) -> None:
        """Called by transformers with the prompt first, then with every new token."""
        if not self._prompt_came:
            self._prompt_came = True
            return
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last
        self._ids += tokens.reshape(-1).tolist()
        new = self._undecoded()
        if new and not new.endswith("\ufffd"):
            self._show(new)
            self._window, self._shown = self._shown, len(self._ids)

    def end(self) -> None:
        """Called by transformers after the last token."""
        self._show(self._undecoded())
        self._out.text("\n")

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def count(self) -> int:
        return len(self._ids)

    @property
    def first_s(self) -> float | None:
        """From the start to the first new token; None before it."""
        return None if self._first is None else self._first - self._started

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after the first; None if there are none."""
        if self._first is None or self.count < 2:
            return None
        return (self.count - 1) / max(self._last - self._first, 1e-9)

    def _undecoded(self) -> str:
        """Text of the tokens not shown yet, as it continues what is shown."""
        before = self._decode(self._ids[self._window : self._shown])
        return self._decode(self._ids[self._window :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _show(self, piece: str) -> None:
        self._pieces.append(piece)
        self._out.text(piece)


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt_file is not None:
        if args.prompt is not None:
            raise ConfigError("PROMPT and --prompt-file are both given; use one of them.")
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8").removesuffix("\n")
        except OSError as error:
            raise ConfigError(f"--prompt-file {args.prompt_file}: cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise ConfigError(f"--prompt-file {args.prompt_file}: not text in UTF-8 ({error}).") from error
    elif args.prompt is None:
        raise ConfigError("PROMPT is missing; give a text, '-' for stdin, or --prompt-file FILE.")
    elif args.prompt == "-":
        try:
            text = "" if sys.stdin is None else sys.stdin.read().removesuffix("\n")
        except OSError as error:
            raise ConfigError(f"PROMPT on stdin cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise ConfigError(f"PROMPT on stdin is not text ({error}).") from error
    else:
        text = args.prompt
    if not text.strip():
        raise ConfigError("PROMPT is empty; there is nothing to continue.")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ConfigError("PROMPT is not valid UTF-8; check the terminal's encoding or use --prompt-file.")
    return str(text)


def _table(stats: CacheStats) -> Table:
    from rich.table import Table

    table = Table(title="expert cache", title_justify="left")
    for name in ("MoE layer", "demands", "hit rate", "pending (prefetched)", "misses", "MB moved"):
        table.add_column(name, justify="right")
    rows = [(str(i), layer) for i, layer in enumerate(stats.by_layer)] + [("all", stats)]
    for name, counts in rows:
        table.add_row(
            name,
            str(counts.demands),
            percent(counts.hit_rate),
            f"{counts.pending} ({counts.prefetched})",
            str(counts.misses),
            f"{counts.h2d_bytes / 1e6:.1f}",
            end_section=name == str(len(stats.by_layer) - 1),
        )
    return table


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s"


def _rate(tokens_per_s: float | None) -> str:
    return "no more" if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s"
