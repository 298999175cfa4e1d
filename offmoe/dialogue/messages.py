"""What a conversation consists of: messages, tools, and calls of tools; the same for every API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made. `arguments`: a JSON object."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    name: its name.
    definition: the function's object as the client wrote it, with "name", "description" and "parameters". The order
        of keys is kept: another order would be another prompt.
    """

    name: str
    definition: Mapping[str, Any]

    @property
    def parameters(self) -> dict[str, Any]:
        """JSON schema of the arguments; any object, if the client gave none."""
        return dict(self.definition.get("parameters") or {"type": "object"})

    def for_template(self) -> dict[str, Any]:
        """The form that chat templates read."""
        return {"type": "function", "function": {"description": "", "parameters": self.parameters, **self.definition}}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    role: one of `ROLES`.
    reasoning: what the model thought before an assistant's text.
    call_id: the id of the call that a tool's message answers.
    """

    role: str
    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str | None = None
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The form that chat templates read."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in self.calls
            ]
        if self.call_id is not None:
            message["tool_call_id"] = self.call_id
        if self.name is not None:
            message["name"] = self.name
        return message
