"""What every request passes first: the name it was sent to, the key, a request id, and a line in the log."""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offmoe.dialogue.errors import RequestError
from offmoe.serve.http.reply import error_response

logger = logging.getLogger("offmoe.serve.requests")

LOCAL = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/", "/health")
"""Paths that need no key: neither says anything about a request."""
POLLED = (*OPEN_PATHS, "/live.json", "/metrics")
"""Paths that pages and monitors ask for again and again. Their lines in the log are of level DEBUG."""
REQUEST_ID = re.compile(r"[\w.:-]{1,128}")


@dataclass(frozen=True)
class Access:
    """Who may send requests.

    host: the address that the server is bound to.
    api_key: the key that requests have to bring; None: none.
    names: further names that the server may be reached by. A web page that points its own name at this machine (DNS
        rebinding) sends that name, so others are refused.
    log_json: whether log lines are JSON.
    """

    host: str = "127.0.0.1"
    api_key: str | None = None
    names: Sequence[str] = ()
    log_json: bool = False


class Guard:
    """ASGI middleware. `app` gets the requests that may pass, with `request_id` in their scope."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access
        self._names = {name.lower() for name in (*LOCAL, access.host, *access.names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        headers = Headers(scope=scope)
        wanted = headers.get("x-request-id", "")
        scope["request_id"] = request_id = wanted if REQUEST_ID.fullmatch(wanted) else f"req_{uuid.uuid4().hex}"
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                found = MutableHeaders(scope=message)
                found["x-request-id"] = found["request-id"] = request_id
                found["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            app = self._app if refusal is None else error_response(scope["path"], refusal, request_id)
            await app(scope, receive, send_with_id)
        finally:
            self._log(scope, status, time.monotonic() - began, request_id)

    def _refusal(self, scope: Scope, headers: Headers) -> RequestError | None:
        host = headers.get("host", "")
        if not self._may_reach(host):
            return RequestError(
                f"the host name {host!r} is not this server's; start it with --allow-host NAME to be reached by it.",
                code="invalid_host",
            )
        key = self._access.api_key
        if key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        bearer = headers.get("authorization", "")
        given = [headers.get("x-api-key", ""), bearer[7:] if bearer[:7].lower() == "bearer " else ""]
        # Both are compared, in constant time, so that the time tells nothing about the key.
        matches = [hmac.compare_digest(value.encode(), key.encode()) for value in given]
        if any(matches):
            return None
        return RequestError(
            "the API key is missing or wrong; send 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
            code="invalid_api_key",
            status=401,
        )

    def _may_reach(self, host: str) -> bool:
        """Whether a Host header names this server. An address cannot be rebound, so any address passes."""
        name = host.rsplit(":", 1)[0] if not host.endswith("]") and host.count(":") != 0 else host
        name = name.strip("[]").lower()
        if name in self._names or "*" in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _log(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        method, path = scope["method"], scope["path"]
        level = logging.WARNING if status >= 500 else logging.INFO
        if path in POLLED and status < 400:
            level = logging.DEBUG
        if self._access.log_json:
            values = {"method": method, "path": path, "status": status, "seconds": round(seconds, 4)}
            logger.log(level, "%s", json.dumps({**values, "request_id": request_id}))
        else:
            logger.log(level, "%s %s %d %.2f s %s", method, path, status, seconds, request_id)
