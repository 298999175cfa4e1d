"""The body of OpenAI's older completions."""

from __future__ import annotations

from offmoe.serve.http.bodies.chat import STREAM_OPTIONS
from offmoe.serve.http.bodies.common import CHOICES, LIMIT, LOGPROBS, SAMPLING, STRINGS
from offmoe.serve.http.shape import ANY, BOOL, STRING, array, either, integer, members, refused

PROMPTS = 64
"""Prompts of one request at most."""
HARMLESS = ("user", "metadata", "store", "service_tier", "cache_prompt", "prompt_cache_key")
"""Fields that cannot change the answer of this server."""
REFUSED = {
    "suffix": "this model was not trained to fill in; send what comes before only.",
    "echo": "the prompt is not repeated; put it before the answer yourself.",
}
_IDS = array(integer(0), least=1)
BODY = members(
    {"prompt": either(STRING, _IDS, array(either(STRING, _IDS), least=1, most=PROMPTS))},
    {
        **SAMPLING,
        **dict.fromkeys(("max_tokens", "max_completion_tokens"), LIMIT),
        **dict.fromkeys(HARMLESS, ANY),
        **{name: refused(reason) for name, reason in REFUSED.items()},
    },
    model=STRING,
    n=integer(1, CHOICES),
    best_of=integer(1, CHOICES),
    stream=BOOL,
    stream_options=STREAM_OPTIONS,
    stop=STRINGS,
    logprobs=LOGPROBS,
)
