"""Options that several verbs share, under one name each: those of Python with dashes.

A value that argparse cannot turn into its type is refused here; what values mean is checked by OffloadConfig and
CacheOptions, so that Python and the command line refuse the same things. Must not import torch or transformers.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

from offmoe.config import EVICTIONS, SCOPES, OffloadConfig
from offmoe.errors import ConfigError
from offmoe.text import did_you_mean

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would exit; no abbreviations, which new options would break."""

    def __init__(self, verb: str, description: str):
        super().__init__(prog=f"offmoe {verb}", description=description, allow_abbrev=False)
        self.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
        self.add_argument("-v", "--verbose", action="store_true", help="log what happens to stderr")

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """argparse would pass over a full disk in silence."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        hint = ""
        if message.startswith(prefix):
            unknown = [word for word in message.removeprefix(prefix).split() if word.startswith("-")]
            if unknown:
                name = unknown[0].partition("=")[0]
                starts = [option for option in self._option_string_actions if option.startswith(name)]
                hint = f" (did you mean {starts[0]!r}?)" if starts else did_you_mean(name, self._option_string_actions)
        raise ConfigError(f"{message}{hint}. See '{self.prog} --help'.")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Options of the cache's decisions: the same for a run and for a simulation."""
    group = parser.add_argument_group("expert cache")
    group.add_argument(
        "--slots-per-layer",
        type=_slots,
        metavar="N[,N...]",
        help="experts resident per MoE layer: a number, or one per layer",
    )
    group.add_argument(
        "--eviction",
        type=eviction,
        metavar="POLICY",
        help=f"which expert gives up its slot: {', '.join(EVICTIONS)}, or MODULE:CLASS, a policy of your own",
    )
    group.add_argument("--scope", metavar="SCOPE", help=f"what shares slots: {', '.join(SCOPES)}")
    group.add_argument(
        "--prefetch", type=prefetch, metavar="N", help="experts fetched ahead per layer: 0 (off), N, or auto"
    )
    group.add_argument(
        "--on-miss", metavar="HOW", help="what is missed gets a slot: fetch (always), cpu (while one is free), auto"
    )
    group.add_argument("--profile", metavar="FILE", help="JSON of 'offmoe tune': tuned options, measured costs")


def add_loading(parser: argparse.ArgumentParser, *, always: bool = True) -> None:
    """Options of a model and of the memory it may use. always: the verb cannot do without a model."""
    nargs = None if always else "?"
    parser.add_argument("model", metavar="MODEL", nargs=nargs, help="a folder, a Hub id, or 'demo'")
    group = parser.add_argument_group("memory")
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    group.add_argument(
        "--device-memory",
        type=_size,
        metavar="SIZE",
        help="cap for all on the device: 8GiB (default: auto)",
    )
    group.add_argument(
        "--host-memory",
        type=_size,
        metavar="SIZE",
        help="cap for experts in RAM beside the device: 32GiB (default: auto)",
    )
    group.add_argument("--max-context", type=positive, metavar="TOKENS", help="tokens of KV cache to reserve")
    group = parser.add_argument_group("computing")
    group.add_argument("--experts", metavar="FORM", help="native: as stored in the checkpoint; int8 or int4")
    group.add_argument("--exactness", metavar="HOW", help="bitwise, numeric (sums in another order), or auto")
    group.add_argument("--activations", metavar="FORM", help="float, or int8: rounded, and faster")
    group.add_argument("--dtype", metavar="DTYPE", help="bfloat16, float16, float32 (default: the checkpoint's)")
    group = parser.add_argument_group("Hugging Face Hub")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit")
    group.add_argument("--local-files-only", action="store_true", help="never use the network")


def offload_config(args: argparse.Namespace) -> OffloadConfig:
    """The options of a run that were given; ConfigError for those that cannot be."""
    values = {f.name: getattr(args, f.name, None) for f in fields(OffloadConfig)}
    given = {name: value for name, value in values.items() if value is not None}
    return OffloadConfig(**given)


def hub_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the download, as `offmoe.budget.inspect.inspect` takes them."""
    return {"revision": args.revision, "local_files_only": args.local_files_only}


def _slots(text: str) -> int | tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or a comma-separated list of numbers") from None
    return values[0] if len(values) == 1 else values


def eviction(text: str) -> str:
    """The name of an eviction policy, a type for argparse. MODULE:CLASS is imported, also from the current folder."""
    if ":" in text:
        if os.getcwd() not in sys.path:  # as with python -m; the installed command starts without it
            sys.path.insert(0, os.getcwd())
        from offmoe.policy.eviction.registry import import_eviction

        import_eviction(text)
    return text


def prefetch(text: str) -> int | str:
    """0 (off), a number or 'auto'; a type for argparse."""
    if text == "auto":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be 'auto' or a number of experts per layer (0 = off)")
    return int(text)


def _size(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def positive(text: str) -> int:
    """A whole number above 0; a type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
