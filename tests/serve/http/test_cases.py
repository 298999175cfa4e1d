"""Requests that real clients send, and what each has to get. tests/data/serve_cases.jsonl names their sources."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from offmoe.serve.http import chat, completions, responses
from offmoe.serve.http import messages as anthropic
from offmoe.serve.http.app import build_app
from offmoe.serve.http.guard import Access
from offmoe.serve.http.service import Service
from tests.serve.http.conftest import CONTEXT

DATA = Path(__file__).parents[2] / "data" / "serve_cases.jsonl"
CASES = {case["case"]: case for case in map(json.loads, DATA.read_text().splitlines())}
Check = Callable[[Any], None]


def refused(status: int = 400, param: str | None = None, code: str | None = None, words: str = "") -> Check:
    """An error in the shape of the API, that names the field."""

    def check(reply: Any) -> None:
        assert reply.status_code == status
        assert reply.headers["content-type"] == "application/json"
        error = reply.json()["error"]
        assert re.search(words, error["message"])
        if reply.url.path.startswith("/v1/messages"):
            assert (reply.json()["type"], error["type"]) == ("error", "invalid_request_error")
            assert param is None or error["message"].startswith(param)
        else:
            assert (error["param"], error["code"]) == (param, code)

    return check


def answered(**expected: Any) -> Check:
    """A chat completion of one choice with these values."""

    def check(reply: Any) -> None:
        assert reply.status_code == 200
        body = reply.json()
        (choice,) = body["choices"]
        found = {**body["usage"], **choice, **choice["message"], **{"ignored": reply.headers.get("x-offmoe-ignored")}}
        assert {name: found.get(name) for name in expected} == expected

    return check


def events(reply: Any) -> list[dict[str, Any]]:
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line[6:]) for line in reply.text.split("\n") if line.startswith("data: {")]


def reused(reply: Any) -> None:
    assert reply.status_code == 200
    assert reply.json()["usage"]["cache_read_input_tokens"] >= 64


def message(reply: Any) -> None:
    assert reply.status_code == 200
    assert reply.json()["stop_reason"] in ("max_tokens", "end_turn")


def capped_by_the_context(reply: Any) -> None:
    usage = reply.json()["usage"]
    assert reply.status_code == 200
    assert usage["total_tokens"] in (CONTEXT, CONTEXT + 1) or reply.json()["choices"][0]["finish_reason"] == "stop"


def codex(reply: Any) -> None:
    assert reply.headers["x-offmoe-ignored"] == "tools[2]"
    assert events(reply)[-1]["type"] in ("response.completed", "response.incomplete")


def ends_in_time(reply: Any) -> None:
    last = events(reply)[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def no_usage_chunk(reply: Any) -> None:
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in events(reply))
    assert reply.text.endswith("data: [DONE]\n\n")


def usage_chunk(reply: Any) -> None:
    *chunks, last = events(reply)
    assert all(chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


def streamed(reply: Any) -> None:
    assert events(reply)[-1]["choices"][0]["finish_reason"] in ("length", "stop")


def json_object(reply: Any) -> None:
    (choice,) = reply.json()["choices"]
    assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["message"]["content"]), dict)
    assert choice["message"]["content"].startswith("{")


def by_schema(reply: Any) -> None:
    value = json.loads(reply.json()["output"][0]["content"][0]["text"])
    assert list(value) == ["a"]
    assert value["a"] <= 9


def without_stops(reply: Any) -> None:
    text = reply.json()["choices"][0]["message"]["content"]
    assert not any(stop in text for stop in CASES["twelve stops"]["body"]["stop"])


def a_call(reply: Any) -> None:
    (choice,) = reply.json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], call["type"], call["function"]["name"]) == (
        "tool_calls",
        "function",
        "get_weather",
    )
    assert "city" in json.loads(call["function"]["arguments"])


def two_choices(reply: Any) -> None:
    assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1]
    assert reply.json()["usage"]["completion_tokens"] == 10


WANTED: dict[str, Check] = {
    "image, chat": refused(param="messages[0].content[1]", words="reads text only, not 'image_url'"),
    "image, messages": refused(param="messages.0.content.0", words="reads text only, not 'image'"),
    "no max_tokens": capped_by_the_context,
    "prompt too long": refused(
        param="messages", code="context_length_exceeded", words=f"3028 tokens.*{CONTEXT} tokens"
    ),
    "billing header": reused,
    "tokens left": message,
    "cache_control": reused,
    "codex tools": codex,
    "terminal event": ends_in_time,
    "previous_response_id": refused(param="previous_response_id"),
    "usage chunk not asked for": no_usage_chunk,
    "usage chunk asked for": usage_chunk,
    "arguments '{'": refused(param="messages[1].tool_calls[0].function.arguments", words="is not JSON"),
    "arguments '[1]'": refused(param="messages[1].tool_calls[0].function.arguments", words="JSON object"),
    "json_object": json_object,
    "text.format": by_schema,
    "huge max_tokens": capped_by_the_context,
    "max_tokens -1, empty system": streamed,
    "fields inside messages": answered(finish_reason="length", ignored=None, completion_tokens=3),
    "twelve stops": without_stops,
    "tool_choice required": a_call,
    "tool_choice none": answered(tool_calls=None),
    "rebinding": refused(code="invalid_host", words="evil.example"),
    "tool_result with image": refused(param="messages.2.content.0.content.0", words="not 'image'"),
    "thinking blocks in history": message,
    "field n": two_choices,
    "field functions": refused(param="functions"),
    "field frobnicate": answered(ignored="frobnicate", completion_tokens=5),
}
TWICE = {"billing header": ("65abc", "12def"), "cache_control": ("", ""), "tokens left": ("1234", "1199")}
"""Cases that are sent a second time, with a text in place of another."""


def send(client: TestClient, case: dict[str, Any]) -> Any:
    return client.post(case["path"], json=case["body"], headers=case.get("headers", {}))


@pytest.mark.parametrize("name", CASES)
def test_a_real_clients_request(client: TestClient, name: str) -> None:
    case = CASES[name]
    reply = send(client, case)
    if name in TWICE:
        before, after = TWICE[name]
        body = json.loads(json.dumps(case["body"]).replace(before, after)) if before else case["body"]
        reply = send(client, {**case, "body": body})
        assert reply.json()["usage"]["cache_read_input_tokens"] > 0
    WANTED[name](reply)


def test_every_case_has_an_expectation() -> None:
    assert WANTED.keys() == CASES.keys()


def test_all_apis_have_one_default_of_new_tokens(running: Any) -> None:
    service = Service(running, ["demo"])
    messages = [{"role": "user", "content": "hi"}]
    read = [
        *completions.read(service, {"prompt": "hi"}).requests,
        *chat.read(service, {"messages": messages}).requests,
        responses.read(service, {"input": "hi"}).request,
        anthropic.read(service, {"messages": messages}).request,
    ]
    assert [request.sampling.max_tokens for request in read] == [None] * 4


def test_a_strict_server_refuses_what_no_api_defines(running: Any) -> None:
    client = TestClient(build_app(Service(running, ["demo"], strict=True), Access()), base_url="http://localhost")
    reply = send(client, CASES["field frobnicate"])
    refused(param="frobnicate", words="--strict")(reply)


def test_a_schema_without_a_name_is_enforced(client: TestClient) -> None:
    """It was a 500 after the answer had been computed: a response repeats the format, and the API's has a name."""
    body = {"input": "hi", "max_output_tokens": 40, "text": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    reply = client.post("/v1/responses", json=body)
    assert reply.status_code == 200
    assert reply.json()["text"]["format"]["name"] == "answer"
    assert isinstance(json.loads(reply.json()["output"][0]["content"][0]["text"])["a"], int)


@pytest.mark.parametrize("stream", [True, False])
def test_a_field_that_a_response_repeats_is_checked_before_anything_is_computed(
    client: TestClient, stream: bool
) -> None:
    reply = client.post("/v1/responses", json={"input": "hi", "metadata": {"a": 1}, "stream": stream})
    refused(param="metadata.a")(reply)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}
