"""Grammars of a model that answers in channels, as gpt-oss does, and of markers that are special tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from offmoe.dialogue.answer import AnswerReader, Call, Reasoning, Text
from offmoe.dialogue.messages import Tool
from offmoe.dialogue.render import Prompt
from offmoe.dialogue.templates import DEEPSEEK, HARMONY, MISTRAL, CallSyntax, ResponseFormat

pytest.importorskip("llguidance", reason="the extra offmoe[serve] is not installed")

from offmoe.dialogue.constraint import GrammarCompiler

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
START = "<|start|>user<|message|>hi<|end|><|start|>assistant"
THOUGHT = "<|channel|>analysis<|message|>one {two}\n<|end|><|start|>assistant"
FINAL = '<|channel|>final<|message|>{"a":3}'
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a":3}'


def tokenizer_with(special: list[str], end: str) -> Any:
    """A tokenizer of bytes and of special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token=end)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    names = ("start", "end", "message", "channel", "constrain", "return", "call")
    return tokenizer_with([f"<|{name}|>" for name in names], "<|return|>")


@pytest.fixture(scope="module")
def ends(tokenizer: Any) -> list[int]:
    """gpt-oss ends an answer with either of two tokens."""
    return [tokenizer.convert_tokens_to_ids(token) for token in ("<|return|>", "<|call|>")]


@pytest.fixture(scope="module")
def grammars(tokenizer: Any, ends: list[int]) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, len(tokenizer), ends)


def follows(grammars: GrammarCompiler, tokenizer: Any, grammar: str, text: str) -> tuple[bool, bool]:
    """(whether a grammar allows a text, whether the answer may end there)."""
    matcher = grammars.matcher(grammar)
    ids = tokenizer(text)["input_ids"]
    return matcher.try_consume_tokens(ids) == len(ids), matcher.is_accepting()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (THOUGHT + FINAL, (True, True)),
        (FINAL, (True, True)),
        (THOUGHT + FINAL[:-1], (True, False)),
        (THOUGHT[:40], (True, False)),
        (THOUGHT + '{"a":3}', (False, False)),
        ('{"a":3}', (False, False)),
        (THOUGHT + FINAL.replace('"a"', '"b"'), (False, False)),
        (THOUGHT + CALL, (False, False)),
    ],
)
def test_json_begins_in_the_final_channel(
    grammars: GrammarCompiler, tokenizer: Any, text: str, expected: tuple[bool, bool]
) -> None:
    grammar = grammars.json(SCHEMA, "response_format", HARMONY.channels)
    assert follows(grammars, tokenizer, grammar, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [(CALL, (True, True)), (THOUGHT + CALL, (True, True)), (FINAL, (False, False))]
)
def test_a_call_that_is_demanded_begins_after_the_reasoning(
    grammars: GrammarCompiler, tokenizer: Any, text: str, expected: tuple[bool, bool]
) -> None:
    assert HARMONY.calls is not None
    tools = [Tool("f", {"name": "f", "parameters": SCHEMA})]
    grammar = grammars.calls(tools, HARMONY.calls, "tool_choice", several=False, channels=HARMONY.channels)
    assert follows(grammars, tokenizer, grammar, text) == expected


@pytest.mark.parametrize(("text", "end"), [(FINAL, "<|return|>"), (CALL, "<|call|>")])
def test_what_the_grammar_makes_is_read(tokenizer: Any, ends: list[int], text: str, end: str) -> None:
    """The token that ends a call also ends the answer, so the reader never sees it in the text."""
    ids = tuple(tokenizer(START)["input_ids"])
    reader = AnswerReader(tokenizer, Prompt(START, ids), HARMONY, end_tokens=ends)
    events = [event for token in tokenizer(THOUGHT + text + end)["input_ids"] for event in reader.add(token)]
    events += reader.finish()
    assert "".join(event.text for event in events if isinstance(event, Reasoning)) == "one {two}\n"
    assert "".join(event.text for event in events if isinstance(event, Text)) == ('{"a":3}' if text == FINAL else "")
    calls = [(event.call.name, dict(event.call.arguments)) for event in events if isinstance(event, Call)]
    assert calls == ([("f", {"a": 3})] if text == CALL else [])


@pytest.mark.parametrize("answers", [DEEPSEEK, MISTRAL], ids=["deepseek", "mistral"])
@pytest.mark.parametrize("is_special", [True, False])
def test_a_demanded_call_of_other_families_is_read(answers: ResponseFormat, is_special: bool) -> None:
    """Their markers are special tokens in some tokenizers, and text in others."""
    syntax = answers.calls
    assert isinstance(syntax, CallSyntax)
    marks = [syntax.opening, syntax.between, syntax.closing]
    special = [f"{part}>" for mark in marks if "<" in mark for part in mark.split(">") if part] if is_special else []
    tokenizer = tokenizer_with([*dict.fromkeys(special), "</s>"], "</s>")
    grammars = GrammarCompiler(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    grammar = grammars.calls([Tool("f", {"name": "f", "parameters": SCHEMA})], syntax, "tool_choice", several=False)
    text = f'{syntax.opening}f{syntax.between}{{"a":3}}{syntax.closing}'
    assert follows(grammars, tokenizer, grammar, text) == (True, True)
    assert follows(grammars, tokenizer, grammar, text.replace("3", "x")) == (False, False)
    prompt = Prompt(str(answers.template["start_anchor"]), (1,))
    reader = AnswerReader(tokenizer, prompt, answers, end_tokens=[tokenizer.eos_token_id])
    events = [event for token in tokenizer(text)["input_ids"] for event in reader.add(token)] + reader.finish()
    assert [(event.call.name, dict(event.call.arguments)) for event in events if isinstance(event, Call)] == [
        ("f", {"a": 3})
    ]
