"""Prompts from conversations: roles that a template lacks, refusals, and options that it reads."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.messages import Message, Tool, ToolCall
from offmoe.dialogue.render import ChatRenderer
from offmoe.hf.hub.locate import locate

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
SYSTEM_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system must be first') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def renderer(template: str | None) -> ChatRenderer:
    tokenizer: Any = AutoTokenizer.from_pretrained(locate("demo").folder)
    tokenizer.chat_template = template
    return ChatRenderer(tokenizer)


def test_a_prompt_is_text_and_its_ids() -> None:
    prompt = renderer(PLAIN).render([Message("user", "And the LORD")])
    assert prompt.text == "[user]And the LORD"
    assert prompt.ids == tuple(renderer(PLAIN).encode(prompt.text, special=False))


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    messages = [Message("developer", "a"), Message("user", "b")]
    assert renderer(PLAIN).render(messages).text == "[system]a[user]b"
    assert renderer(PLAIN + "{# developer #}").render(messages).text == "[developer]a[user]b"


def test_a_system_message_stays_where_it_is_if_the_template_allows_it() -> None:
    messages = [Message("system", "a"), Message("user", "b"), Message("system", "c")]
    assert renderer(PLAIN).render(messages).text == "[system]a[user]b[system]c"
    assert renderer(SYSTEM_FIRST).render(messages).text == "[system]a\n\nc[user]b"


def test_refusals_say_what_the_template_says() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        renderer(None).render([Message("user", "a")])
    with pytest.raises(RequestError, match="messages is empty"):
        renderer(PLAIN).render([])
    with pytest.raises(RequestError, match="refuses these messages: only dogs") as refused:
        renderer("{{ raise_exception('only dogs') }}").render([Message("user", "a")])
    assert (refused.value.param, refused.value.status) == ("messages", 400)


def test_calls_and_tools_reach_the_template() -> None:
    template = (
        "{% for t in tools or [] %}{{ t.function.name }}:{{ t.function.parameters.type }};{% endfor %}"
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}={{ c.function.arguments.a }}"
        "{% endfor %}{{ m.reasoning_content }}{{ m.tool_call_id }}{% endfor %}"
    )
    messages = [
        Message("user", "x"),
        Message("assistant", calls=(ToolCall("c1", "f", {"a": 1}),), reasoning="hm"),
        Message("tool", "y", call_id="c1"),
    ]
    assert renderer(template).render(messages, [Tool("f", {"name": "f"})]).text == "f:object;f=1hmc1"


def test_knows_which_options_the_template_reads() -> None:
    reading = renderer(PLAIN + "{% if enable_thinking %}<think>{% endif %}")
    assert reading.reads("enable_thinking", True)
    assert not reading.reads("reasoning_effort", "high")
    assert reading.thinking(True) == {"enable_thinking": True}
    assert renderer(PLAIN).thinking(True) is None
    assert renderer(PLAIN + "<think>").thinking(True) == {}
