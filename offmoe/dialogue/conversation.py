"""A conversation of one person with the model: its turns, and how it is written to a file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offmoe.dialogue.messages import Message, ToolCall
from offmoe.errors import ConfigError
from offmoe.files import check_folder, replacing

FORMAT, VERSION = "offmoe-conversation", 1


@dataclass
class Conversation:
    """The turns so far, oldest first. `system`: what the model is told before the first; "" for nothing."""

    system: str = ""
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """All messages, as a chat template takes them."""
        return ([Message("system", self.system)] if self.system else []) + self.turns

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation as JSON. ConfigError if the file cannot be written."""
        check_folder(path, str(path))
        turns = [turn.for_template() for turn in self.turns]
        values = {"format": FORMAT, "version": VERSION, "system": self.system, "messages": turns}
        try:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}).") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Conversation:
        """The conversation of a file that `save` wrote. ConfigError for anything else."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not a conversation of offmoe chat ({error}).") from error
        try:
            if values["format"] != FORMAT or values["version"] != VERSION:
                raise ValueError("another format")
            return cls(str(values["system"]), _messages(values["messages"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: not a conversation of offmoe chat; /save writes one.") from error


def _messages(values: Sequence[dict[str, Any]]) -> list[Message]:
    return [
        Message(
            str(value["role"]),
            str(value["content"]),
            str(value.get("reasoning_content", "")),
            tuple(
                ToolCall(str(call["id"]), str(call["function"]["name"]), dict(call["function"]["arguments"]))
                for call in value.get("tool_calls", [])
            ),
            value.get("tool_call_id"),
            value.get("name"),
        )
        for value in values
    ]
