"""Bodies in, replies and errors out, in the shape of the API that was asked."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.strict_json import parse_json
from offmoe.serve.engine import QueueFullError
from offmoe.serve.http.errors import OVERLOADED, anthropic_error, openai_error

BODY_BYTES = 32 << 20
"""Largest body that is read. A prompt of a million tokens has about 4 MB; images are refused later, by name."""
BODY_S = 30.0
"""Seconds that a client may take between two pieces of its body."""


def error_response(path: str, error: RequestError, request_id: str | None) -> JSONResponse:
    """The reply for an error, in the shape of the API of a path."""
    headers = {"retry-after": str(error.retry_s)} if isinstance(error, QueueFullError) else {}
    if path.startswith("/v1/messages"):
        status = OVERLOADED if error.status == 429 else error.status
        return JSONResponse(anthropic_error(error, request_id), status, headers)
    return JSONResponse(openai_error(error), error.status, headers)


async def read_json(http: HttpRequest) -> Any:
    """The JSON value of a request's body.

    Raises:
        RequestError: The body is too long, comes too slowly, or is not JSON.
    """
    pieces: list[bytes] = []
    size = 0
    stream = http.stream()
    while True:
        try:
            piece = await asyncio.wait_for(anext(stream), BODY_S)
        except StopAsyncIteration:
            break
        except asyncio.TimeoutError:
            raise RequestError(f"the body did not arrive within {BODY_S:g} s.", status=408) from None
        size += len(piece)
        if size > BODY_BYTES:
            raise RequestError(f"the body is larger than {BODY_BYTES >> 20} MiB.", status=413)
        pieces.append(piece)
    try:
        return parse_json(b"".join(pieces))
    except ValueError as error:
        raise RequestError(f"the body is {error}", code="invalid_json") from None
