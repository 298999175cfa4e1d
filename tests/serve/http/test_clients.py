"""The real openai and anthropic clients against a server at a socket."""

from __future__ import annotations

import json
import socket
from typing import Any

import anthropic
import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from offmoe.serve.engine import Engine
from tests.chat_demo import held_until_cancelled, saying
from tests.doubles import wait_until

USER: Any = [{"role": "user", "content": "hi"}]
FUNCTION = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SAID = f"<think>\nhm\n</think>\n\nLet me see. {CALL}"


class Answer(BaseModel):
    a: int


@pytest.fixture
def client(address: str) -> Any:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(address: str) -> Any:
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def test_chat_streams_what_it_answers_whole(client: Any, running: Engine) -> None:
    with saying(running, SAID):
        options = {"model": "demo", "messages": USER, "tools": TOOLS}
        whole = client.chat.completions.create(**options).choices[0]
        chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert whole.message.content == "".join(delta.content or "" for delta in deltas) == "Let me see."
    assert whole.message.reasoning_content == "".join(getattr(d, "reasoning_content", "") for d in deltas) == "\nhm\n"
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Rome"}]
    assert whole.message.tool_calls[0].function.name == calls[0].function.name == "get_weather"
    assert whole.finish_reason == chunks[-2].choices[0].finish_reason == "tool_calls"
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens > 0


def test_a_conversation_with_a_tool_reuses_its_beginning(client: Any, running: Engine) -> None:
    messages = [{"role": "user", "content": "What is the weather in Rome? " * 12}]
    with saying(running, CALL):
        first = client.chat.completions.create(model="demo", messages=messages, tools=TOOLS).choices[0].message
    messages += [first.to_dict(), {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sunny"}]
    with saying(running, "It is sunny."):
        second = client.chat.completions.create(model="demo", messages=messages, tools=TOOLS)
    assert second.choices[0].message.content == "It is sunny."
    assert second.usage.prompt_tokens_details.cached_tokens >= 64


def test_structured_answers_are_parsed(client: Any) -> None:
    parsed = client.chat.completions.parse(model="demo", messages=USER, response_format=Answer, max_tokens=40)
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    assert isinstance(client.responses.parse(model="demo", input="hi", text_format=Answer).output_parsed, Answer)


def test_logprobs_and_choices(client: Any) -> None:
    options = {"model": "demo", "messages": USER, "max_tokens": 4, "logprobs": True, "top_logprobs": 2, "n": 2}
    choices = client.chat.completions.create(**options, seed=1, temperature=1).choices
    assert [len(choice.logprobs.content) for choice in choices] == [4, 4]
    for token in choices[0].logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 2
    streamed = list(client.chat.completions.create(**options, seed=1, temperature=1, stream=True))
    texts = ["".join(c.delta.content or "" for s in streamed for c in s.choices if c.index == i) for i in (0, 1)]
    assert texts == [choice.message.content for choice in choices]


def test_completions(client: Any) -> None:
    options = {"model": "demo", "prompt": ["And the LORD", "In the beginning"], "max_tokens": 5, "temperature": 0}
    whole = [choice.text for choice in client.completions.create(**options).choices]
    chunks = list(client.completions.create(**options, stream=True))
    assert whole == ["".join(c.text for s in chunks for c in s.choices if c.index == i) for i in (0, 1)]
    assert all(whole)


def test_responses_stream_what_they_answer_whole(client: Any, running: Engine) -> None:
    tools = [{"type": "function", "strict": False, **FUNCTION}]
    with saying(running, SAID):
        whole = client.responses.create(model="demo", input="hi", tools=tools)
        events = list(client.responses.create(model="demo", input="hi", tools=tools, stream=True))
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert whole.output_text == "".join(e.delta for e in events if e.type == "response.output_text.delta")
    final = events[-1]
    assert final.type == "response.completed"
    assert [item.type for item in final.response.output] == [item.type for item in whole.output]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event.to_dict())
    follow = [*({"role": "user", "content": "hi"},), *(item.to_dict() for item in whole.output)]
    follow.append({"type": "function_call_output", "call_id": whole.output[2].call_id, "output": "sunny"})
    with saying(running, "Sunny."):
        assert client.responses.create(model="demo", input=follow, tools=tools).output_text == "Sunny."


def test_logprobs_of_responses_are_those_of_chat(client: Any) -> None:
    asked = {"model": "demo", "temperature": 0}
    chat = client.chat.completions.create(**asked, messages=USER, max_tokens=6, logprobs=True, top_logprobs=2)
    wanted = [token.to_dict() for token in chat.choices[0].logprobs.content]
    assert len(wanted) == 6
    include: Any = ["message.output_text.logprobs"]
    options = {**asked, "input": "hi", "max_output_tokens": 6, "include": include, "top_logprobs": 2}
    whole = client.responses.create(**options)
    assert whole.top_logprobs == 2
    assert [token.to_dict() for token in whole.output[0].content[0].logprobs] == wanted
    events = list(client.responses.create(**options, stream=True))
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event.to_dict())
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    (done,) = (event for event in events if event.type == "response.output_text.done")
    for found in (done.logprobs, [token for delta in deltas for token in delta.logprobs]):
        assert [token.to_dict() for token in found] == wanted
    assert events[-1].response.output[0].content == whole.output[0].content
    assert not client.responses.create(**{**options, "include": [], "top_logprobs": 0}).output[0].content[0].logprobs
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs include"):
        client.responses.create(**{**options, "include": []})


