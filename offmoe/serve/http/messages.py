"""Anthropic's messages."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from offmoe.dialogue.answer import Call, Reasoning, Text
from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.messages import Message, Tool, ToolCall
from offmoe.dialogue.render import Prompt
from offmoe.serve.http.asking import Asking, as_request_error
from offmoe.serve.http.bodies.messages import BODY
from offmoe.serve.http.errors import anthropic_error
from offmoe.serve.http.events import event_stream, ignored_header, named
from offmoe.serve.http.fields import Fields, strings
from offmoe.serve.http.service import Service, arguments, pick, sampling, text_parts, wanted_schema
from offmoe.serve.job import LENGTH, Began, Broke, Ended, Request, Update, Usage

BILLING = "x-anthropic-billing-header"
"""A system text of some clients that changes with every request and says nothing to the model. It is left out, or no
prompt would begin like the one before."""
PING_EVENT = named("ping", {"type": "ping"})


@dataclass(frozen=True)
class Asked:
    """A request as read."""

    request: Request
    stream: bool
    ignored: Sequence[str]


def read(service: Service, body: Any, counting: bool = False) -> Asked:
    """Read a request's body. RequestError that names the field, for what cannot be honored.

    Args:
        service: The model that is served.
        body: The request.
        counting: Whether tokens are to be counted only.
    """
    fields = Fields.checked(body, BODY, dotted=True)
    service.check_model(fields)
    stream = bool(fields.get("stream", bool))
    chosen = sampling(fields, "max_tokens")
    tools, hosted = _tools(fields.get("tools", list) or [])
    offered, grammar, one_call = _choice(service, fields, tools, counting)
    output = fields.inner("output_config")
    schema = wanted_schema(output, "format") or wanted_schema(fields, "output_format")
    if schema is not None and not counting:
        if grammar is not None or offered:
            raise RequestError("output_config.format with tools needs tool_choice none.", "output_config.format")
        grammar = service.schema_grammar(*schema)
    effort = output.get("effort", str)
    template = {} if effort is None else service.effort(effort, "output_config.effort")
    if "thinking" in fields:
        template |= service.thinking(fields.inner("thinking").need("type", str) != "disabled", "thinking")
    messages = [*_system(fields.any("system")), *_messages(fields.need("messages", list))]
    request = Request(
        service.renderer.render(messages, offered, template),
        chosen,
        tools=offered,
        stops=strings(fields, "stop_sequences"),
        grammar=grammar,
        one_call=one_call,
    )
    ignored = [*hosted, *fields.ignored(), *output.ignored()]
    service.check_ignored(ignored)
    return Asked(request, stream, ignored)


async def messages(service: Service, http: HttpRequest, body: Any) -> Response:
    """POST /v1/messages."""
    asked = read(service, body)
    asking = Asking(service.engine, [asked.request])
    if asked.stream:
        request_id = http.scope.get("request_id")
        return event_stream(_Stream(service, asked).events(asking, request_id), asked.ignored)
    answer = (await asking.whole(http))[0]
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.text:
        content.append({"type": "text", "text": answer.text})
    content += [
        {"type": "tool_use", "id": _call_id(call), "name": call.name, "input": dict(call.arguments)}
        for call in answer.calls
    ]
    stop = _stop_reason(answer.finish, answer.stop, bool(answer.calls))
    message = {**_head(service.id), "content": content, **stop, "usage": _usage(answer.usage)}
    checked = _types().Message.model_validate(message).model_dump(exclude_unset=True, mode="json")
    return JSONResponse(checked, headers=ignored_header(asked.ignored))


async def count_tokens(service: Service, http: HttpRequest, body: Any) -> Response:
    """POST /v1/messages/count_tokens."""
    asked = read(service, body, counting=True)
    prompt: Prompt = asked.request.prompt
    return JSONResponse({"input_tokens": len(prompt.ids)}, headers=ignored_header(asked.ignored))


class _Stream:
    """The events of one streamed answer."""

    def __init__(self, service: Service, asked: Asked):
        self._model, self._prompt_tokens = service.id, len(asked.request.prompt.ids)
        self._index, self._kind = -1, ""
        self._has_calls = False

    async def events(self, asking: Asking, request_id: str | None) -> AsyncIterator[str]:
        async for batch in asking.batches():
            if not batch:
                yield PING_EVENT
            for _, update in batch:
                if isinstance(update, Broke):
                    yield named("error", anthropic_error(as_request_error(update.error), request_id))
                    return
                for event in self._of(update):
                    yield event

    def _of(self, update: Update) -> Iterator[str]:
        match update:
            case Began(cached):
                usage = _usage(Usage(self._prompt_tokens, cached, 0, 0))
                empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
                yield _event("message_start", message={**_head(self._model), **empty, "usage": usage})
            case Text(text):
                yield from self._piece("text", {"type": "text", "text": ""}, {"type": "text_delta", "text": text})
            case Reasoning(text):
                thinking = {"type": "thinking", "thinking": "", "signature": ""}
                yield from self._piece("thinking", thinking, {"type": "thinking_delta", "thinking": text})
            case Call(call):
                self._has_calls = True
                yield from self._close()
                block: dict[str, Any] = {"type": "tool_use", "id": _call_id(call), "name": call.name, "input": {}}
                written = json.dumps(dict(call.arguments), ensure_ascii=False)
                yield from self._piece("tool_use", block, {"type": "input_json_delta", "partial_json": written})
                yield from self._close()
            case Ended(finish, stop, usage):
                yield from self._close()
                reason = _stop_reason(finish, stop, self._has_calls)
                yield _event("message_delta", delta=reason, usage=_usage(usage))
                yield _event("message_stop")

    def _piece(self, kind: str, block: dict[str, Any], delta: dict[str, Any]) -> Iterator[str]:
        if self._kind != kind:
            yield from self._close()
            self._index, self._kind = self._index + 1, kind
            yield _event("content_block_start", index=self._index, content_block=block)
        yield _event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> Iterator[str]:
        if self._kind == "thinking":
            signature = {"type": "signature_delta", "signature": ""}
            yield _event("content_block_delta", index=self._index, delta=signature)
        if self._kind:
            yield _event("content_block_stop", index=self._index)
        self._kind = ""


@cache
def _types() -> Any:
    """Anthropic's classes. Their import takes a second, so the first request of this API pays for it."""
    import anthropic.types

    return anthropic.types


