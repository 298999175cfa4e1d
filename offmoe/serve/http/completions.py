"""OpenAI's older completions: a text goes on, without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from openai.types import Completion
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from offmoe.dialogue.answer import Text, TokenScore
from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.render import Prompt
from offmoe.serve.http.asking import Answer, Asking, as_request_error
from offmoe.serve.http.bodies.completions import BODY
from offmoe.serve.http.chat import Asked, repeated, usage_of
from offmoe.serve.http.errors import openai_error
from offmoe.serve.http.events import DONE, PING, data, event_stream, ignored_header
from offmoe.serve.http.fields import Fields, strings
from offmoe.serve.http.service import Service, sampling
from offmoe.serve.job import Broke, Ended, Request, Usage


def read(service: Service, body: Any) -> Asked:
    """Read a request's body. RequestError that names the field, for what cannot be honored."""
    fields = Fields.checked(body, BODY)
    service.check_model(fields)
    count = fields.need("n", int, 1)
    best_of = fields.need("best_of", int, 1)
    if best_of not in (1, count):
        raise RequestError("best_of is not ranked here; ask for n answers.", "best_of")
    stream = bool(fields.get("stream", bool))
    options = fields.inner("stream_options")
    wants_usage = bool(options.get("include_usage", bool))
    logprobs = fields.get("logprobs", int)
    chosen = sampling(fields, "max_tokens", "max_completion_tokens", logprobs=logprobs)
    stops = strings(fields, "stop")
    requests = [
        request
        for prompt in _prompts(service, fields)
        for request in repeated(Request(prompt, chosen, is_chat=False, stops=stops), count)
    ]
    ignored = [*fields.ignored(), *options.ignored()]
    service.check_ignored(ignored)
    return Asked(requests, stream, wants_usage, ignored)


def _prompts(service: Service, fields: Fields) -> list[Prompt]:
    """The prompts: a text, token ids, or an array of either."""
    value: Any = fields.any("prompt")
    is_one = isinstance(value, str) or isinstance(value[0], int | float)
    return [_prompt(service, item) for item in ([value] if is_one else value)]


def _prompt(service: Service, value: Any) -> Prompt:
    if isinstance(value, str):
        return Prompt(value, tuple(service.renderer.encode(value)))
    size = service.engine.vocabulary
    ids = tuple(map(int, value))
    if max(ids) >= size:
        raise RequestError(f"prompt has to be text, or token ids from 0 to {size - 1}.", "prompt")
    return Prompt(str(service.engine.tokenizer.decode(list(ids))), ids)


async def completions(service: Service, http: HttpRequest, body: Any) -> Response:
    """POST /v1/completions."""
    asked = read(service, body)
    asking = Asking(service.engine, asked.requests)
    if asked.stream:
        return event_stream(_events(asking, _head(service), asked), asked.ignored)
    answers = await asking.whole(http)
    return JSONResponse(whole(service, asked, answers), headers=ignored_header(asked.ignored))


def whole(service: Service, asked: Asked, answers: Sequence[Answer]) -> dict[str, Any]:
    """The body of a reply with whole answers, one for each request of `asked`."""
    choices_ = [_choice(i, answer.text, answer.finish, answer.scores) for i, answer in enumerate(answers)]
    usage = usage_of(_total(asked, [answer.usage for answer in answers]))
    completion = {**_head(service), "choices": choices_, "usage": usage}
    return Completion.model_validate(completion).model_dump(exclude_unset=True)


def _head(service: Service) -> dict[str, Any]:
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.id,
    }


async def _events(asking: Asking, head: dict[str, Any], asked: Asked) -> AsyncIterator[str]:
    usages: dict[int, Usage] = {}
    async for batch in asking.batches():
        if not batch:
            yield PING
        for index, update in batch:
            match update:
                case Text(text, scores):
                    yield _chunk(head, [_choice(index, text, None, scores)])
                case Ended():
                    usages[index] = update.usage
                    yield _chunk(head, [_choice(index, "", update.finish, ())])
                case Broke(error):
                    yield data(openai_error(as_request_error(error)))
                    return
    if asked.wants_usage:
        found = _total(asked, [usages[i] for i in sorted(usages)])
        yield _chunk({**head, "usage": usage_of(found)}, [])
    yield DONE


def _total(asked: Asked, usages: Sequence[Usage]) -> Usage:
    """Usage of all answers; a prompt with several answers counts once."""
    first: dict[tuple[int, ...], Usage] = {}
    for request, usage in zip(asked.requests, usages, strict=True):
        first.setdefault(tuple(request.prompt.ids), usage)
    return Usage(
        sum(usage.prompt for usage in first.values()),
        sum(usage.cached for usage in first.values()),
        sum(usage.completion for usage in usages),
        0,
    )


def _chunk(head: dict[str, Any], choices_: list[dict[str, Any]]) -> str:
    # Not checked by the library's class, which knows whole answers only: they never lack a finish_reason.
    return data({**head, "choices": choices_})


def _choice(index: int, text: str, finish: str | None, scores: Sequence[TokenScore]) -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": finish, "logprobs": _logprobs(scores)}


def _logprobs(scores: Sequence[TokenScore]) -> dict[str, Any] | None:
    if not scores:
        return None
    return {
        "tokens": [score.text for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [{text: logprob for _, text, logprob in score.alternatives} for score in scores],
    }
