"""OpenAI's chat completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from offmoe.dialogue.answer import Call, Reasoning, Text, TokenScore
from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.messages import Tool, ToolCall
from offmoe.serve.http.asking import Answer, Asking, as_request_error, total
from offmoe.serve.http.bodies.chat import BODY
from offmoe.serve.http.bodies.common import AUTO, NONE
from offmoe.serve.http.errors import openai_error
from offmoe.serve.http.events import DONE, PING, data, event_stream, ignored_header
from offmoe.serve.http.fields import Fields, strings
from offmoe.serve.http.service import (
    Service,
    chat_messages,
    function_tool,
    pick,
    sampling,
    wanted_schema,
)
from offmoe.serve.job import STOP, Broke, Ended, Request, Usage


@dataclass(frozen=True)
class Asked:
    """A request as read: the answers to compute, and how to send them."""

    requests: Sequence[Request]
    stream: bool
    wants_usage: bool
    ignored: Sequence[str]


def read(service: Service, body: Any) -> Asked:
    """Read a request's body. RequestError that names the field, for what cannot be honored."""
    fields = Fields.checked(body, BODY)
    service.check_model(fields)
    stream = bool(fields.get("stream", bool))
    options = fields.inner("stream_options")
    wants_usage = bool(options.get("include_usage", bool))
    alternatives = fields.get("top_logprobs", int)
    logprobs = (alternatives or 0) if fields.get("logprobs", bool) else None
    if alternatives and logprobs is None:
        raise RequestError("top_logprobs needs logprobs: true.", "top_logprobs")
    chosen = sampling(fields, "max_completion_tokens", "max_tokens", logprobs=logprobs)
    tools, hosted = _tools(fields)
    offered, grammar = _choice(service, fields, tools)
    schema = wanted_schema(fields, "response_format", "json_schema")
    if schema is not None:
        if grammar is not None or offered:
            raise RequestError("response_format with tools needs tool_choice 'none'.", "response_format")
        grammar = service.schema_grammar(*schema)
    template = dict(fields.get("chat_template_kwargs", dict) or {})
    effort = fields.get("reasoning_effort", str)
    if effort is not None:
        template = {**service.effort(effort, "reasoning_effort"), **template}
    messages = chat_messages(fields.need("messages", list))
    request = Request(
        service.renderer.render(messages, offered, template),
        chosen,
        tools=offered,
        stops=strings(fields, "stop"),
        grammar=grammar,
        one_call=fields.get("parallel_tool_calls", bool) is False,
    )
    ignored = [*hosted, *fields.ignored(), *options.ignored()]
    service.check_ignored(ignored)
    return Asked(repeated(request, fields.need("n", int, 1)), stream, wants_usage, ignored)


def repeated(request: Request, count: int) -> list[Request]:
    """The same request several times; a seed goes up by one each time, or the answers would be the same."""
    seed = request.sampling.seed
    seeds = [None if seed is None else seed + i for i in range(count)]
    return [replace(request, sampling=replace(request.sampling, seed=seed)) for seed in seeds]


async def chat(service: Service, http: HttpRequest, body: Any) -> Response:
    """POST /v1/chat/completions."""
    asked = read(service, body)
    asking = Asking(service.engine, asked.requests)
    if asked.stream:
        return event_stream(_Stream(service, asked).events(asking), asked.ignored)
    answers = await asking.whole(http)
    return JSONResponse(whole(service, asked, answers), headers=ignored_header(asked.ignored))


def whole(service: Service, asked: Asked, answers: Sequence[Answer]) -> dict[str, Any]:
    """The body of a reply with whole answers, one for each request of `asked`."""
    completion = {
        "id": _id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": service.id,
        "choices": [_choice_of(index, answer) for index, answer in enumerate(answers)],
        "usage": usage_of(total([answer.usage for answer in answers])),
    }
    return ChatCompletion.model_validate(completion).model_dump(exclude_unset=True)


