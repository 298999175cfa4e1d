"""Parses JSON by the letter, as parsers of other languages do."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Python's own parser also takes NaN, Infinity and halves of surrogate pairs, escaped or as bytes.

    Raises:
        ValueError: It is no JSON; the message says why.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # fails on halves of surrogate pairs
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error or type(error).__name__}") from None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")
