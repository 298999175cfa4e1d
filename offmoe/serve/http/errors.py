"""Errors in the shape of each API."""

from __future__ import annotations

from typing import Any

from offmoe.dialogue.errors import RequestError
from offmoe.serve.http.shape import STRING, members, one_of

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


OPENAI_ERROR = members(
    {"error": members({"message": STRING, "type": STRING}, param=STRING, code=STRING)},
)
"""What `openai_error` gives."""
ANTHROPIC_ERROR = members(
    {"type": one_of("error"), "error": members({"type": STRING, "message": STRING})}, request_id=STRING
)
"""What `anthropic_error` gives."""


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
