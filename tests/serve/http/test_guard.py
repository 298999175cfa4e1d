"""Who may send requests, and what is said to the others."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from starlette.testclient import TestClient

from offmoe.serve.http.app import build_app
from offmoe.serve.http.guard import Access
from offmoe.serve.http.service import Service

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def client_of(running: Any, origins: tuple[str, ...] = (), **access: Any) -> TestClient:
    app = build_app(Service(running, ["demo"]), Access(**access), origins)
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("host", "may"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:8321", True),
        ("[::1]:8321", True),
        ("192.168.1.5", True),
        ("box.lan:80", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_only_names_of_this_server_reach_it(running: Any, host: str, may: bool) -> None:
    reply = client_of(running, names=["box.lan"]).get("/v1/models", headers={"host": host})
    assert (reply.status_code == 200) == may


@pytest.mark.parametrize("headers", [{"authorization": "Bearer k"}, {"authorization": "bearer k"}, {"x-api-key": "k"}])
def test_the_key_may_come_in_either_header(running: Any, headers: dict[str, str]) -> None:
    assert client_of(running, api_key="k").get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"x-api-key": ""}, {"authorization": "k"}])
def test_a_missing_or_wrong_key_is_refused_in_each_apis_shape(running: Any, headers: dict[str, str]) -> None:
    client = client_of(running, api_key="k")
    openai = client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert (openai.status_code, openai.json()["error"]["code"]) == (401, "invalid_api_key")
    anthropic = client.post("/v1/messages", json=CHAT, headers=headers)
    assert (anthropic.status_code, anthropic.json()["error"]["type"]) == (401, "authentication_error")
    assert client.get("/health").status_code == 200


def test_web_pages_may_read_answers_only_if_named(running: Any) -> None:
    preflight = {"origin": "http://page", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client_of(running).get("/v1/models", headers=preflight).headers
    client = client_of(running, origins=("http://page",), api_key="k")
    reply = client.options("/v1/chat/completions", headers=preflight)
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "http://page")


def test_every_reply_has_a_request_id(running: Any) -> None:
    client = client_of(running)
    assert client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert client.get("/nothing").headers["x-request-id"].startswith("req_")
    assert client.get("/health", headers={"x-request-id": "a b\x01"}).headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "has to be a JSON object"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bodies_that_are_no_requests(running: Any, body: bytes, words: str) -> None:
    reply = client_of(running).post("/v1/chat/completions", content=body)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


def test_wrong_addresses_and_methods(running: Any) -> None:
    client = client_of(running)
    assert "send it to /v1/chat/completions" in client.post("/chat/completions", json=CHAT).json()["error"]["message"]
    assert client.get("/v1/chat/completions").status_code == 405
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_tokenize_counts_what_a_chat_costs(running: Any) -> None:
    client = client_of(running)
    text = client.post("/v1/tokenize", json={"prompt": "And the LORD"}).json()
    assert text["tokens"] == running.tokenizer("And the LORD")["input_ids"]
    chat = client.post("/v1/tokenize", json=CHAT | {"model": "demo"}).json()
    answer = client.post("/v1/chat/completions", json=CHAT).json()
    assert chat["count"] == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("log_json", [False, True])
def test_the_log_has_a_line_per_request_and_nothing_of_its_text(
    running: Any, caplog: pytest.LogCaptureFixture, log_json: bool
) -> None:
    caplog.set_level(logging.INFO, "offmoe")
    client = client_of(running, log_json=log_json)
    client.get("/health")
    client.get("/v1/models", headers={"x-request-id": "r-1"})
    client.post("/v1/completions", json={"prompt": "a secret", "max_tokens": 1, "n": 0})
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, "what is polled has no line at the level of requests"
    if log_json:
        values = [json.loads(line) for line in lines]
        assert [value["path"] for value in values] == ["/v1/models", "/v1/completions"]
        assert (values[0]["status"], values[0]["request_id"], values[1]["status"]) == (200, "r-1", 400)
    else:
        assert lines[0].startswith("GET /v1/models 200 ")
        assert lines[0].endswith(" r-1")
    assert "secret" not in "".join(lines)