class _Stream:
    """The chunks of one streamed answer, or of several."""

    def __init__(self, service: Service, asked: Asked):
        self._asked = asked
        self._head = {
            "id": _id(),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": service.id,
        }
        self._calls = [0] * len(asked.requests)
        self._usages: list[Usage] = []

    async def events(self, asking: Asking) -> AsyncIterator[str]:
        for index in range(len(self._calls)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for batch in asking.batches():
            if not batch:
                yield PING
            for index, update in batch:
                match update:
                    case Text(text, scores):
                        yield self._chunk(index, {"content": text}, logprobs=_logprobs(scores))
                    case Reasoning(text):
                        yield self._chunk(index, {"reasoning_content": text})
                    case Call(call):
                        delta = {"index": self._calls[index], **call_of(call)}
                        self._calls[index] += 1
                        yield self._chunk(index, {"tool_calls": [delta]})
                    case Ended():
                        self._usages.append(update.usage)
                        yield self._chunk(index, {}, _finish(update.finish, self._calls[index] > 0))
                    case Broke(error):
                        yield data(openai_error(as_request_error(error)))
                        return
        if self._asked.wants_usage:
            yield data(self._dumped({**self._head, "choices": [], "usage": usage_of(total(self._usages))}))
        yield DONE

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish}
        if logprobs is not None:
            choice["logprobs"] = logprobs
        return data(self._dumped({**self._head, "choices": [choice]}))

    def _dumped(self, chunk: dict[str, Any]) -> str:
        return ChatCompletionChunk.model_validate(chunk).model_dump_json(exclude_unset=True)


def _tools(fields: Fields) -> tuple[list[Tool], list[str]]:
    """(functions that can be offered, paths of tools that this server does not have)."""
    tools, hosted = [], []
    for index, value in enumerate(fields.get("tools", list) or []):
        where = f"tools[{index}]"
        if value["type"] == "function":
            tools.append(function_tool(value["function"]))
        else:
            hosted.append(where)
    return tools, hosted


def _choice(service: Service, fields: Fields, tools: list[Tool]) -> tuple[list[Tool], str | None]:
    """(tools to offer, grammar of the calls that are demanded), by `tool_choice`."""
    choice = fields.any("tool_choice")
    if choice is None or choice == AUTO:
        return tools, None
    if choice == NONE:
        return [], None
    wanted = tools
    if isinstance(choice, dict):
        wanted = pick(tools, choice["function"]["name"], "tool_choice")
    if not wanted:
        raise RequestError("tool_choice demands a call, and there are no tools.", "tool_choice")
    return tools, service.calls_grammar(wanted, several=False, param="tool_choice")


def _choice_of(index: int, answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [call_of(call) for call in answer.calls]
    elif message["content"] is None:
        message["content"] = ""
    return {
        "index": index,
        "message": message,
        "finish_reason": _finish(answer.finish, bool(answer.calls)),
        "logprobs": _logprobs(answer.scores),
    }


def call_of(call: ToolCall) -> dict[str, Any]:
    """A call as the chat API writes it."""
    function = {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)}
    return {"id": call.id, "type": "function", "function": function}


def _finish(finish: str, has_calls: bool) -> str:
    return "tool_calls" if has_calls and finish == STOP else finish


def _logprobs(scores: Sequence[TokenScore]) -> dict[str, Any] | None:
    return {"content": logprobs_of(scores), "refusal": None} if scores else None


def logprobs_of(scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
    """Log-probabilities as OpenAI's newer APIs write them."""
    return [
        {
            **_score(score.text, score.logprob),
            "top_logprobs": [_score(text, logprob) for _, text, logprob in score.alternatives],
        }
        for score in scores
    ]


def _score(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "bytes": list(text.encode()), "logprob": logprob}


def usage_of(usage: Usage) -> dict[str, Any]:
    """Usage as OpenAI's older APIs write it."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def _id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
