"""`offmoe generate MODEL PROMPT`: continue a prompt, then show what the expert cache did.

The text goes to stdout as it is generated, then the cache's statistics to stderr. stdout carries nothing but the text
(with `--json` the JSON object), so that it can be piped. The time to the first token counts from the call of
generate(); the rate is that of the tokens after the first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from offmoe.cli import options, prompts
from offmoe.cli.choices import say_what_is_faster
from offmoe.cli.decoding import Decoding
from offmoe.cli.model import open_model
from offmoe.cli.output import Output, new_table
from offmoe.cli.state_file import check_state
from offmoe.dialogue.decode import TextDecoder
from offmoe.errors import ConfigError
from offmoe.text import format_size, or_dash, percent

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from offmoe.device.pinning import PinProgress
    from offmoe.handle import Offload
    from offmoe.transfer.fill_queue import FillProgress
    from offmoe.types import CacheStats


def parser() -> options.Parser:
    parser = options.Parser("generate", "Continue a prompt with a model whose experts stay outside the device.")
    options.add_loading(parser)
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="the text to continue; '-' reads stdin, without its final newline"
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file instead")
    group = prompts.add_generating(parser)
    group.add_argument("--trace", metavar="FILE", help="record the routing into this .npz file")
    options.add_graphs(group)
    options.add_cache(parser)
    options.add_state(parser)
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    prompts.sampling(args)
    prompt = _prompt(args)
    check_state(args)
    with open_model(args, out, trace=args.trace) as opened:
        say_what_is_faster(args, opened.inspected, out)
        tokenizer = prompts.tokenizer_of(opened.inspected)
        ids = prompts.encode(tokenizer, prompt, args.chat_template)
        decoding = Decoding.of(args, opened.inspected, tokenizer, out)
        new_tokens = decoding.new_tokens(args.max_new_tokens, ids, opened.inspected, out)
        model, offload = opened.load(args.trace, warm=True)
        prompts.check_vocabulary(model, ids)
        prompts.seed(args.seed)
        with out.polled("filling", lambda: offload.fill_progress()[1:4:2]) as end_bar:
            clock = TextStream(tokenizer, out, end_bar) if decoding.streams else StepClock()
            sequences = decoding.generate(model, ids, new_tokens, clock)
        texts = [clock.text] if isinstance(clock, TextStream) else _show_texts(sequences, tokenizer, out)
        stats, fill, pinned = offload.stats(), offload.fill_progress(), offload.pin_progress()
        if offload.trace is not None:
            offload.trace.pieces.update(prompts.pieces(tokenizer, offload.trace.tokens_seen()))
    _show(args, out, clock, ids.shape[1], offload, stats, fill, pinned)
    out.json(
        {
            "text": texts[0],
            **({"texts": texts} if len(texts) > 1 else {}),
            "prompt_tokens": ids.shape[1],
            "new_tokens": clock.count,
            "ttft_s": clock.first_s,
            "tokens_per_s": clock.tokens_per_s,
            "stats": stats.to_dict(),
            "fill": fill._asdict(),
            "pinned": pinned._asdict(),
            "memory": offload.memory().to_dict(),
        }
    )


def _show_texts(sequences: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase, out: Output) -> list[str]:
    """Show and return texts that are known at the end only, a blank line between them. sequences: tokens of each."""
    texts = [str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)) for ids in sequences]
    out.text("\n\n".join(texts) + "\n")
    return texts


def _show(
    args: argparse.Namespace,
    out: Output,
    stream: StepClock,
    prompt_tokens: int,
    offload: Offload,
    stats: CacheStats,
    fill: FillProgress,
    pinned: PinProgress,
) -> None:
    waited = f", {stats.stall_s:.2f} s of it waiting for experts" if stats.stall_s >= 0.005 else ""
    out.details(
        _table(stats),
        f"{prompt_tokens} prompt tokens, {stream.count} new; first after "
        f"{or_dash(stream.first_s, '{:.2f} s'.format)}, "
        f"then {or_dash(stream.tokens_per_s, '{:.1f} tokens/s'.format, dash='no more')}{waited}",
        f"read from disk {format_size(stats.disk_bytes)}, moved into slots {format_size(stats.h2d_bytes)}"
        + (f"; {fill.describe()}" if fill.total_experts else "")
        + (f"; {pinned.describe()}" if pinned.pinned < pinned.total else ""),
        f"memory on {offload.config.device}: {offload.memory().describe()}",
    )
    if args.trace is not None:
        out.note(f"routing recorded in {args.trace}; replay it with: offmoe simulate {args.trace}")


class StepClock(prompts.NewTokens):
    """Counts new tokens and takes the times at which they come."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._times: list[float] = []
        self.count = 0

    def add(self, tokens: Tensor) -> None:
        """Take every new token."""
        self._times.append(time.perf_counter())
        self.count += tokens.numel()

    @property
    def first_s(self) -> float | None:
        """Seconds from the start to the first new token; None before it."""
        return self._times[0] - self._started if self._times else None

    @property
    def tokens_per_s(self) -> float | None:
        """Rate of the tokens after the first; None if there are none."""
        return (self.count - 1) / max(self._times[-1] - self._times[0], 1e-9) if self.count > 1 else None


class TextStream(StepClock):
    """Streamer for `generate`: shows new tokens as text at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: Output, on_text: Callable[[], None] = lambda: None):
        """on_text: called before text is shown, each time."""
        super().__init__()
        self._decoder = TextDecoder(tokenizer)
        self._out, self._on_text = out, on_text
        self.text = ""

    def add(self, tokens: Tensor) -> None:
        """Take every new token, and show what can be shown."""
        super().add(tokens)
        for token in tokens.reshape(-1).tolist():
            if piece := self._decoder.add(token):
                self._show(piece)

    def end(self) -> None:
        """Show the rest after the last token."""
        self._show(self._decoder.finish())
        self._out.text("\n")

    def _show(self, piece: str) -> None:
        self.text += piece
        self._on_text()
        self._out.text(piece)


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is None and args.prompt_file is None:
        raise ConfigError("PROMPT is missing; give a text, '-' for stdin, or --prompt-file FILE.")
    if args.prompt is not None and args.prompt_file is not None:
        raise ConfigError("PROMPT and --prompt-file are both given; use one of them.")
    text: str = args.prompt
    if args.prompt_file is not None:
        text = prompts.read_text(args.prompt_file, "--prompt-file").removesuffix("\n")
    elif args.prompt == "-":
        text = prompts.read_text("-", "PROMPT").removesuffix("\n")
    if not text.strip():
        raise ConfigError("PROMPT is empty; there is nothing to continue.")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ConfigError("PROMPT is not valid UTF-8; check the terminal's encoding or use --prompt-file.")
    return text


def _table(stats: CacheStats) -> Table:
    columns = ("MoE layer", "demands", "hit rate", "pending (prefetched)", "misses", "MB moved")
    table = new_table("expert cache", right=columns)
    for name, counts in [*enumerate(stats.by_layer), ("all", stats)]:
        if name == "all":
            table.add_section()
        pending, moved = f"{counts.pending} ({counts.prefetched})", f"{counts.h2d_bytes / 1e6:.1f}"
        table.add_row(str(name), str(counts.demands), percent(counts.hit_rate), pending, str(counts.misses), moved)
    return table
