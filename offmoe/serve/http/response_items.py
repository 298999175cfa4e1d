"""The items of a responses request: turns of the conversation, and tools of several kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.messages import Message, Tool, ToolCall
from offmoe.serve.http.fields import Fields
from offmoe.serve.http.service import arguments, function_tool, text_parts


@dataclass(frozen=True)
class Offered:
    """A tool as the prompt offers it, and as the answer has to call it.

    name: the client's name. namespace: the namespace it comes from. is_custom: whether it takes one text.
    """

    tool: Tool
    name: str
    namespace: str | None = None
    is_custom: bool = False


def read_tools(values: Sequence[Any]) -> tuple[dict[str, Offered], list[str]]:
    """(tools by the name that the prompt offers, paths of tools that this server does not have)."""
    offered: dict[str, Offered] = {}
    hosted = []
    for index, value in enumerate(values):
        where = f"tools[{index}]"
        kind = value["type"]
        found = []
        if kind == "function":
            tool = function_tool(value)
            found = [Offered(tool, tool.name)]
        elif kind == "custom":
            found = [_custom(value)]
        elif kind == "namespace":
            found = _namespace(value)
        else:
            hosted.append(where)
        for tool_offered in found:
            if tool_offered.tool.name in offered:
                raise RequestError(f"{where}: a tool is named {tool_offered.tool.name!r} already.", where)
            offered[tool_offered.tool.name] = tool_offered
    return offered, hosted


def _custom(value: Mapping[str, Any]) -> Offered:
    """A tool that takes a text: offered as a function with one string. Its own grammar is not enforced."""
    name = value["name"]
    parameters = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    definition = {"name": name, "description": value.get("description") or "", "parameters": parameters}
    return Offered(Tool(name, definition), name, is_custom=True)


def _namespace(value: Mapping[str, Any]) -> list[Offered]:
    namespace = value["name"]
    found = []
    for inner in value.get("tools") or []:
        tool = function_tool(inner)
        unique = f"{namespace}__{tool.name}"
        found.append(Offered(Tool(unique, {**tool.definition, "name": unique}), tool.name, namespace))
    return found


def read_conversation(fields: Fields) -> tuple[list[Message], list[str]]:
    """(the conversation, paths of items that say nothing to the model)."""
    instructions = fields.get("instructions", str)
    messages = [Message("system", instructions)] if instructions else []
    value: Any = fields.any("input")
    if isinstance(value, str):
        return [*messages, Message("user", value)], []
    unread = []
    for index, item in enumerate(value):
        where = f"input[{index}]"
        message = _item(Fields(item, where), where)
        if message is None:
            unread.append(where)
        elif message.role == "assistant" and messages and messages[-1].role == "assistant":
            messages[-1] = _joined(messages[-1], message)
        else:
            messages.append(message)
    return messages, unread


def _joined(first: Message, second: Message) -> Message:
    """Two items of one turn of the assistant as one message."""
    return replace(
        first,
        text=first.text + second.text,
        reasoning=first.reasoning + second.reasoning,
        calls=first.calls + second.calls,
    )


def _item(fields: Fields, where: str) -> Message | None:
    """One item of the input; None: it says nothing to the model."""
    kind = fields.get("type", str, "message")
    if kind == "message":
        return Message(fields.need("role", str), text_parts(fields.any("content")))
    if kind == "reasoning":
        text = text_parts(fields.any("content"))
        return Message("assistant", reasoning=text) if text else None
    if kind in ("function_call", "custom_tool_call"):
        name, call_id = fields.need("name", str), fields.need("call_id", str)
        namespace = fields.get("namespace", str)
        if kind == "custom_tool_call":
            found = {"input": fields.get("input", str) or ""}
        else:
            found = arguments(fields.any("arguments"), f"{where}.arguments")
        full = name if namespace is None else f"{namespace}__{name}"
        return Message("assistant", calls=(ToolCall(call_id, full, found),))
    if kind in ("function_call_output", "custom_tool_call_output"):
        return Message("tool", text_parts(fields.any("output")), call_id=fields.need("call_id", str))
    return None
