"""Read a JSON file that came with a checkpoint, and find values in it that transformers would fail on much later."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from offmoe.errors import CheckpointError

Fault: TypeAlias = tuple[str, object, str]
"""A wrong value: its name, the value, and what it should be."""
LARGEST = 2**63 - 1
"""The largest number that a tensor of token ids can hold."""
TOKENS = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
END_TOKENS = ("eos_token_id",)


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


def fault_error(path: Path, fault: Fault) -> CheckpointError:
    """The error that names a wrong value of a file."""
    name, value, wanted = fault
    return CheckpointError(f"{path}: {name!r} is {repr(value)[:40]}, not {wanted}; download the file again")


def token_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    """The special tokens that are no token ids."""
    yield from faults(values, TOKENS, is_id, "a token id")
    yield from faults(values, END_TOKENS, lambda value: is_id(value) or are_ids(value), "a token id or a list of them")


def faults(
    values: Mapping[str, Any], names: Sequence[str], is_right: Callable[[Any], bool], wanted: str
) -> Iterator[Fault]:
    """The values of these names that are neither right nor null. wanted: what they should be."""
    for name in names:
        value = values.get(name)
        if value is not None and not is_right(value):
            yield name, value, wanted


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < float("inf")


def are_ids(value: object) -> bool:
    return isinstance(value, list) and all(map(is_id, value))


def is_id(value: object) -> bool:
    """Whether the value is a whole number that a tensor can hold. Some models write -1 for "none"."""
    return type(value) is int and abs(value) <= LARGEST
