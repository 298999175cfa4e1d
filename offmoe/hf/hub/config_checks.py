"""Check config.json and generation_config.json before transformers builds anything from them.

transformers accepts any number: it builds a billion layers one after the other until the memory is full, and a token id
that is a word fails in `generate`, long after the weights were loaded. The limits are far above those of any real
model. Fields that are not known here are left to transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offmoe.errors import CheckpointError

LIMITS = {"layers": 10_000, "experts": 100_000}
"""Largest number allowed in a field whose name holds the word. The largest models have 126 layers and 2,048 experts."""
LARGEST = 2**63 - 1
"""The largest number that a tensor of token ids can hold."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens")
COUNTS = ("num_beams", "num_return_sequences", "max_new_tokens", "max_length", "top_k")
NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        CheckpointError: the file cannot be read or is not a JSON object.
        FileNotFoundError: the file does not exist.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check file and disk") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object; download it again")
    return values


def check_config(values: Mapping[str, Any], path: Path) -> None:
    """Check a model's configuration, and the configurations inside it (text_config).

    Args:
        values: the parsed config.json.
        path: the file, for messages.

    Raises:
        CheckpointError: a number of layers or experts that no model has, or a token id that is not one.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_config(value, path)
        for word, limit in LIMITS.items():
            if word in name and isinstance(value, (int, float)) and not value <= limit:
                raise _error(path, name, value, f"a number up to {limit}")
    _check_tokens(values, path)


def check_generation(folder: Path) -> None:
    """Check generation_config.json, if the folder has one.

    Raises:
        CheckpointError: `generate` could not use it.
    """
    path = folder / "generation_config.json"
    try:
        values = read_object(path)
    except FileNotFoundError:
        return
    _check_tokens(values, path)
    for name in TOKEN_LISTS:
        value = values.get(name)
        if value is not None and not (isinstance(value, list) and all(map(_is_id, value))):
            raise _error(path, name, value, "a list of token ids")
    for name in COUNTS:
        value = values.get(name)
        if value is not None and not (_is_id(value) and value >= 0):
            raise _error(path, name, value, "a whole number, 0 or more")
    for name in NUMBERS:
        value = values.get(name)
        if value is not None and not (isinstance(value, (int, float)) and abs(value) < float("inf")):
            raise _error(path, name, value, "a number")


def _check_tokens(values: Mapping[str, Any], path: Path) -> None:
    for name in TOKENS:
        value = values.get(name)
        several = name == "eos_token_id" and isinstance(value, list)
        if value is not None and not all(map(_is_id, value if several else [value])):
            raise _error(path, name, value, "a token id" + (" or a list of them" if name == "eos_token_id" else ""))


def _is_id(value: object) -> bool:
    """Whether the value is a whole number that a tensor can hold. Some models write -1 for "none"."""
    return type(value) is int and abs(value) <= LARGEST


def _error(path: Path, name: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name!r} is {repr(value)[:40]}, not {wanted}; download the file again")
