"""Texts for people: sizes, shares, ranges, and the word that a misspelt one may have meant."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable
from difflib import get_close_matches

from offmoe.errors import ConfigError

LARGEST = 2**63 - 1
"""Most bytes or tokens that an option takes. A larger number is a typing error, and sums of it would overflow."""
_UNITS = {"": 1} | {
    prefix + binary: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for binary, base in (("", 1000), ("I", 1024))
}
"""Bytes of each unit, without its B, in capital letters."""


def parse_size(value: int | str, option: str) -> int:
    """The bytes that a size names.

    Args:
        value: Bytes (10737418240), or text with a unit ("10GiB", "10 GB", "512M").
        option: Name for the error message.

    Raises:
        ConfigError: `value` is not a size of 1 to 2**63 - 1 bytes.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(value), re.IGNORECASE)
    size = float(match[1]) * _UNITS[match[2].upper()] if match and match[2].upper() in _UNITS else 0
    if not 1 <= size <= LARGEST:
        raise ConfigError(f"{option}={value!r} is not a size. Use bytes or a number with a unit, such as '10GiB'.")
    return int(size)


def format_size(size: float) -> str:
    """Bytes with a unit: 1610612736 is '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def size_option(size: int) -> str:
    """The shortest spelling of a size option that is at least `size` bytes: 1610612737 is '1.6GiB'."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= scale:
            tenths = -(-size * 10 // scale)
            return f"{tenths // 10}.{tenths % 10}{unit}"
    return str(size)


def percent(share: float) -> str:
    """A share in percent: 0.616 is '61.6 %'."""
    return f"{100 * share:.1f} %"


def or_dash(value: float | None, form: Callable[[float], str] = percent, dash: str = "-") -> str:
    """A value in the given form, in percent if none is given; a dash if the value is unknown."""
    return dash if value is None else form(value)


def span(values: tuple[int, ...]) -> str:
    """The range of some values: '8' if all are equal, else '2-8'."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def plain(values: tuple[int, ...]) -> int | list[int]:
    """One int if all layers agree, else one per layer: the form of JSON output and of traces."""
    return values[0] if len(set(values)) == 1 else list(values)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: " (did you mean 'prefetch'?)", or "" if no known word is close."""
    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def command_words(model: str | os.PathLike[str], *, revision: str | None = None, gguf_file: str | None = None) -> str:
    """MODEL of a command and the options that say which of its files are meant, quoted for a shell."""
    given = {"--revision": revision, "--gguf-file": gguf_file}
    return shlex.join([os.fspath(model), *(word for name, value in given.items() if value for word in (name, value))])
