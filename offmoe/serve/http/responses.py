"""OpenAI's responses: a conversation of items, and named events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openai.types.responses import Response as OpenAIResponse
from pydantic import ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from offmoe.dialogue.answer import Call, Reasoning, Text
from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.messages import Tool, ToolCall
from offmoe.serve.http.asking import Asking, as_request_error
from offmoe.serve.http.bodies.common import AUTO, NONE
from offmoe.serve.http.bodies.responses import BODY
from offmoe.serve.http.chat import logprobs_of
from offmoe.serve.http.errors import openai_error
from offmoe.serve.http.events import PING, event_stream, ignored_header, named
from offmoe.serve.http.fields import Fields
from offmoe.serve.http.response_items import Offered, read_conversation, read_tools
from offmoe.serve.http.service import (
    Service,
    pick,
    sampling,
    wanted_schema,
)
from offmoe.serve.job import LENGTH, Broke, Ended, Request, Update, Usage

LOGPROBS = "message.output_text.logprobs"
"""The value of `include` that asks for log-probabilities."""


@dataclass(frozen=True)
class Asked:
    """A request as read."""

    request: Request
    stream: bool
    offered: Mapping[str, Offered]
    echo: dict[str, Any]
    ignored: Sequence[str]


def read(service: Service, body: Any) -> Asked:
    """Read a request's body. RequestError that names the field, for what cannot be honored."""
    fields = Fields.checked(body, BODY)
    service.check_model(fields)
    stream = bool(fields.get("stream", bool))
    alternatives = fields.get("top_logprobs", int)
    logprobs = (alternatives or 0) if LOGPROBS in (fields.get("include", list) or []) else None
    if alternatives and logprobs is None:
        raise RequestError(f"top_logprobs needs include: [{LOGPROBS!r}].", "top_logprobs")
    chosen = sampling(fields, "max_output_tokens", logprobs=logprobs)
    offered, hosted = read_tools(fields.get("tools", list) or [])
    tools, grammar = _choice(service, fields, offered)
    text = fields.inner("text")
    schema = wanted_schema(text, "format")
    if schema is not None:
        if grammar is not None or tools:
            raise RequestError("text.format with tools needs tool_choice 'none'.", "text.format")
        grammar = service.schema_grammar(*schema)
    reasoning = fields.inner("reasoning")
    effort = reasoning.get("effort", str)
    template = {} if effort is None else service.effort(effort, "reasoning.effort")
    messages, unread = read_conversation(fields)
    one_call = fields.get("parallel_tool_calls", bool) is False
    request = Request(
        service.renderer.render(messages, tools, template), chosen, tools=tools, grammar=grammar, one_call=one_call
    )
    ignored = [*hosted, *unread, *fields.ignored(), *text.ignored(), *reasoning.ignored()]
    service.check_ignored(ignored)
    echo = {
        "instructions": body.get("instructions"),
        "max_output_tokens": fields.get("max_output_tokens", int),
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": not one_call,
        "temperature": body.get("temperature"),
        "top_p": body.get("top_p"),
        "top_logprobs": alternatives or 0,
        "text": {"format": _echoed_format(text.get("format", dict))},
        "tool_choice": body.get("tool_choice") or AUTO,
        "tools": [],
        "reasoning": {"effort": effort, "summary": None},
        "truncation": "disabled",
        "previous_response_id": None,
        "store": False,
    }
    return Asked(request, stream, offered, echo, ignored)


async def responses(service: Service, http: HttpRequest, body: Any) -> Response:
    """POST /v1/responses."""
    asked = read(service, body)
    output = Output(service.id, asked)
    output.check()
    asking = Asking(service.engine, [asked.request])
    if asked.stream:
        return event_stream(_events(asking, output), asked.ignored)
    answer = (await asking.whole(http))[0]
    updates: list[Update] = [Reasoning(answer.reasoning)] if answer.reasoning else []
    if answer.text or not answer.calls:
        updates.append(Text(answer.text, tuple(answer.scores)))
    updates += [*map(Call, answer.calls), Ended(answer.finish, answer.stop, answer.usage)]
    for update in updates:
        for _ in output.events(update):
            pass
    checked = OpenAIResponse.model_validate(output.response()).model_dump(exclude_unset=True, mode="json")
    return JSONResponse(checked, headers=ignored_header(asked.ignored))


async def _events(asking: Asking, output: Output) -> AsyncIterator[str]:
    for event in output.begin():
        yield event
    async for batch in asking.batches():
        if not batch:
            yield PING
        for _, update in batch:
            for event in output.events(update):
                yield event


