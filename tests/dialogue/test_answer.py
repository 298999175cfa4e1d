"""Answers of every family, read one character at a time: text, reasoning, calls, stop strings, and what is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from offmoe.dialogue.answer import AnswerReader, Call, Reasoning, StopStrings, Text
from offmoe.dialogue.decode import TextDecoder
from offmoe.dialogue.messages import Tool
from offmoe.dialogue.render import Prompt
from offmoe.dialogue.templates import DEEPSEEK, FORMATS, GLM, HARMONY, MISTRAL, QWEN, QWEN_TAGS, ResponseFormat
from offmoe.hf.hub.locate import locate

BAR = "\uff5c"
CALL = [("get_weather", {"city": "Paris"})]
QWEN_START, GLM_START = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|user|>hi<|assistant|>"
HARMONY_START = "<|start|>user<|message|>hi<|end|><|start|>assistant"
DEEPSEEK_START = f"<{BAR}User{BAR}>hi<{BAR}Assistant{BAR}><think>"
JSON = '{"city": "Paris"}'
ANSWERS = {
    "qwen text": (QWEN, QWEN_START, "Hello!<|im_end|>", "", "Hello!", []),
    "qwen reasoning": (QWEN, QWEN_START, "<think>\nhm\n</think>\n\nHello!<|im_end|>", "\nhm\n", "Hello!", []),
    "qwen opened by the template": (QWEN, QWEN_START + "<think>\n", "hm</think>\n\nYes<|im_end|>", "hm", "Yes", []),
    "qwen call": (
        *(QWEN, QWEN_START),
        f'OK.\n<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call><|im_end|>',
        *("", "OK.", CALL),
    ),
    "qwen3.5 call": (
        *(QWEN_TAGS, QWEN_START),
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        *("", "", CALL),
    ),
    "harmony text": (
        *(HARMONY, HARMONY_START),
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>",
        *("Easy.", "Hello!", []),
    ),
    "harmony call": (
        *(HARMONY, HARMONY_START),
        "<|channel|>analysis<|message|>Need it.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        f"<|constrain|>json<|message|>{JSON}<|call|>",
        *("Need it.", "", CALL),
    ),
    "glm call": (
        *(GLM, GLM_START),
        "\n<think>Need it.</think>\nOK.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Paris</arg_value>\n</tool_call><|observation|>",
        *("Need it.", "OK.", CALL),
    ),
    "glm text": (GLM, GLM_START, "\n<think></think>\nHello!<|user|>", "", "Hello!", []),
    "mistral calls": (
        *(MISTRAL, "[INST]hi[/INST]"),
        f"[TOOL_CALLS]get_weather[ARGS]{JSON}[TOOL_CALLS]get_time[ARGS]{{}}</s>",
        *("", "", [*CALL, ("get_time", {})]),
    ),
    "deepseek call": (
        *(DEEPSEEK, DEEPSEEK_START),
        f"Need it.</think>OK.<{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>get_weather"
        f"<{BAR}tool▁sep{BAR}>{JSON}<{BAR}tool▁call▁end{BAR}><{BAR}tool▁calls▁end{BAR}><{BAR}end▁of▁sentence{BAR}>",
        *("Need it.", "OK.", CALL),
    ),
    "a call that is cut off": (
        QWEN,
        QWEN_START,
        'Go<tool_call>\n{"name": "f", "argum',
        "",
        'Go\n{"name": "f", "argum',
        [],
    ),
    "a call that is no JSON": (
        *(QWEN, QWEN_START, "<tool_call>\nnonsense\n</tool_call> and on"),
        *("", "\nnonsense\n and on", []),
    ),
    "no format": (None, "hi", "a <think> b", "", "a <think> b", []),
}


class Characters:
    """A tokenizer whose tokens are characters."""

    def __init__(self) -> None:
        self.parsers = AutoTokenizer.from_pretrained(locate("demo").folder)

    def decode(self, ids, skip_special_tokens=True) -> str:
        return "".join(map(chr, ids))

    def get_response_parser(self, **options):
        return self.parsers.get_response_parser(**options)


def read(answers: ResponseFormat | None, start: str, text: str, stops=(), tools=()):
    tokenizer: Any = Characters()
    reader = AnswerReader(tokenizer, Prompt(start, tuple(map(ord, start))), answers, tools, stops)
    events = [event for char in text for event in reader.add(ord(char))] + reader.finish()
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    calls = [(event.call.name, dict(event.call.arguments)) for event in events if isinstance(event, Call)]
    return reader, reasoning, "".join(event.text for event in events if isinstance(event, Text)), calls


@pytest.mark.parametrize("name", ANSWERS)
def test_reads_an_answer(name: str) -> None:
    answers, start, text, reasoning, content, calls = ANSWERS[name]
    _, *found = read(answers, start, text)
    assert found == [reasoning, content, calls]


def test_a_call_whose_schema_the_parser_cannot_read_is_text() -> None:
    """It was a 500: transformers' parser trips over a client's schema, when the call is complete."""
    tool = Tool("get_weather", {"name": "get_weather", "parameters": {"properties": {"city": {"anyOf": 3}}}})
    call = f'<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>'
    _, _, text, calls = read(QWEN, QWEN_START, f"Go{call} on", tools=[tool])
    assert calls == []
    assert '"get_weather"' in text


def test_every_format_has_an_answer() -> None:
    tried = [answers for answers, *_ in ANSWERS.values()]
    assert all(answers in tried for answers in FORMATS.values())


def test_counts_tokens_of_reasoning_and_calls() -> None:
    reader, *_ = read(*ANSWERS["qwen reasoning"][:3])
    assert reader.reasoning_tokens == len("\nhm\n</think>")
    reader, *_ = read(*ANSWERS["mistral calls"][:3])
    assert reader.calls == 2


@pytest.mark.parametrize(
    ("stops", "before", "found"),
    [
        (["lo w"], "hel", "lo w"),
        (["xyz", "lo w", "o"], "hell", "o"),
        (["", "lo world!!!", "wor", "lo wor"], "hel", "lo wor"),
        (["never"], "hello world", None),
    ],
)
def test_the_stop_string_that_is_complete_first_ends_the_text(stops: list[str], before: str, found: str | None) -> None:
    reader, _, text, _ = read(None, "", "hello world", stops)
    assert (text, reader.stop) == (before, found)
    for size in (2, 5, 11):  # however many characters a token has
        pieces = ["hello world"[i : i + size] for i in range(0, 11, size)]
        scanner = StopStrings(stops)
        shown = ""
        for piece in pieces:
            shown += scanner.add(piece) if scanner.found is None else ""
        assert (shown + scanner.finish(), scanner.found) == (before, found)


def test_stop_strings_are_not_looked_for_in_reasoning() -> None:
    _, reasoning, text, _ = read(QWEN, QWEN_START, "<think>a stop b</think>c stop d<|im_end|>", ["stop"])
    assert (reasoning, text) == ("a stop b", "c ")


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["</end>", "\n\n"])
    assert [stops.add(piece) for piece in ("a<", "/e", "x", "\n", "b")] == ["a", "", "</ex", "", "\nb"]
    assert stops.add("c</en") == "c"
    assert stops.finish() == "</en"
    assert stops.found is None


@pytest.mark.parametrize("text", ["And the LORD said", "naïve café 𝄞 日本語 👩‍👩‍👧", "  spaces\n\n\ttabs ", ""])
def test_decoding_in_pieces_gives_the_whole(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(locate("demo").folder)
    before, ids = tokenizer("Before")["input_ids"], tokenizer(text)["input_ids"] * 9
    decoder = TextDecoder(tokenizer, before)
    pieces = [decoder.add(token) for token in ids] + [decoder.finish()]
    assert "".join(pieces) == tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]
    assert all("\ufffd" not in piece for piece in pieces)


def test_the_demo_reads_its_own_calls() -> None:
    folder = Path(locate("demo").folder)
    template = json.loads((folder / "tokenizer_config.json").read_text())["response_template"]
    answers = ResponseFormat(template)
    _, _, text, calls = read(
        answers, "hi\n", f'Yes\n<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>'
    )
    assert (text, calls) == ("Yes", CALL)
