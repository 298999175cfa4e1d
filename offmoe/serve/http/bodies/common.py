"""What the APIs have in common: sampling, texts, functions, forms of answers."""

from __future__ import annotations

from collections.abc import Mapping

from offmoe.dialogue.sampling import RANGES
from offmoe.serve.http.shape import (
    ANY,
    BOOL,
    OBJECT,
    STRING,
    Schema,
    array,
    either,
    integer,
    members,
    number,
    one_of,
    other_than,
)

TEXT_ONLY = "this model reads text only"
CHOICES = 4
"""Answers to one request at most."""
AUTO, NONE, REQUIRED = "auto", "none", "required"

LIMIT = either(integer(1), one_of(-1))
"""Tokens of an answer at most; -1: no limit of its own."""
STRINGS = either(STRING, array(STRING))
LOGPROBS = integer(*map(int, RANGES["logprobs"]))
_WHOLE = ("top_k", "seed")
SAMPLING: Mapping[str, Schema] = {
    **{
        name: integer(int(low), int(high)) if name in _WHOLE else number(low, high)
        for name, (low, high) in RANGES.items()
        if name != "logprobs"
    },
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": number(-100, 100),
        "description": "it has to map token ids to numbers",
    },
}
ARGUMENTS = either(OBJECT, STRING, array(ANY, most=0))
"""Arguments of a call in the history: an object, the text of one, or what some clients write for none."""
DEFINITION: Mapping[str, Schema] = {"description": STRING, "parameters": OBJECT, "strict": ANY}
FUNCTION = members({"name": STRING}, DEFINITION)


def content(*kinds: str) -> Schema:
    """Content of a message: a text, or parts of these kinds."""
    text = members({"type": one_of(*kinds), "text": STRING})
    refusal = members({"type": one_of("refusal")}, refusal=STRING)
    part = either(text, refusal, STRING, reason=TEXT_ONLY)
    return either(STRING, array(part))


def form(nested: str | None) -> Schema:
    """The form of an answer. nested: the member that holds a schema; None: the form holds it itself."""
    schema = members({"schema": OBJECT}, name=STRING, description=STRING, strict=BOOL)
    properties: Schema = {"schema": OBJECT} if nested is None else {nested: schema}
    more: Schema = {} if nested is not None else {"name": STRING, "description": STRING, "strict": BOOL}
    return either(
        members({"type": one_of("text", "json_object")}), members({"type": one_of("json_schema"), **properties}, more)
    )


def hosted(*known: str) -> Schema:
    """A tool of another type, which a hosted API would run itself."""
    return members({"type": other_than(*known)})
