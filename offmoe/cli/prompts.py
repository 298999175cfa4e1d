"""Prompts of the verbs that generate: reading, encoding and checking them, and the options of generating.

A prompt is never shortened to fit, and the format of a file is never guessed from its content.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from offmoe.cli import options
from offmoe.cli.option_docs import flag
from offmoe.cli.output import Output
from offmoe.errors import CapacityError, CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offmoe.budget.inspect import Inspected


DEFAULT_NEW_TOKENS = 128
COLDEST = 1e-6
"""Lowest temperature. Below it sampling equals greedy decoding, and far below it logits overflow."""
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file: a text, or the messages of a chat. `where`: for messages about it, 'FILE, line 3'."""

    content: str | list[dict[str, str]]
    where: str


def add_generating(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Options of generating; the group, so that a verb can add its own."""
    group = parser.add_argument_group("generating")
    number, add = options.positive, options.add_option
    add(group, "--max-new-tokens", "N", f"tokens to generate at most (default: {DEFAULT_NEW_TOKENS})", number)
    add(group, "--temperature", "T", "sample at this temperature (default: greedy)", float)
    add(group, "--top-k", "K", "with --temperature: sample from the K likeliest tokens", number)
    likeliest = "with --temperature: sample from the likeliest tokens whose probabilities add up to P"
    add(group, "--top-p", "P", likeliest, float)
    add(group, "--seed", "N", "seed of sampling; the same seed gives the same text", int)
    group.add_argument(
        "--no-generation-config",
        action="store_true",
        help="leave out what the model's generation_config.json sets, such as beams; special tokens stay",
    )
    group.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="format the prompt with the tokenizer's chat template (default: if there is one)",
    )
    return group


def read_text(path: str, option: str) -> str:
    """The text of a file, or of stdin for '-'. ConfigError, which names the option, if it is not text in UTF-8."""
    try:
        if path == "-":
            return "" if sys.stdin is None else sys.stdin.read()
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"{option} {path}: not text in UTF-8 ({error}).") from error


def read_prompts(path: str, paragraphs: bool) -> list[Prompt]:
    """The prompts of a file ('-': text on stdin): JSON lines if its name ends in .jsonl or .ndjson, else text.

    Text holds one prompt per line, or with `paragraphs` one per run of lines between blank ones. JSON lines hold
    {"prompt": text} or {"messages": [{"role", "content"}, ...]}. ConfigError naming the line for anything else."""
    text = read_text(path, "--prompts")
    lines = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), start=1)]
    if path.endswith(JSON_LINES):
        if paragraphs:
            raise ConfigError("--paragraphs is for prompts in plain text; a line of JSON is one prompt already.")
        prompts = [_from_json(line, where) for where, line in lines if line.strip()]
    elif paragraphs:
        prompts = _paragraphs(lines)
    else:
        prompts = [Prompt(line.rstrip("\r"), where) for where, line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {path}: holds no prompt; write one per line.")
    for prompt in prompts:
        if any("\ud800" <= char <= "\udfff" for char in str(prompt.content)):
            raise ConfigError(f"--prompts {prompt.where}: not valid UTF-8.")
    return prompts


def _from_json(line: str, where: str) -> Prompt:
    wanted = 'write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--prompts {where}: not JSON ({error}); {wanted}.") from None
    prompt, messages = (value.get("prompt"), value.get("messages")) if isinstance(value, dict) else (None, None)
    if isinstance(prompt, str) and prompt.strip():
        return Prompt(prompt, where)
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return Prompt(messages, where)
    raise ConfigError(f"--prompts {where}: no prompt in it; {wanted}.")


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def _paragraphs(lines: Sequence[tuple[str, str]]) -> list[Prompt]:
    prompts = []
    for is_text, block in groupby(lines, key=lambda line: bool(line[1].strip())):
        if is_text:
            places, texts = zip(*block, strict=True)
            prompts.append(Prompt("\n".join(text.rstrip("\r") for text in texts), places[0]))
    return prompts


def sampling(args: argparse.Namespace) -> dict[str, Any]:
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
    chosen = {name: getattr(args, name) for name in ("top_k", "top_p") if getattr(args, name) is not None}
    if temperature:
        return {"do_sample": True, "temperature": temperature, **chosen}
    for option in chosen:
        raise ConfigError(f"{flag(option)} works with sampling only; give --temperature T as well.")
    return {"do_sample": False}


def tokenizer_of(inspected: Inspected) -> PreTrainedTokenizerBase:
    """The tokenizer of an inspected model. A GGUF file on the Hub, which holds it, is downloaded first."""
    source = inspected.source
    if source.file is not None and not source.file.exists():
        source.fetch(inspected.checkpoint)
    from offmoe.hf.load.tokenizer import load_tokenizer

    return load_tokenizer(source.model, source.beside)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], chat: bool | None) -> Tensor:
    """Token ids int64 [1, n] of a text or of a chat's messages. chat: use the template; None: if there is one."""
    encoded: Any
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    templates: Any = tokenizer.chat_template  # several by name, of which messages alone take the default one
    has_template = "default" in templates if isinstance(templates, dict) else bool(templates)
    if messages is prompt and (chat is False or not has_template):
        raise ConfigError("messages need the chat template of the model's tokenizer; give a text as 'prompt' instead.")
    if chat and not has_template:
        raise ConfigError("--chat-template: the model's tokenizer has none; leave the option out.")
    if chat or (chat is None and has_template):
        try:
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except Exception as error:  # a template is a program of the checkpoint's author: it can fail in any way
            raise CheckpointError(f"the tokenizer's chat template fails ({error}); use --no-chat-template.") from error
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise ConfigError("PROMPT has no tokens; there is nothing to continue.")
    return ids.long()


def fitting_tokens(limit: int | None, prompt_tokens: int, context: int, out: Output, rows: int = 1) -> int:
    """New tokens that the reserved context allows. The last one is not fed back, so it needs no room.

    Args:
        limit: New tokens that are asked for; None: as many as fit, but not more than the default.
        prompt_tokens: Tokens of the prompt.
        context: Tokens that memory is reserved for.
        out: Where it is said that the context allows less than the default.
        rows: Sequences that are computed at the same time, each with a context of its own.

    Raises:
        CapacityError: The reserved context is too short.
    """
    room = context // rows - prompt_tokens + 1
    if room < 1 or (limit is not None and limit > room):
        needed = rows * (prompt_tokens + (limit or 1) - 1)
        times = f", times {rows} sequences," if rows > 1 else ""
        raise CapacityError(
            f"{prompt_tokens} prompt tokens and {limit or 1} new ones{times} do not fit the {context} tokens of "
            f"context that memory is reserved for; use --max-context {needed}, a shorter prompt or fewer "
            "--max-new-tokens."
        )
    if limit is None and room < DEFAULT_NEW_TOKENS:
        out.note(f"at most {room} new tokens: memory is reserved for {context} tokens of context (--max-context).")
    return limit or min(room, DEFAULT_NEW_TOKENS)


def seed(value: int | None) -> None:
    """Seed sampling; None: by chance."""
    import torch

    if value is None:
        torch.seed()
    else:
        torch.manual_seed(value)


class NewTokens:
    """A streamer for `generate` that gives new tokens to `add`. transformers puts the prompt first."""

    _is_prompt = True

    def add(self, tokens: Tensor) -> None:
        """Take the tokens that one step generated."""

    def put(self, tokens: Tensor) -> None:
        """Called by transformers with the prompt, then with every new token."""
        if not self._is_prompt:
            self.add(tokens)
        self._is_prompt = False

    def end(self) -> None:
        """Called by transformers after the last token."""


def check_vocabulary(model: PreTrainedModel, ids: Tensor) -> None:
    size = cast("Tensor", model.get_input_embeddings().weight).shape[0]
    if int(ids.max()) >= size:
        raise CheckpointError(
            f"the tokenizer gives token {int(ids.max())}, the model knows {size} tokens; tokenizer and weights are "
            "not of the same model. Download both again."
        )


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> dict[int, str]:
    """The text of each token by itself, with the space that starts a word where the vocabulary has one."""
    texts = {}
    for token in tokens:
        text = str(tokenizer.decode([token]))
        raw = tokenizer.convert_ids_to_tokens(token)
        # A decoder that joins words drops the space before the first one, which is the only one here.
        starts = isinstance(raw, str) and raw.startswith("\u2581") and not text.startswith(" ")
        texts[token] = " " + text if starts else text
    return texts
