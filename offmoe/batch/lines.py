"""The lines of a file of prompts: OpenAI's batch format, or objects with a prompt or messages."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.strict_json import parse_json
from offmoe.errors import ConfigError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENDPOINTS = (CHAT, COMPLETIONS)
NEW_TOKENS = 256
"""Tokens of an answer whose request does not say, unless another number is given."""
_ENVELOPE = frozenset(("custom_id", "method", "url", "body"))


@dataclass(frozen=True)
class Line:
    """One line of the input.

    Args:
        number: From 1.
        custom_id: What its result is known by; "line-N" if the line has none.
        url: The endpoint that answers it.
        body: The request.
        digest: Of url and body: a result belongs to the request that it answered.
        error: Why the line cannot be answered.
    """

    number: int
    custom_id: str
    url: str = ""
    body: Any = None
    digest: str = ""
    error: RequestError | None = None


def read_lines(path: str | os.PathLike[str]) -> list[Line]:
    """The lines of a file. A line that cannot be read holds its error; blank lines are skipped.

    Raises:
        ConfigError: The file cannot be read or has no line, or two lines have the same custom_id.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)}: cannot be read ({error.strerror}).") from error
    lines = [parse_line(number, text) for number, text in enumerate(raw.split(b"\n"), 1) if text.strip()]
    if not lines:
        raise ConfigError(f"{os.fspath(path)} has no lines; there is nothing to do.")
    seen: dict[str, int] = {}
    for line in lines:
        first = seen.setdefault(line.custom_id, line.number)
        if first != line.number:
            raise ConfigError(
                f"{os.fspath(path)}: lines {first} and {line.number} have the same custom_id {line.custom_id!r}; "
                "results are told apart by it."
            )
    return lines


def parse_line(number: int, text: bytes | str) -> Line:
    """The request of a line of JSON, or its error. number: of the line, from 1."""
    try:
        value = parse_json(text)
    except ValueError as error:
        reason = RequestError(str(error), code="invalid_json")
        return Line(number, f"line-{number}", error=reason)
    return line_of(number, value)


def line_of(number: int, value: Any) -> Line:
    """The request that a value of JSON holds, or its error."""
    custom_id = f"line-{number}"
    try:
        if not isinstance(value, dict):
            raise RequestError("the line has to be a JSON object.", code="invalid_json")
        custom_id = _custom_id(value, custom_id)
        url, body = _request(value)
    except RequestError as error:
        return Line(number, custom_id, error=error)
    digest = hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()[:24]
    return Line(number, custom_id, url, body, digest)


def _custom_id(value: dict[str, Any], default: str) -> str:
    custom_id = value.get("custom_id", default)
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError("custom_id has to be a text, and not an empty one.", "custom_id")
    return custom_id


def _request(value: dict[str, Any]) -> tuple[str, Any]:
    """(endpoint, body) of a line. A line without an endpoint is a body itself."""
    if "url" not in value and "body" not in value:
        body = {name: item for name, item in value.items() if name != "custom_id"}
        if "prompt" not in body and "messages" not in body:
            raise RequestError("neither url and body, nor a prompt, nor messages.")
        return CHAT if "messages" in body else COMPLETIONS, body
    unknown = [name for name in value if name not in _ENVELOPE]
    if unknown:
        raise RequestError(f"{unknown[0]}: unknown field.", unknown[0])
    url, method = value.get("url"), value.get("method", "POST")
    if url not in ENDPOINTS:
        raise RequestError(f"url is {url!r}; it has to be {' or '.join(ENDPOINTS)}.", "url", "invalid_url")
    if method != "POST":
        raise RequestError(f"method is {method!r}; it has to be POST.", "method")
    if "body" not in value:
        raise RequestError("body is missing.", "body")
    return str(url), value["body"]
