"""What the APIs have in common: the model that is served, reading messages and options, and building requests."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from offmoe.dialogue.constraint import ANY_OBJECT, GrammarCompiler
from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.messages import Message, Tool, ToolCall
from offmoe.dialogue.render import ChatRenderer
from offmoe.dialogue.sampling import Sampling
from offmoe.errors import ConfigError
from offmoe.serve.engine import Engine
from offmoe.serve.http.bodies.common import FUNCTION
from offmoe.serve.http.fields import Fields, tokens_limit


@dataclass
class Service:
    """The model that is served.

    engine: its engine.
    names: names that it answers to, its id first.
    strict: whether a field that no API defines is refused.
    strict_by: the option that made it so, for messages; "" if it is always so.
    """

    engine: Engine
    names: Sequence[str]
    strict: bool = False
    strict_by: str = "--strict"
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.renderer = ChatRenderer(self.engine.tokenizer)

    @property
    def id(self) -> str:
        return self.names[0]

    def check_model(self, fields: Fields) -> None:
        """RequestError if the request is for another model."""
        name = fields.get("model", str)
        if name is not None and name not in self.names:
            raise RequestError(
                f"the model {name!r} is not served here; this is {self.id!r}.", "model", "model_not_found", 404
            )

    def check_ignored(self, ignored: Sequence[str]) -> None:
        """RequestError for fields that no API defines, if the server is strict."""
        if self.strict and ignored:
            why = f" ({self.strict_by})" if self.strict_by else "; leave them out"
            raise RequestError(f"unknown fields: {', '.join(ignored)}{why}.", ignored[0])

    def schema_grammar(self, schema: dict[str, Any], param: str) -> str:
        """The grammar of answers that are JSON by a schema."""
        answers = self.engine.answers
        return self._grammars(param).json(schema, param, None if answers is None else answers.channels)

    def calls_grammar(self, tools: Sequence[Tool], several: bool, param: str) -> str:
        """The grammar of answers that are calls of these tools."""
        answers = self.engine.answers
        if answers is None or answers.calls is None:
            raise RequestError(f"{param}: how this model writes calls is not known to a grammar; use 'auto'.", param)
        return self._grammars(param).calls(tools, answers.calls, param, several, answers.channels)

    def _grammars(self, param: str) -> GrammarCompiler:
        try:
            return self.engine.grammars
        except ConfigError as error:
            raise RequestError(f"{param}: {error}", param) from error

    def thinking(self, wanted: bool, param: str) -> dict[str, Any]:
        """Options of the template that turn reasoning on or off. RequestError if the model cannot reason."""
        options = self.renderer.thinking(wanted)
        if options is None and wanted:
            raise RequestError(f"{param}: this model's chat template has no reasoning; leave it out.", param)
        return options or {}

    def effort(self, value: str, param: str) -> dict[str, Any]:
        """Options of the template for how much to reason."""
        if self.renderer.reads("reasoning_effort", value):
            return {"reasoning_effort": value}
        return {} if value == "default" else self.thinking(value != "none", param)


def sampling(fields: Fields, *limit_names: str, logprobs: int | None = None) -> Sampling:
    """How to choose tokens, from the fields that OpenAI's APIs share. limit_names: the fields of the most tokens."""
    biases: dict[int, float] = {}
    for token, bias in (fields.get("logit_bias", dict) or {}).items():
        biases[int(token)] = float(bias)
    return Sampling(
        temperature=fields.number("temperature"),
        top_p=fields.number("top_p"),
        top_k=fields.get("top_k", int),
        min_p=fields.number("min_p"),
        seed=fields.get("seed", int),
        repetition_penalty=fields.number("repetition_penalty"),
        frequency_penalty=fields.number("frequency_penalty") or 0.0,
        presence_penalty=fields.number("presence_penalty") or 0.0,
        logit_bias=biases,
        max_tokens=tokens_limit(fields, *limit_names),
        logprobs=logprobs,
    )


def text_parts(content: Any) -> str:
    """The text of a message's content: a string, null, or an array of text parts and refusals."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part if isinstance(part, str) else part.get("text") or part.get("refusal") or "" for part in content]
    return "".join(texts)


def arguments(value: Any, where: str) -> dict[str, Any]:
    """Arguments of a call in the history: a JSON object, or the text of one; "" and null are {}."""
    try:
        found = json.loads(value) if isinstance(value, str) and value.strip() else value or {}
    except ValueError as error:
        raise RequestError(f"{where} is not JSON ({error}).", where) from None
    if not isinstance(found, dict):
        raise RequestError(f"{where} has to be a JSON object.", where)
    return found


def chat_messages(values: Sequence[Any], where: str = "messages") -> list[Message]:
    """The conversation of a chat request. Unknown members of messages change nothing and are accepted."""
    return [_chat_message(Fields(value, f"{where}[{i}]")) for i, value in enumerate(values)]


def _chat_message(fields: Fields) -> Message:
    role = fields.need("role", str)
    calls = []
    for index, call in enumerate(fields.get("tool_calls", list) or []):
        inner = Fields(call, f"{fields.path('tool_calls')}[{index}]")
        function = Fields(inner.need("function", dict), inner.path("function"))
        calls.append(
            ToolCall(
                inner.get("id", str) or f"call_{index}",
                function.need("name", str),
                arguments(function.any("arguments"), function.path("arguments")),
            )
        )
    return Message(
        role,
        text_parts(fields.any("content")),
        fields.any("reasoning_content") or fields.any("reasoning") or "",
        tuple(calls),
        fields.get("tool_call_id", str),
        fields.get("name", str),
    )


def function_tool(definition: Mapping[str, Any]) -> Tool:
    """A tool from the object that defines its function."""
    kept = FUNCTION["properties"]
    known = {key: value for key, value in definition.items() if key in kept and value is not None}
    return Tool(definition["name"], known)


def pick(tools: Sequence[Tool], name: str, param: str) -> list[Tool]:
    """The tool of a name, alone."""
    found = [tool for tool in tools if tool.name == name]
    if not found:
        raise RequestError(f"{param}: no tool is named {name!r}.", param)
    return found


def wanted_schema(fields: Fields, name: str, nested: str | None = None) -> tuple[dict[str, Any], str] | None:
    """(schema, path) of the JSON that an answer has to be; None: any text will do.

    Args:
        fields: The object that has the form.
        name: Its member with the form.
        nested: The form's member that holds the schema; None: it holds it itself.
    """
    if name not in fields:
        return None
    form = fields.inner(name)
    kind = form.need("type", str)
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT, form.path("type")
    inner = form if nested is None else form.inner(nested)
    return inner.need("schema", dict), inner.path("schema")
