"""What the server's OpenAPI document says is so: schemathesis makes requests of it, a validator judges their bodies."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core import NOT_SET
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from offmoe.serve.engine import Engine
from offmoe.serve.http.app import build_app
from offmoe.serve.http.guard import Access
from offmoe.serve.http.openapi import GETS, PATH, POSTS
from offmoe.serve.http.service import Service
from tests.chat_demo import load_chat_demo, saying

REFUSALS = (
    *(r"the prompt has \d+ tokens, and memory", "the prompt has no tokens", "prompt has to be text, or token ids from"),
    *("tool_choice demands a call", "tool_choice: no tool is named", r".*: a tool is named '.*' already", "best_of is"),
    *(
        "top_logprobs needs",
        r".* with tools needs tool_choice",
        r".*this cannot be enforced",
        r".*the schema cannot be",
    ),
    *(r".*arguments is not JSON", r".*arguments has to be a JSON object", r".*input is not JSON", "messages is empty"),
    *(r".*input has to be a JSON object", "the model's chat template refuses", r".*chat template has no reasoning"),
)
"""What is refused of bodies whose shape is right: their parts do not go together, or this model cannot do it."""
CHECKS: Any = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@pytest.fixture(scope="module")
def running(chat_folder: Path) -> Iterator[Engine]:
    """An engine whose answers are short."""
    model, tokenizer = load_chat_demo(chat_folder, slots_per_layer=8, max_context=128)
    with model.offload, Engine(model, tokenizer, prefill_chunk=64) as engine, saying(engine, "Fine."):
        yield engine


@pytest.fixture
def document(client: TestClient) -> Any:
    reply = client.get(PATH)
    assert reply.status_code == 200
    return reply.json()


def check(client: TestClient, case: Any, validator: Any) -> None:
    """Send a request that schemathesis has made."""
    has_body = case.body is not NOT_SET and not isinstance(case.body, bytes)
    sent = {"json": case.body} if has_body else {"content": case.body} if isinstance(case.body, bytes) else {}
    reply = client.post(case.formatted_path, **sent)
    case.validate_response(reply, checks=CHECKS)
    if has_body and validator.is_valid(case.body):
        if reply.status_code != 200:
            assert reply.status_code == 400, reply.text
            assert any(re.match(words, reply.json()["error"]["message"]) for words in REFUSALS), reply.text
    else:
        assert reply.status_code in (400, 404), (case.body, reply.text)


def fuzz(client: TestClient, document: Any, path: str, mode: GenerationMode, number: int, examples: int) -> None:
    """Send some requests of one kind."""
    operation = schemathesis.openapi.from_dict(document)[path]["POST"]
    schema = {**operation.definition.raw["requestBody"]["content"]["application/json"]["schema"]}
    validator = jsonschema_rs.Draft202012Validator(schema)

    @seed(number)
    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        check(client, case, validator)

    run()


def test_the_document_has_every_address(client: TestClient, document: Any) -> None:
    assert set(document["paths"]) == {*POSTS, *GETS} - {"/metrics", "/live.json", "/"}
    schemathesis.openapi.from_dict(document).validate()


def test_the_document_asks_for_the_key_that_the_server_asks_for(running: Engine) -> None:
    app = build_app(Service(running, ["demo"]), Access(api_key="k"))
    client = TestClient(app, base_url="http://localhost", headers={"x-api-key": "k"})
    found = client.get(PATH).json()
    assert found["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert "401" in found["paths"]["/v1/models"]["get"]["responses"]
    assert "401" in found["paths"]["/v1/messages"]["post"]["responses"]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_few_requests_of_the_document(client: TestClient, document: Any, path: str, mode: GenerationMode) -> None:
    fuzz(client, document, path, mode, 0, 3)


@pytest.mark.slow
def test_requests_of_the_document(client: TestClient, document: Any, pytestconfig: pytest.Config) -> None:
    end = time.monotonic() + pytestconfig.getoption("--openapi-seconds")
    for number in count(1):
        for path in POSTS:
            for mode in MODES:
                if time.monotonic() > end:
                    return
                fuzz(client, document, path, mode, number, 20)
