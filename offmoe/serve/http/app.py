"""The application: which address answers what."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from offmoe.dialogue.errors import RequestError
from offmoe.errors import OffmoeError
from offmoe.serve.http.asking import as_request_error
from offmoe.serve.http.bodies.chat import TOKENIZE
from offmoe.serve.http.chat import chat
from offmoe.serve.http.completions import completions
from offmoe.serve.http.fields import Fields
from offmoe.serve.http.guard import Access, Guard
from offmoe.serve.http.messages import count_tokens, messages
from offmoe.serve.http.openapi import PATH, Document
from offmoe.serve.http.reply import error_response, read_json
from offmoe.serve.http.responses import responses
from offmoe.serve.http.service import Service, chat_messages

logger = logging.getLogger(__name__)

Handler = Callable[[Service, HttpRequest, Any], Awaitable[Response]]
CLIENT_LEFT = 499
"""Status of a request whose client has left; nobody sees it but the log."""

POSTS: dict[str, Handler] = {
    "/v1/chat/completions": chat,
    "/v1/completions": completions,
    "/v1/responses": responses,
    "/v1/messages": messages,
    "/v1/messages/count_tokens": count_tokens,
}


def build_app(service: Service, access: Access, origins: Sequence[str] = (), more: Sequence[Route] = ()) -> ASGIApp:
    """The ASGI application of a server.

    Args:
        service: The model that is served.
        access: Who may send requests.
        origins: Origins of web pages that may read answers; () for none.
        more: Further routes, such as metrics.
    """

    async def tokenize(service: Service, http: HttpRequest, body: Any) -> Response:
        """POST /v1/tokenize: the token ids of a text, or of a conversation as the model sees it."""
        fields = Fields.checked(body, TOKENIZE)
        service.check_model(fields)
        if "messages" in fields:
            ids = list(service.renderer.render(chat_messages(fields.any("messages"))).ids)
        else:
            name = next(name for name in ("prompt", "content", "text") if name in fields)
            ids = service.renderer.encode(fields.need(name, str))
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.engine.max_context})

    posts = {**POSTS, "/v1/tokenize": tokenize}
    routes = [Route(path, _post(service, handler), methods=["POST"]) for path, handler in posts.items()]
    routes += [
        Route("/v1/models", lambda _: JSONResponse({"object": "list", "data": _models(service)})),
        Route("/v1/models/{name:path}", lambda http: _model(service, http)),
        Route("/health", lambda _: JSONResponse({"status": "ok"})),
        *more,
    ]
    paths = [*(route.path for route in routes), PATH]
    routes.append(Document(service.names, paths, access.api_key is not None).route())
    app: ASGIApp = Starlette(routes=routes, exception_handlers={HTTPException: _no_such_address, Exception: _failed})
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=list(origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-offmoe-ignored", "retry-after"],
        )
    return Guard(app, access)


def _post(service: Service, handler: Handler) -> Callable[[HttpRequest], Awaitable[Response]]:
    """The route of a handler: reads its body, and turns every error into a reply. An exception that came through would
    cost the client its connection, and with it the next request."""

    async def route(http: HttpRequest) -> Response:
        try:
            return await handler(service, http, await read_json(http))
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        except OffmoeError as error:
            return error_response(http.url.path, as_request_error(error), http.scope.get("request_id"))
        except Exception as error:
            logger.exception("a request failed")
            broken = RequestError(f"the server failed: {type(error).__name__}.", code="server_error", status=500)
            return error_response(http.url.path, broken, http.scope.get("request_id"))

    return route


def _models(service: Service) -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "offmoe",
            "max_model_len": service.engine.max_context,
            # Anthropic's clients read these.
            "type": "model",
            "display_name": name,
        }
        for name in service.names
    ]


def _model(service: Service, http: HttpRequest) -> Response:
    name = http.path_params["name"]
    found = next((model for model in _models(service) if model["id"] == name), None)
    if found is not None:
        return JSONResponse(found)
    error = RequestError(
        f"the model {name!r} is not served here; this is {service.id!r}.", "model", "model_not_found", 404
    )
    return error_response(http.url.path, error, http.scope.get("request_id"))


async def _no_such_address(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = http.url.path
    message = error.detail
    if error.status_code == 404:
        right = f"/v1{path}"
        known = {*POSTS, "/v1/models", "/v1/tokenize"}
        hint = f"send it to {right}." if right in known else f"addresses: {', '.join(sorted(known))}."
        message = f"nothing is at {path}; {hint}"
    elif error.status_code == 405:
        message = f"{http.method} is not what {path} answers; send {(error.headers or {}).get('Allow')}."
    refused = RequestError(message, code="not_found" if error.status_code == 404 else None, status=error.status_code)
    reply = error_response(path, refused, http.scope.get("request_id"))
    reply.headers.update(error.headers or {})  # of 405: what is allowed
    return reply


async def _failed(http: HttpRequest, error: Exception) -> Response:
    broken = RequestError(f"the server failed: {type(error).__name__}.", code="server_error", status=500)
    return error_response(http.url.path, broken, http.scope.get("request_id"))
