"""The check of a body, against an independent validator of the same schema."""

from __future__ import annotations

import random
from typing import Any

import jsonschema_rs
import pytest

from offmoe.dialogue.errors import RequestError
from offmoe.serve.http.bodies import chat
from offmoe.serve.http.openapi import POSTS
from offmoe.serve.http.shape import check
from tests.serve.http.test_fuzz import BODIES, damaged


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (3, "the body has to be a JSON object."),
        ({}, "messages is missing."),
        ({"messages": []}, "messages is empty; send at least 1."),
        ({"messages": [{"role": "tuba"}]}, "messages[0].role has to be 'system', 'developer', 'user', 'assistant'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content has to be a string or an array."),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages[0].content[0]: this model reads text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text is missing."),
        ({"tools": [{"type": "function"}]}, "tools[0].function is missing."),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name is missing."),
        ({"tool_choice": "some"}, "tool_choice has to be 'auto', 'none', 'required' or a JSON object."),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function is missing."),
        ({"temperature": "hot"}, "temperature has to be a number."),
        ({"temperature": 101}, "temperature is 101; it has to be from 0 to 100."),
        ({"temperature": True}, "temperature has to be a number."),
        ({"n": 1.5}, "n has to be an integer."),
        ({"max_tokens": 0}, "max_tokens is 0; it has to be at least 1."),
        ({"logit_bias": {"a": 1}}, "logit_bias has the name 'a'; it has to map token ids to numbers."),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1 has to be a number."),
        ({"functions": 0}, "functions: is out of use; send 'tools'."),
        ({"stop": ["a", 1]}, "stop[1] has to be a string."),
    ],
)
def test_a_message_names_what_is_wrong(body: Any, message: str) -> None:
    if isinstance(body, dict) and body and "messages" not in body:
        body = {"messages": [{"role": "user"}], **body}
    with pytest.raises(RequestError) as found:
        check(chat.BODY, body)
    assert str(found.value).startswith(message)


@pytest.mark.parametrize("body", [{"n": 1.0}, {"n": None}, {"functions": []}, {"max_tokens": -1}, {"x": {}}])
def test_a_value_that_asks_for_nothing_else_passes(body: dict[str, Any]) -> None:
    check(chat.BODY, {"messages": [{"role": "user", "content": None}], **body})


def test_the_check_accepts_what_a_validator_of_the_document_accepts() -> None:
    validators = {path: jsonschema_rs.Draft202012Validator(dict(post.body)) for path, post in POSTS.items()}
    accepted = 0
    for seed in range(3000):
        rng = random.Random(seed)
        path, body = rng.choice(BODIES)
        body = damaged(body, rng)
        is_valid = validators[path].is_valid(body)
        try:
            check(POSTS[path].body, body)
        except RequestError as found:
            error: RequestError | None = found
        else:
            error = None
        assert is_valid == (error is None), (seed, path, body, error)
        accepted += is_valid
    assert 500 < accepted < 2500
