"""Answers of a given form: what a grammar allows, and what is refused in its own words."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.messages import Tool
from offmoe.dialogue.templates import QWEN

pytest.importorskip("llguidance", reason="the extra offmoe[serve] is not installed")
from transformers import AutoTokenizer

from offmoe.dialogue.constraint import GrammarCompiler
from offmoe.hf.hub.locate import locate

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
VOCABULARY = 4096


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(locate("demo").folder)


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCABULARY, [0])


def sampled(grammars: GrammarCompiler, tokenizer: Any, grammar: str, seed: int = 0) -> str:
    """A text of random tokens that the grammar allows."""
    random = torch.Generator().manual_seed(seed)
    processor = grammars.processor(grammar, waits=lambda: False)
    ids = torch.tensor([[5]])
    for _ in range(300):
        scores: Any = torch.randn(1, VOCABULARY, generator=random)
        token = int(processor(ids, scores).argmax())  # type: ignore[arg-type]
        if token == 0:
            return str(tokenizer.decode(ids[0, 1:]))
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    pytest.fail("the grammar never ended")


@pytest.mark.parametrize("logits", [VOCABULARY, VOCABULARY - 7])
def test_logits_of_allowed_tokens_stay_and_others_are_excluded(
    grammars: GrammarCompiler, tokenizer: Any, logits: int
) -> None:
    grammar = grammars.json(SCHEMA, "response_format")
    processor, matcher = grammars.processor(grammar, waits=lambda: False), grammars.matcher(grammar)
    sizes = set()
    ids = [5]
    for token in tokenizer('{"city":"day')["input_ids"]:
        allowed = torch.tensor([bias > 0 for bias in matcher.compute_logit_bias()])[:logits]
        scores: Any = torch.randn(1, logits, generator=torch.Generator().manual_seed(len(ids)))
        found = processor(torch.tensor([ids]), scores.clone())  # type: ignore[arg-type]
        assert torch.equal(found[0], scores[0].where(allowed, -torch.inf))
        sizes.add(int(allowed.sum()))
        matcher.consume_token(token)
        ids.append(token)
    assert max(sizes) > 1000 > 10 > min(sizes) > 0, "few tokens and many were allowed"


def test_random_tokens_become_json_of_the_schema(grammars: GrammarCompiler, tokenizer: Any) -> None:
    for seed in range(5):
        value = json.loads(sampled(grammars, tokenizer, grammars.json(SCHEMA, "response_format"), seed))
        assert set(value) == {"city", "days"}
        assert len(value["city"]) <= 6
        assert value["days"] <= 9


@pytest.mark.parametrize("keyword", ["uniqueItems", "contains", "if"])
def test_what_cannot_be_enforced_is_refused(grammars: GrammarCompiler, keyword: str) -> None:
    schema = {"type": "array", keyword: True if keyword == "uniqueItems" else {"type": "integer"}}
    with pytest.raises(RequestError, match=f"response_format: this cannot be enforced: .*{keyword}") as refused:
        grammars.json(schema, "response_format")
    assert refused.value.param == "response_format"


def test_random_tokens_become_a_call_of_one_of_the_tools(grammars: GrammarCompiler, tokenizer: Any) -> None:
    tools = [Tool("weather", {"name": "weather", "parameters": SCHEMA}), Tool('no "w"', {"name": 'no "w"'})]
    assert QWEN.calls is not None
    grammar = grammars.calls(tools[:1], QWEN.calls, "tool_choice", several=False)
    text = sampled(grammars, tokenizer, grammar)
    parser = tokenizer.get_response_parser(response_template=QWEN.template, prefix="")
    parser.feed(text)
    (call,) = parser.finalize()[0]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert set(call["function"]["arguments"]) == {"city", "days"}
    assert grammars.calls(tools, QWEN.calls, "tool_choice", several=True)


def test_a_grammar_waits_while_the_model_reasons(grammars: GrammarCompiler) -> None:
    reasoning = [True]
    processor = grammars.processor(grammars.json(SCHEMA, "x"), waits=lambda: reasoning[0])
    scores: Any = torch.zeros(1, VOCABULARY)
    ids: Any = torch.tensor([[5]])
    assert processor(ids, scores) is scores
    reasoning[0] = False
    assert processor(ids, scores).isinf().any()
