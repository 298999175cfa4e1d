"""Errors in the shape of each API."""

from __future__ import annotations

from typing import Any

from offmoe.dialogue.errors import RequestError

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "overloaded_error",
    503: "overloaded_error",
}
OVERLOADED = 529
"""Anthropic's status of a server that is too busy."""


def openai_error(error: RequestError) -> dict[str, Any]:
    """The body of an error, as OpenAI's clients read it."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    if error.status == 401:
        kind = "authentication_error"
    if error.status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def anthropic_error(error: RequestError, request_id: str | None) -> dict[str, Any]:
    """The body of an error, as Anthropic's clients read it."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}, "request_id": request_id}
