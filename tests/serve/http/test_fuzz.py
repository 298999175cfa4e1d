"""Requests of real clients, damaged at random: every one is answered or refused in its API's shape, never a 5xx."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.serve.http.test_cases import CASES

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3, 1.5, 1e308, 2**63, -(2**70), "", "x", "auto", "none", "required", "text", "\x00"),
    *([], [[]], [None], [{}], ["a", 1], {}, {"type": "text"}, {"type": "function"}, {"type": "json_schema"}, {"": 1}),
    *({"type": "tool", "name": "x"}, {"role": "assistant"}, {"type": "message"}, "\U0001f600" * 9, "a" * 3000),
)
NAMES = (
    *("model", "messages", "prompt", "input", "instructions", "system", "tools", "tool_choice", "response_format"),
    *("text", "output_config", "thinking", "reasoning", "reasoning_effort", "chat_template_kwargs", "include", "stop"),
    *("stop_sequences", "stream_options", "temperature", "top_p", "top_k", "min_p", "seed", "n", "best_of", "echo"),
    *("logprobs", "top_logprobs", "logit_bias", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("parallel_tool_calls", "metadata", "store", "previous_response_id", "suffix", "functions", "modalities"),
)
BODIES = [(case["path"], case["body"]) for case in CASES.values()]
BODIES += [("/v1/completions", {"prompt": "a"}), ("/v1/messages/count_tokens", CASES["tokens left"]["body"])]
BODIES += [("/v1/tokenize", {"prompt": "a"}), ("/v1/tokenize", {"messages": [{"role": "user", "content": "a"}]})]


def inner(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every member of a JSON value."""
    pairs: list[Any] = list(value.items()) if isinstance(value, dict) else []
    pairs += list(enumerate(value)) if isinstance(value, list) else []
    return [(value, key) for key, _ in pairs] + [found for _, member in pairs for found in inner(member)]


def damaged(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The body with one to three members replaced, added or removed, and answers of at most four tokens."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(inner(body) or [(body, "x")])
        kind = rng.randrange(4)
        if kind == 0:
            body[rng.choice(NAMES)] = copy.deepcopy(rng.choice(JUNK))
        elif kind == 1 and key in (container if isinstance(container, dict) else range(len(container))):
            del container[key]
        else:
            container[key] = copy.deepcopy(rng.choice(JUNK))
    return {**body, **dict.fromkeys(("max_tokens", "max_output_tokens", "max_completion_tokens"), 4)}


def check(client: TestClient, seed: int) -> int:
    """Send one damaged request -> its status."""
    rng = random.Random(seed)
    path, body = rng.choice(BODIES)
    body = damaged(body, rng)
    reply = client.post(path, json=body)
    assert reply.status_code in (200, 400, 404), (seed, path, body, reply.text)
    if reply.status_code != 200:
        assert reply.json()["error"]["message"], (seed, path, body)
    elif reply.headers["content-type"].startswith("text/event-stream"):
        assert "server_error" not in reply.text, (seed, path, body, reply.text)
        for line in reply.text.split("\n"):
            assert not line.startswith("data: {") or json.loads(line[6:])
    return int(reply.status_code)


def test_damaged_requests_are_answered_or_refused(client: TestClient) -> None:
    statuses = [check(client, seed) for seed in range(30)]
    assert {200, 400} <= set(statuses)


@pytest.mark.slow
def test_five_thousand_damaged_requests(client: TestClient) -> None:
    for seed in range(5000):
        check(client, seed)
