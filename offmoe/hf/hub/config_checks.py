"""What config.json and generation_config.json can be asked before transformers builds anything from them.

Nothing moves. transformers takes numbers as they come: a billion layers are built one after the other until the memory
is full, and a token id that is a word fails in `generate`, long after the weights were loaded. Must never refuse what a
real model says: the limits stand far above any, and fields that are not known here are left to transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offmoe.errors import CheckpointError

LIMITS = {"layers": 10_000, "experts": 100_000}
"""By a word in the field's name. Each one is a module to build; the largest models have 126 and 2,048."""
LARGEST = 2**63 - 1
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens")
COUNTS = ("num_beams", "num_return_sequences", "max_new_tokens", "max_length", "top_k")
NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, as config files are. Raises CheckpointError if it is damaged, FileNotFoundError if not there."""
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
    """CheckpointError for a number of layers or experts that no model has, or a token id that is none. path: its file.

    values: as parsed; configs inside it (text_config) are looked at too.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_config(value, path)
        for word, limit in LIMITS.items():
            if word in name and isinstance(value, (int, float)) and not value <= limit:
                raise _error(path, name, value, f"a number up to {limit}")
    _check_tokens(values, path)


def check_generation(folder: Path) -> None:
    """CheckpointError if the folder has a generation_config.json that `generate` could not use."""
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
    """A whole number that a tensor can hold. Negative ones are in use for "none"."""
    return type(value) is int and abs(value) <= LARGEST


def _error(path: Path, name: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name!r} is {repr(value)[:40]}, not {wanted}; download the file again")
