"""The OpenAPI document of the server: addresses, bodies, answers and errors.

Bodies are the schemas that requests are checked against. Answers are those of the classes that build them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import offmoe
from offmoe.serve.http.bodies import chat, completions, messages, responses
from offmoe.serve.http.errors import ANTHROPIC_ERROR, OPENAI_ERROR, OVERLOADED
from offmoe.serve.http.shape import ANY, OBJECT, STRING, Schema, array, integer, members

PATH = "/openapi.json"
ABOUT = "One model behind the HTTP APIs of OpenAI and Anthropic. What no API defines is accepted and named in a header."
_MODEL = members(
    {"id": STRING, "object": STRING, "created": integer(0), "owned_by": STRING, "max_model_len": integer(1)}
)
_IGNORED = {"x-offmoe-ignored": {"description": "Fields that no API defines.", "schema": STRING}}
_EVENT = members({"data": STRING}, event=STRING)
_STATUSES = {
    400: "The request cannot be answered as asked.",
    404: "Another model is served here.",
    408: "The body comes too slowly.",
    413: "The body is too large.",
    429: "Too many answers wait; Retry-After says when to ask again.",
    500: "The server failed.",
    503: "The server shuts down.",
}


@dataclass(frozen=True)
class Post:
    """What an address answers to POST.

    summary: one sentence. body: what it reads. answer: schema of its answer, or the name of the class that builds it.
    streams: whether it can send events.
    """

    summary: str
    body: Schema
    answer: Schema | str
    streams: bool = True


POSTS = {
    "/v1/chat/completions": Post("OpenAI's chat completions.", chat.BODY, "ChatCompletion"),
    "/v1/completions": Post("OpenAI's older completions.", completions.BODY, "Completion"),
    "/v1/responses": Post("OpenAI's responses.", responses.BODY, "Response"),
    "/v1/messages": Post("Anthropic's messages.", messages.BODY, "Message"),
    "/v1/messages/count_tokens": Post(
        "Tokens of a prompt of Anthropic's messages.", messages.BODY, members({"input_tokens": integer(1)}), False
    ),
    "/v1/tokenize": Post(
        "Token ids of a text or of a conversation.",
        chat.TOKENIZE,
        members({"tokens": array(integer(0)), "count": integer(0), "max_model_len": integer(1)}),
        False,
    ),
}
GETS: Mapping[str, tuple[str, str, Schema]] = {
    "/v1/models": (
        "The model under its names.",
        "application/json",
        members({"object": STRING, "data": array(_MODEL)}),
    ),
    "/v1/models/{name}": ("The model.", "application/json", _MODEL),
    "/health": ("Whether the server runs.", "application/json", members({"status": STRING})),
    PATH: ("This document.", "application/json", OBJECT),
    "/metrics": ("Figures for Prometheus.", "text/plain", ANY),
    "/live.json": ("Figures of the live page.", "application/json", OBJECT),
    "/": ("The live page.", "text/html", ANY),
}


class Document:
    """The document of one server.

    Args:
        names: Names of the model.
        paths: The addresses that the server answers.
        has_key: Whether requests have to bring a key.
    """

    def __init__(self, names: Sequence[str], paths: Sequence[str], has_key: bool):
        self._names, self._paths, self._has_key = names, {path.replace(":path}", "}") for path in paths}, has_key

    def route(self) -> Route:
        """The route of the document. It is made when the first request asks, since Anthropic's classes load slowly."""

        def show(_: HttpRequest) -> Response:
            return JSONResponse(self.values)

        return Route(PATH, show)

    @cached_property
    def values(self) -> dict[str, Any]:
        """The document."""
        paths: dict[str, Any] = {path: {"get": self._get(*get)} for path, get in GETS.items() if path in self._paths}
        for path, item in paths.items():
            if "{name}" in path:
                item["get"]["responses"]["404"] = _error(_STATUSES[404], OPENAI_ERROR)
                item["parameters"] = [
                    {"name": "name", "in": "path", "required": True, "schema": {"enum": [*self._names]}}
                ]
        paths |= {path: {"post": self._post(path, post)} for path, post in POSTS.items() if path in self._paths}
        found: dict[str, Any] = {
            "openapi": "3.1.0",
            "info": {"title": "offmoe serve", "version": offmoe.__version__, "description": ABOUT},
            "paths": paths,
            "components": {"schemas": _classes()},
        }
        if self._has_key:
            schemes = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
            found["components"]["securitySchemes"] = schemes
            found["security"] = [{name: []} for name in schemes]
        return found

    def _get(self, summary: str, kind: str, schema: Schema) -> dict[str, Any]:
        answer = {"description": summary, "content": {kind: {"schema": schema}}}
        return {"summary": summary, "responses": {"200": answer, **self._refusals("")}}

    def _post(self, path: str, post: Post) -> dict[str, Any]:
        schema = {"$ref": f"#/components/schemas/{post.answer}"} if isinstance(post.answer, str) else post.answer
        kinds: dict[str, Any] = {"application/json": {"schema": schema}}
        if post.streams:
            kinds["text/event-stream"] = {"schema": _EVENT}
        errors = {status: words for status, words in _STATUSES.items() if post.streams or status not in (429, 503)}
        shape = ANTHROPIC_ERROR if path.startswith("/v1/messages") else OPENAI_ERROR
        if shape is ANTHROPIC_ERROR and 429 in errors:
            errors[OVERLOADED] = errors.pop(429)
        return {
            "summary": post.summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": self._named(post.body)}}},
            "responses": {
                "200": {"description": "The answer.", "headers": _IGNORED, "content": kinds},
                **{str(status): _error(words, shape) for status, words in errors.items()},
                **self._refusals(path),
            },
        }

    def _refusals(self, path: str) -> dict[str, Any]:
        shape = ANTHROPIC_ERROR if path.startswith("/v1/messages") else OPENAI_ERROR
        return {"401": _error("The key is missing or wrong.", shape)} if self._has_key else {}

    def _named(self, body: Schema) -> Schema:
        """The body with the names of this server's model, another of which is a 404."""
        if "anyOf" in body:
            return {**body, "anyOf": [self._named(schema) for schema in body["anyOf"]]}
        return {**body, "properties": {**body["properties"], "model": {"enum": [*self._names, None]}}}


def _error(words: str, shape: Schema) -> dict[str, Any]:
    return {"description": words, "content": {"application/json": {"schema": shape}}}


def _classes() -> dict[str, Any]:
    """Schemas of the classes of answers."""
    from anthropic.types import Message
    from openai.types import Completion
    from openai.types.chat import ChatCompletion
    from openai.types.responses import Response as OpenAIResponse
    from pydantic.json_schema import models_json_schema

    classes: list[Any] = [ChatCompletion, Completion, OpenAIResponse, Message]
    template = "#/components/schemas/{model}"
    _, found = models_json_schema([(cls, "validation") for cls in classes], ref_template=template)
    schemas: dict[str, Any] = found["$defs"]
    return schemas
