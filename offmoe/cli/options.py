"""Options that several verbs share, named as in Python but with dashes. Their help texts are those of OffloadConfig.

This module refuses text that cannot be converted to an option's type. OffloadConfig and CacheOptions check the values,
so that Python and the command line refuse the same things. Must not import torch or transformers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

from offmoe.cli.option_docs import flag, help_text
from offmoe.config import OffloadConfig
from offmoe.errors import ConfigError
from offmoe.text import command_words, did_you_mean

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

MODEL_HELP = "a folder, a .gguf file, a Hub id, or 'demo', the small model that comes with offmoe"


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would exit. Allows no abbreviations, which new options would break."""

    def __init__(self, verb: str, description: str):
        super().__init__(prog=f"offmoe {verb}", description=description, allow_abbrev=False)
        self.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
        self.add_argument("-v", "--verbose", action="store_true", help="log each step to stderr")

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help; an error of the output is raised, where argparse would ignore it."""
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


def add_cache(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Options of the cache's decisions, for a run and for a simulation. default: a text in place of OffloadConfig's."""
    group = parser.add_argument_group("expert cache")
    _add(group, "slots_per_layer", "N[,N...]", _slots, default)
    _add(group, "eviction", "POLICY", eviction, default)
    _add(group, "scope", "SCOPE", default=default)
    _add(group, "prefetch", "N", number_or_text, default)
    _add(group, "on_miss", "HOW", default=default)
    _add(group, "lag", "N", number_or_text, default)
    _add(group, "profile", "FILE")


def add_graphs(group: argparse._ArgumentGroup) -> None:
    """The option of a verb that decodes on a StaticCache where it is given."""
    _add(group, "cuda_graphs", "HOW")


def add_state(parser: argparse.ArgumentParser) -> None:
    """Options of a verb that begins where the last run ended."""
    group = parser.add_argument_group("warm start")
    _add(group, "state", "FILE")
    form = "neither use nor keep a state: experts are read in the background in the order of the files"
    group.add_argument("--no-state", action="store_true", help=form)


def add_loading(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Options of a model and of the memory it may use. required: the verb cannot do without a model."""
    parser.add_argument("model", metavar="MODEL", nargs=None if required else "?", help=MODEL_HELP)
    group = parser.add_argument_group("memory")
    _add(group, "device", "DEVICE")
    _add(group, "device_memory", "SIZE", number_or_text)
    _add(group, "host_memory", "SIZE", number_or_text)
    _add(group, "max_context", "TOKENS", positive)
    _add(group, "prefill_chunk", "TOKENS", positive)
    group = parser.add_argument_group("computing")
    _add(group, "experts", "FORM")
    _add(group, "dense", "FORM")
    _add(group, "exactness", "HOW")
    _add(group, "activations", "FORM")
    form = "compute in bfloat16, float16 or float32 (default: the checkpoint's dtype)"
    add_option(group, "--dtype", "DTYPE", form)
    add_hub(parser)


def add_hub(parser: argparse.ArgumentParser) -> None:
    """Options of a download."""
    group = parser.add_argument_group("Hugging Face Hub")
    add_option(group, "--revision", "NAME", "branch, tag or commit (default: main)")
    add_option(group, "--gguf-file", "NAME", "the GGUF file that is meant, where a folder or repository has several")
    group.add_argument("--local-files-only", action="store_true", help="use what is on this machine, never the network")


def offload_config(args: argparse.Namespace) -> OffloadConfig:
    """The options of a run as they were given; ConfigError for those that cannot be used."""
    return OffloadConfig().overridden(**{f.name: getattr(args, f.name, None) for f in fields(OffloadConfig) if f.init})


def hub_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the download, as `offmoe.budget.inspect.inspect` takes them."""
    return {"revision": args.revision, "local_files_only": args.local_files_only, "gguf_file": args.gguf_file}


def model_words(args: argparse.Namespace) -> str:
    """MODEL and the options that say which files are meant, as words of a command."""
    given = {name: getattr(args, name, None) for name in ("revision", "gguf_file")}
    return command_words(args.model, **given)


def _add(
    group: argparse._ArgumentGroup,
    name: str,
    metavar: str,
    type: Callable[[str], Any] = str,
    default: str | None = None,
) -> None:
    """Add the option of `OffloadConfig` of that name."""
    add_option(group, flag(name), metavar, help_text(name, default), type)


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


def number_or_text(text: str) -> int | str:
    """A whole number, or a text such as 'auto' or '8GiB' that the option checks itself; a type for argparse."""
    return int(text) if text.isdecimal() else text


def positive(text: str) -> int:
    """A whole number above 0; a type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def add_option(
    group: argparse._ActionsContainer,
    name: str,
    metavar: str,
    text: str,
    convert: Callable[[str], Any] = str,
    default: Any = None,
) -> None:
    """Add an option that takes a value. text: its help; convert: a type for argparse."""
    group.add_argument(name, type=convert, default=default, metavar=metavar, help=text)


def add_list(
    group: argparse._ActionsContainer, name: str, metavar: str, text: str, convert: Callable[[str], Any]
) -> None:
    """Add an option of values separated by commas, each converted, without duplicates."""

    def values(given: str) -> list[Any]:
        return list(dict.fromkeys(convert(part) for part in given.split(",")))

    add_option(group, name, metavar, text, values)