def _event(kind: str, **values: Any) -> str:
    return named(kind, {"type": kind, **values})


def _head(model: str) -> dict[str, Any]:
    return {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}


def _call_id(call: ToolCall) -> str:
    return "toolu_" + call.id.removeprefix("call_")


def _stop_reason(finish: str, stop: str | None, has_calls: bool) -> dict[str, Any]:
    if stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    reason = "max_tokens" if finish == LENGTH else "tool_use" if has_calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion,
    }


def _system(value: Any) -> list[Message]:
    if value is None:
        return []
    if isinstance(value, list):
        value = [part for part in value if not (isinstance(part, dict) and _is_billing(part.get("text")))]
    text = "" if _is_billing(value) else text_parts(value)
    return [Message("system", text)] if text else []


def _is_billing(text: Any) -> bool:
    return isinstance(text, str) and text.startswith(BILLING)


def _messages(values: Sequence[Any]) -> list[Message]:
    found: list[Message] = []
    for index, value in enumerate(values):
        role, content = value["role"], value.get("content")
        if isinstance(content, list):
            found += _turn(role, content, f"messages.{index}.content")
        else:
            found.append(Message(role, content or ""))
    return found


def _turn(role: str, blocks: Sequence[Any], where: str) -> list[Message]:
    """The messages of one turn: results of tools first, then the rest as one message."""
    results: list[Message] = []
    rest = Message(role)
    for index, block in enumerate(blocks):
        fields = Fields(block, f"{where}.{index}")
        kind = fields.need("type", str)
        if kind == "text":
            rest = replace(rest, text=rest.text + fields.need("text", str))
        elif kind == "thinking":
            rest = replace(rest, reasoning=rest.reasoning + (fields.get("thinking", str) or ""))
        elif kind == "tool_use":
            given = arguments(fields.any("input"), fields.path("input"))
            call = ToolCall(fields.need("id", str), fields.need("name", str), given)
            rest = replace(rest, calls=(*rest.calls, call))
        elif kind == "tool_result":
            text = text_parts(fields.any("content"))
            if fields.get("is_error", bool):
                text = f"Error: {text}"
            results.append(Message("tool", text, call_id=fields.need("tool_use_id", str)))
    is_empty = not (rest.text or rest.calls or rest.reasoning)
    return results if results and is_empty else [*results, rest]


def _tools(values: Sequence[Any]) -> tuple[list[Tool], list[str]]:
    """(functions that can be offered, paths of tools that this server does not have)."""
    tools, hosted = [], []
    for index, value in enumerate(values):
        if value.get("type") not in (None, "custom"):
            hosted.append(f"tools.{index}")
            continue
        name = value["name"]
        definition = {"name": name, "description": value.get("description") or ""}
        tools.append(Tool(name, {**definition, "parameters": value["input_schema"]}))
    return tools, hosted


def _choice(service: Service, fields: Fields, tools: list[Tool], counting: bool) -> tuple[list[Tool], str | None, bool]:
    """(tools to offer, grammar of the calls that are demanded, whether one call ends the answer)."""
    if "tool_choice" not in fields:
        return tools, None, False
    choice = fields.inner("tool_choice")
    kind = choice.need("type", str)
    one_call = bool(choice.get("disable_parallel_tool_use", bool))
    if kind == "auto":
        return tools, None, one_call
    if kind == "none":
        return [], None, False
    wanted = pick(tools, choice.need("name", str), "tool_choice") if kind == "tool" else tools
    if not wanted:
        raise RequestError("tool_choice demands a call, and there are no tools.", "tool_choice")
    grammar = None if counting else service.calls_grammar(wanted, several=False, param="tool_choice")
    return tools, grammar, one_call