def test_custom_and_namespaced_tools_are_called_by_their_names(client: Any, running: Engine) -> None:
    tools = [
        {"type": "custom", "name": "patch"},
        {"type": "namespace", "name": "mcp", "tools": [{"type": "function", **FUNCTION}]},
    ]
    calls = '<tool_call>\n{"name": "patch", "arguments": {"input": "abc"}}\n</tool_call>\n' + CALL.replace(
        "get", "mcp__get"
    )
    with saying(running, calls):
        output = client.responses.create(model="demo", input="hi", tools=tools).output
    assert [(item.type, item.name) for item in output] == [
        ("custom_tool_call", "patch"),
        ("function_call", "get_weather"),
    ]
    assert output[0].input == "abc"
    assert output[1].namespace == "mcp"


def test_messages_stream_thinking_text_and_calls(claude: Any, running: Engine) -> None:
    tools = [{"name": "get_weather", "input_schema": FUNCTION["parameters"]}]
    options: Any = {"model": "demo", "max_tokens": 200, "messages": USER, "tools": tools}
    with saying(running, SAID):
        whole = claude.messages.create(**options)
        with claude.messages.stream(**options) as stream:
            final = stream.get_final_message()
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    for one, other in zip(whole.content, final.content, strict=True):
        assert one.to_dict() | {"id": ""} == other.to_dict() | {"id": ""}
    assert whole.stop_reason == final.stop_reason == "tool_use"
    turn = [*USER, {"role": "assistant", "content": [block.to_dict() for block in whole.content]}]
    turn.append(
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": whole.content[2].id, "content": "sun"}]}
    )
    with saying(running, "Sunny."):
        assert claude.messages.create(**{**options, "messages": turn}).content[0].text == "Sunny."
    counted = claude.messages.count_tokens(model="demo", messages=turn, tools=tools)
    assert counted.input_tokens > whole.usage.input_tokens


def test_a_stop_sequence_is_named(claude: Any, running: Engine) -> None:
    with saying(running, "one two"):
        answer = claude.messages.create(model="demo", max_tokens=20, messages=USER, stop_sequences=["two"])
    assert (answer.stop_reason, answer.stop_sequence, answer.content[0].text) == ("stop_sequence", "two", "one ")


def test_errors_have_the_types_that_clients_know(client: Any, claude: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(model="other", messages=USER)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="demo", messages=USER, temperature=-1)
    with pytest.raises(anthropic.BadRequestError, match="messages is empty"):
        claude.messages.create(model="demo", max_tokens=1, messages=[])
    assert [model.id for model in client.models.list()] == ["demo"]
    assert [model.id for model in claude.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(address: str, running: Engine, stream: bool) -> None:
    body = json.dumps({"messages": USER, "stream": stream, "temperature": 0, "logit_bias": {"0": -100}}).encode()
    host, port = address.removeprefix("http://").split(":")
    cancelled = running.meters.answers["cancelled"]
    with held_until_cancelled(running) as stopped, socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert stopped.wait(60)
        connection.close()
        wait_until(lambda: not running.running)
    assert running.meters.answers["cancelled"] == cancelled + 1
