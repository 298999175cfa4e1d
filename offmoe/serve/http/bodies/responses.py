"""The body of OpenAI's responses."""

from __future__ import annotations

from typing import get_args

from openai.types.shared import ReasoningEffort

from offmoe.serve.http.bodies.common import (
    ARGUMENTS,
    AUTO,
    DEFINITION,
    FUNCTION,
    LIMIT,
    LOGPROBS,
    NONE,
    REQUIRED,
    SAMPLING,
    content,
    form,
    hosted,
)
from offmoe.serve.http.shape import ANY, BOOL, STRING, array, either, members, one_of, other_than, refused

HARMLESS = (
    *("user", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
    *("truncation", "max_tool_calls", "stream_options", "client_metadata"),
)
"""Fields that cannot change the answer of this server."""
REFUSED = {
    "previous_response_id": "answers are not stored here; send the whole conversation as 'input'.",
    "conversation": "conversations are not stored here; send the whole conversation as 'input'.",
    "background": "answers are not stored here; stream it.",
    "prompt": "prompts are not stored here; send 'instructions' and 'input'.",
}
TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
EFFORTS = tuple(effort for found in get_args(ReasoningEffort) for effort in get_args(found))

_CONTENT = content(*TEXTS)
_REFERENCE = "item_reference"
_ITEMS = {
    "message": members(
        {"role": one_of("system", "developer", "user", "assistant")}, type=one_of("message"), content=_CONTENT
    ),
    "reasoning": members({"type": one_of("reasoning")}, content=_CONTENT),
    "function_call": members(
        {"type": one_of("function_call"), "name": STRING, "call_id": STRING}, namespace=STRING, arguments=ARGUMENTS
    ),
    "custom_tool_call": members(
        {"type": one_of("custom_tool_call"), "name": STRING, "call_id": STRING}, namespace=STRING, input=STRING
    ),
    **{
        kind: members({"type": one_of(kind), "call_id": STRING}, output=_CONTENT)
        for kind in ("function_call_output", "custom_tool_call_output")
    },
}
_ITEM = either(
    *_ITEMS.values(),
    members({"type": one_of(_REFERENCE), "id": refused("answers are not stored here; send the item itself.")}),
    members({"type": other_than(*_ITEMS, _REFERENCE)}),
)
_TOOL = either(
    members({"type": one_of("function"), "name": STRING}, DEFINITION),
    members({"type": one_of("custom"), "name": STRING}, description=STRING),
    members({"type": one_of("namespace"), "name": STRING}, tools=array(FUNCTION)),
    hosted("function", "custom", "namespace"),
)
BODY = members(
    {"input": either(STRING, array(_ITEM))},
    {
        **SAMPLING,
        **dict.fromkeys(HARMLESS, ANY),
        **{name: refused(reason) for name, reason in REFUSED.items()},
    },
    model=STRING,
    instructions=STRING,
    max_output_tokens=LIMIT,
    metadata={"type": "object", "additionalProperties": STRING},
    include=array(ANY),
    top_logprobs=LOGPROBS,
    stream=BOOL,
    tools=array(_TOOL),
    tool_choice=either(one_of(AUTO, NONE, REQUIRED), members({"type": one_of("function", "custom"), "name": STRING})),
    parallel_tool_calls=BOOL,
    text=members({}, format=form(None), verbosity=ANY),
    reasoning=members({}, effort=one_of(*EFFORTS), summary=ANY, generate_summary=ANY),
)
