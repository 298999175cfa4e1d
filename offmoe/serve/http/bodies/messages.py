"""The body of Anthropic's messages."""

from __future__ import annotations

from offmoe.serve.http.bodies.common import ARGUMENTS, LIMIT, SAMPLING, STRINGS, TEXT_ONLY, content, form, hosted
from offmoe.serve.http.shape import ANY, BOOL, OBJECT, STRING, Schema, array, either, members, one_of, refused

HARMLESS = ("metadata", "service_tier", "cache_control", "inference_geo", "speed")
"""Fields that cannot change the answer of this server."""
REFUSED = {
    "mcp_servers": "this server calls no other server; run the tools yourself.",
    "container": "this server runs no code.",
}
_CONTENT = content("text")
_TEXT = members({"type": one_of("text"), "text": STRING})
_BLOCKS = {
    "user": [
        _TEXT,
        members({"type": one_of("tool_result"), "tool_use_id": STRING}, content=_CONTENT, is_error=BOOL),
    ],
    "assistant": [
        _TEXT,
        members({"type": one_of("thinking")}, thinking=STRING),
        members({"type": one_of("redacted_thinking")}),  # encrypted by another model's server
        members({"type": one_of("tool_use"), "id": STRING, "name": STRING}, input=ARGUMENTS),
    ],
    "system": [_TEXT],
}


_TOOL = members({"name": STRING, "input_schema": OBJECT}, type=one_of("custom"), description=STRING)


def _turn(role: str, blocks: list[Schema]) -> Schema:
    block = either(*blocks, reason=TEXT_ONLY)
    return members({"role": one_of(role)}, content=either(STRING, array(block)))


BODY = members(
    {"messages": array(either(*(_turn(role, blocks) for role, blocks in _BLOCKS.items())), least=1)},
    {
        **SAMPLING,
        **dict.fromkeys(HARMLESS, ANY),
        **{name: refused(reason) for name, reason in REFUSED.items()},
    },
    model=STRING,
    max_tokens=LIMIT,
    system=_CONTENT,
    stop_sequences=STRINGS,
    stream=BOOL,
    tools=array(either(_TOOL, hosted("custom"))),
    tool_choice=either(
        members({"type": one_of("auto", "any", "none")}, disable_parallel_tool_use=BOOL),
        members({"type": one_of("tool"), "name": STRING}, disable_parallel_tool_use=BOOL),
    ),
    output_config=members({}, format=form(None), effort=STRING),
    output_format=form(None),
    thinking=members({"type": STRING}),
)
