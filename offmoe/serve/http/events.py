"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.responses import StreamingResponse

PING = ": ping\n\n"
"""A comment, which clients skip."""
DONE = "data: [DONE]\n\n"


def data(value: str | Mapping[str, Any]) -> str:
    """One event without a name. value: JSON, as text or as an object."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"


def named(name: str, value: str | Mapping[str, Any]) -> str:
    """One event with a name."""
    return f"event: {name}\n{data(value)}"


def event_stream(events: AsyncIterator[str], ignored: Sequence[str]) -> StreamingResponse:
    """A response that streams events. Its headers go out at once. If the client leaves, the iterator is closed."""
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **ignored_header(ignored)}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def ignored_header(ignored: Sequence[str]) -> dict[str, str]:
    """The header that names what was ignored of a request."""
    text = ", ".join(ignored).encode("ascii", "backslashreplace").decode()
    return {"x-offmoe-ignored": text[:1000]} if ignored else {}