@dataclass
class _Item:
    """The item of the output that is being written."""

    kind: str
    value: dict[str, Any]
    text: str = ""
    scores: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Output:
    """The output of one response: turns updates into events, and holds the response so far."""

    model: str
    asked: Asked
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._number = 0
        self._status = "in_progress"
        self._items: list[dict[str, Any]] = []
        self._open: _Item | None = None
        self._usage: Usage | None = None
        self._error: dict[str, Any] | None = None
        self._why: str | None = None

    def response(self) -> dict[str, Any]:
        """The response so far."""
        usage = self._usage
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": self._why} if self._why else None,
            "model": self.model,
            "output": self._items,
            **self.asked.echo,
            "usage": usage
            and {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning},
                "total_tokens": usage.prompt + usage.completion,
            },
        }

    def check(self) -> None:
        """RequestError for a field that a response repeats and that is of no kind of the API's, such as `metadata`."""
        try:
            OpenAIResponse.model_validate(self.response())
        except ValidationError as error:
            first = error.errors()[0]
            field_name = str(first["loc"][0])
            raise RequestError(f"{field_name}: {first['msg']}.", field_name) from error

    def begin(self) -> Iterator[str]:
        """The events before the answer."""
        yield self._event("response.created", response=self.response())
        yield self._event("response.in_progress", response=self.response())

    def events(self, update: Update) -> Iterator[str]:
        """The events of an update."""
        match update:
            case Text(text, scores):
                yield from self._piece("message", "output_text", text, logprobs_of(scores))
            case Reasoning(text):
                yield from self._piece("reasoning", "reasoning_text", text)
            case Call(call):
                yield from self._close()
                yield from self._call(call)
            case Ended(finish, _, usage):
                if not self._items and self._open is None:  # an empty answer is a message all the same
                    yield from self._piece("message", "output_text", "")
                yield from self._close("incomplete" if finish == LENGTH else "completed")
                self._usage = usage
                self._status = "incomplete" if finish == LENGTH else "completed"
                self._why = "max_output_tokens" if finish == LENGTH else None
                yield self._event(f"response.{self._status}", response=self.response())
            case Broke(error):
                yield from self._close("incomplete")
                found = openai_error(as_request_error(error))["error"]
                self._status = "failed"
                self._error = {"code": "server_error", "message": found["message"]}
                yield self._event("response.failed", response=self.response())

    def _piece(self, kind: str, part: str, text: str, scores: Sequence[dict[str, Any]] = ()) -> Iterator[str]:
        if self._open is None or self._open.kind != kind:
            yield from self._close()
            yield from self._start(kind, part)
        item = self._open
        assert item is not None
        item.text += text
        item.scores += scores
        if text or scores:
            more: dict[str, Any] = {"logprobs": list(scores)} if part == "output_text" else {}
            yield self._event(f"response.{part}.delta", **self._place(item), delta=text, **more)

    def _start(self, kind: str, part: str) -> Iterator[str]:
        if kind == "message":
            value: dict[str, Any] = {"id": f"msg_{uuid.uuid4().hex}", "type": kind, "role": "assistant"}
        else:
            value = {"id": f"rs_{uuid.uuid4().hex}", "type": kind, "summary": []}
        value |= {"status": "in_progress", "content": []}
        self._open = _Item(kind, value)
        self._items.append(value)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(value))
        yield self._event("response.content_part.added", **self._place(self._open), part=_part(part, ""))

    def _close(self, status: str = "completed") -> Iterator[str]:
        """End the item that is being written."""
        item, self._open = self._open, None
        if item is None:
            return
        part = "output_text" if item.kind == "message" else "reasoning_text"
        place = self._place(item)
        more: dict[str, Any] = {"logprobs": item.scores} if part == "output_text" else {}
        whole = _part(part, item.text) | more
        yield self._event(f"response.{part}.done", **place, text=item.text, **more)
        yield self._event("response.content_part.done", **place, part=whole)
        item.value |= {"status": status, "content": [whole]}
        yield self._event("response.output_item.done", output_index=place["output_index"], item=dict(item.value))

    def _call(self, call: ToolCall) -> Iterator[str]:
        offered = self.asked.offered.get(call.name)
        custom = offered is not None and offered.is_custom
        written = json.dumps(dict(call.arguments), ensure_ascii=False)
        key, kind = ("input", "custom_tool_call") if custom else ("arguments", "function_call")
        if custom:
            written = str(call.arguments.get("input", written))
        value = {
            "id": f"{'ctc' if custom else 'fc'}_{uuid.uuid4().hex}",
            "type": kind,
            "call_id": call.id,
            "name": call.name if offered is None else offered.name,
            key: "",
            "status": "in_progress",
        }
        if offered is not None and offered.namespace is not None:
            value["namespace"] = offered.namespace
        self._items.append(value)
        index = len(self._items) - 1
        place = {"output_index": index, "item_id": value["id"]}
        yield self._event("response.output_item.added", output_index=index, item=dict(value))
        name = "custom_tool_call_input" if custom else "function_call_arguments"
        yield self._event(f"response.{name}.delta", **place, delta=written)
        more = {} if custom else {"name": value["name"]}
        yield self._event(f"response.{name}.done", **place, **{key: written}, **more)
        value |= {key: written, "status": "completed"}
        yield self._event("response.output_item.done", output_index=index, item=dict(value))

    def _place(self, item: _Item) -> dict[str, Any]:
        return {"item_id": item.value["id"], "output_index": self._items.index(item.value), "content_index": 0}

    def _event(self, kind: str, **values: Any) -> str:
        self._number += 1
        return named(kind, {"type": kind, "sequence_number": self._number - 1, **values})


def _part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text} | ({"annotations": [], "logprobs": []} if kind == "output_text" else {})


def _echoed_format(form: Mapping[str, Any] | None) -> dict[str, Any]:
    """`text.format` as a response repeats it. A schema has a name there, whether or not the request gave it one."""
    if form is None:
        return {"type": "text"}
    written = {name: value for name, value in form.items() if value is not None}
    return {"name": "answer", **written} if form["type"] == "json_schema" else written


def _choice(service: Service, fields: Fields, offered: Mapping[str, Offered]) -> tuple[list[Tool], str | None]:
    """(tools to offer, grammar of the calls that are demanded), by `tool_choice`."""
    tools = [found.tool for found in offered.values()]
    choice = fields.any("tool_choice")
    if choice is None or choice == AUTO:
        return tools, None
    if choice == NONE:
        return [], None
    wanted = tools
    if isinstance(choice, dict):
        wanted = pick(tools, choice["name"], "tool_choice")
    if not wanted:
        raise RequestError("tool_choice demands a call, and there are no tools.", "tool_choice")
    return tools, service.calls_grammar(wanted, several=False, param="tool_choice")
