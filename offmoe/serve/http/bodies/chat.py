"""The bodies of OpenAI's chat completions, and of /v1/tokenize, which reads the same messages."""

from __future__ import annotations

from offmoe.serve.http.bodies.common import (
    ARGUMENTS,
    AUTO,
    CHOICES,
    FUNCTION,
    LIMIT,
    LOGPROBS,
    NONE,
    REQUIRED,
    SAMPLING,
    STRINGS,
    content,
    form,
    hosted,
)
from offmoe.serve.http.shape import ANY, BOOL, OBJECT, STRING, array, either, integer, members, one_of, refused

HARMLESS = (
    *("user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
    *("cache_prompt", "verbosity"),
)
"""Fields that cannot change the answer of this server."""
REFUSED = {
    "functions": "is out of use; send 'tools'.",
    "function_call": "is out of use; send 'tool_choice'.",
    "audio": "this model writes text only.",
    "prediction": "predicted outputs are not used here; leave it out.",
    "web_search_options": "this server searches nothing; leave it out.",
}
STREAM_OPTIONS = members({}, include_usage=BOOL, include_obfuscation=ANY)
MESSAGES = array(
    members(
        {"role": one_of("system", "developer", "user", "assistant", "tool")},
        content=content("text"),
        tool_calls=array(members({"function": members({"name": STRING}, arguments=ARGUMENTS)}, id=STRING)),
        reasoning_content=STRING,
        reasoning=STRING,
        tool_call_id=STRING,
        name=STRING,
    ),
    least=1,
)
BODY = members(
    {"messages": MESSAGES},
    {
        **SAMPLING,
        **dict.fromkeys(("max_completion_tokens", "max_tokens"), LIMIT),
        **dict.fromkeys(HARMLESS, ANY),
        **{name: refused(reason) for name, reason in REFUSED.items()},
    },
    model=STRING,
    n=integer(1, CHOICES),
    stream=BOOL,
    stream_options=STREAM_OPTIONS,
    stop=STRINGS,
    logprobs=BOOL,
    top_logprobs=LOGPROBS,
    tools=array(either(members({"type": one_of("function"), "function": FUNCTION}), hosted("function"))),
    tool_choice=either(
        one_of(AUTO, NONE, REQUIRED), members({"type": one_of("function"), "function": members({"name": STRING})})
    ),
    parallel_tool_calls=BOOL,
    response_format=form("json_schema"),
    reasoning_effort=STRING,
    chat_template_kwargs=OBJECT,
    modalities=one_of(["text"]),
)

_NULL = one_of(None)
TOKENIZE = either(
    members({"prompt": STRING}, model=STRING, messages=_NULL),
    members({"messages": MESSAGES}, model=STRING),
    members({"content": STRING}, model=STRING, messages=_NULL, prompt=_NULL),
    members({"text": STRING}, model=STRING, messages=_NULL, prompt=_NULL, content=_NULL),
)
"""Body of /v1/tokenize: a text under one of three names, or a conversation."""
