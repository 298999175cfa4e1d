"""`offmoe generate MODEL PROMPT`: text on stdout as it comes, then on stderr what the expert cache did.

stdout is the text and nothing else (with `--json` the JSON object), so that it can be piped. Bound: generating. Times:
the first token counts from the call of generate() to its arrival, the rate is that of the tokens after it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from offmoe.cli import options
from offmoe.cli.output import Output, percent
from offmoe.config import format_size
from offmoe.errors import CapacityError, CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offmoe.offload import Offload
    from offmoe.types import CacheStats

DEFAULT_NEW_TOKENS = 128
COLDEST = 1e-6
"""Temperature. Below it sampling is greedy to the last digit, and far below it logits overflow."""


def parser() -> options.Parser:
    parser = options.Parser("generate", "Continue a prompt with a model whose experts stay outside the device.")
    options.add_loading(parser)
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="the text; '-' reads stdin (a final newline is dropped)"
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file instead")
    group = parser.add_argument_group("generating")
    group.add_argument("--max-new-tokens", type=options.positive, metavar="N", help=f"default: {DEFAULT_NEW_TOKENS}")
    group.add_argument("--temperature", type=float, metavar="T", help="sample at this temperature (default: greedy)")
    group.add_argument("--top-k", type=options.positive, metavar="K", help="with --temperature: only the K most likely")
    group.add_argument("--top-p", type=float, metavar="P", help="with --temperature: only the likeliest that make up P")
    group.add_argument("--seed", type=int, metavar="N", help="of sampling; the same seed gives the same text")
    group.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="wrap the prompt as the tokenizer's template says (default: if it has one)",
    )
    group.add_argument("--trace", metavar="FILE", help="record the routing into this .npz file")
    options.add_cache(parser)
    return parser


def run(args: argparse.Namespace, out: Output) -> None:
    config, hub = options.offload_config(args), options.hub_options(args)
    sampling = _sampling(args)
    prompt = _prompt(args)
    import torch

    from offmoe.api import inspect, load
    from offmoe.cli.libraries import hide_bars, quiet

    quiet(args.verbose)
    inspected = inspect(args.model, config, dtype=args.dtype, **hub)
    tokenizer = _tokenizer(inspected.folder)
    ids = _encode(tokenizer, prompt, args.chat_template)
    new_tokens = _room(args.max_new_tokens, ids.shape[1], inspected.plan.max_context, out)
    out.note(f"memory on {inspected.config.device}: {inspected.plan.describe()}")
    hide_bars()
    model = load(inspected, name=args.model, trace=args.trace)
    offload = cast("Offload", model.offload)
    with offload:
        _check_vocabulary(model, ids)
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
            trace.pieces.update({token: str(tokenizer.decode([token])) for token in trace.tokens_seen()})
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


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Options of generate(); where nothing is asked, the checkpoint's generation_config decides how to sample."""
    temperature = 0.0 if args.temperature is None else args.temperature
    if not 0.0 <= temperature < float("inf"):
        raise ConfigError(f"--temperature {temperature} must be 0 (greedy) or a positive number.")
    if 0.0 < temperature < COLDEST:
        raise ConfigError(f"--temperature {temperature} is too close to 0 to divide by; use 0 (greedy) for that.")
    if args.top_p is not None and not 0.0 < args.top_p <= 1.0:
        raise ConfigError(f"--top-p {args.top_p} must be above 0 and at most 1.")
    if args.seed is not None and not 0 <= args.seed < 1 << 63:
        raise ConfigError(f"--seed {args.seed} must be from 0 to 2**63 - 1.")
    if temperature == 0.0:
        for option in ("top_k", "top_p"):
            if getattr(args, option) is not None:
                raise ConfigError(
                    f"--{option.replace('_', '-')} works with sampling only; give --temperature T as well."
                )
        return {"do_sample": False}
    chosen = {name: getattr(args, name) for name in ("top_k", "top_p") if getattr(args, name) is not None}
    return {"do_sample": True, "temperature": temperature, **chosen}


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tokenizer_config.json")
    there = [name for name in names if (folder / name).is_file()]
    if not there:
        raise CheckpointError(f"{folder}: has no tokenizer; add the model's tokenizer.json and tokenizer_config.json.")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        raise CheckpointError(
            f"{folder}: the tokenizer ({', '.join(there)}) cannot be loaded: {str(error).strip().split(chr(10))[0]}. "
            "Download tokenizer.json and tokenizer_config.json of the model again."
        ) from error


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None) -> Tensor:
    """Token ids int64 [1, n] of the prompt."""
    encoded: Any
    if chat and not tokenizer.chat_template:
        raise ConfigError("--chat-template: the model's tokenizer has none; leave the option out.")
    if chat or (chat is None and tokenizer.chat_template):
        try:
            encoded = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except Exception as error:  # a template is a program of the checkpoint's author: it can fail in any way
            raise CheckpointError(f"the tokenizer's chat template fails ({error}); use --no-chat-template.") from error
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise ConfigError("PROMPT has no tokens; there is nothing to continue.")
    return ids.long()


def _room(asked: int | None, prompt_tokens: int, context: int, out: Output) -> int:
    """New tokens that the reserved context allows; the last one is not fed back and needs none of it."""
    room = context - prompt_tokens + 1
    if room < 1 or (asked is not None and asked > room):
        needed = prompt_tokens + (asked or 1) - 1
        raise CapacityError(
            f"{prompt_tokens} prompt tokens and {asked or 1} new ones do not fit the {context} tokens of context that "
            f"memory is reserved for; use --max-context {needed}, a shorter prompt or fewer --max-new-tokens."
        )
    if asked is None and room < DEFAULT_NEW_TOKENS:
        out.note(f"at most {room} new tokens: memory is reserved for {context} tokens of context (--max-context).")
    return asked or min(room, DEFAULT_NEW_TOKENS)


def _check_vocabulary(model: PreTrainedModel, ids: Tensor) -> None:
    size = cast("Tensor", model.get_input_embeddings().weight).shape[0]
    if int(ids.max()) >= size:
        raise CheckpointError(
            f"the tokenizer gives token {int(ids.max())}, the model knows {size} tokens; tokenizer and weights are "
            "not of the same model. Download both again."
        )


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
