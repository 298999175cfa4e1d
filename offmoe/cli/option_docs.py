"""What the options mean: read from the docstring of `OffloadConfig`, the one place where they are described.

The help texts of the verbs and the pages docs/options.md and docs/cli.md are made from it.
"""

from __future__ import annotations

import re
from inspect import cleandoc
from typing import NamedTuple

from offmoe.config import OffloadConfig

_ENTRY = re.compile(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", re.MULTILINE | re.DOTALL)
_PARTS = re.compile(r"(?P<meaning>.*?)(?: Default: (?P<default>.*?)\.)?(?: Errors: (?P<errors>.*)\.)?$")


class OptionDoc(NamedTuple):
    """The description of one option, without final full stops."""

    meaning: str
    default: str
    errors: str


def option_docs() -> dict[str, OptionDoc]:
    """The description of every option of `OffloadConfig`, by name; empty if docstrings were stripped (python -OO)."""
    text = cleandoc(OffloadConfig.__doc__ or "").partition("Args:\n")[2].partition("\nRaises:")[0]
    docs = {}
    for name, entry in _ENTRY.findall(text):
        parts = _PARTS.match(" ".join(entry.split()))
        assert parts is not None, name
        docs[name] = OptionDoc(parts["meaning"].rstrip("."), parts["default"] or "", parts["errors"] or "")
    return docs


def help_text(name: str, default: str | None = None) -> str:
    """The description of an option as the command line says it: with dashes in names and without quotes.

    default: a text in place of OffloadConfig's default.
    """
    doc = option_docs().get(name)
    if doc is None:
        return ""
    default = default or doc.default
    text = doc.meaning[0].lower() + doc.meaning[1:] + (f" (default: {default})" if default else "")
    for option in OffloadConfig.__dataclass_fields__:
        text = re.sub(rf'\b{option}="([\w-]+)"', rf"{flag(option)} \1", text)
        if "_" in option:
            text = re.sub(rf"\b{option}\b", flag(option), text)
    return text.replace('"', "").replace("`", "").replace("%", "%%")


def flag(option: str) -> str:
    """The option's name on the command line."""
    return f"--{option.replace('_', '-')}"
