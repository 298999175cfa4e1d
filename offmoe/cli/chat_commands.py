"""The commands of `offmoe chat`: lines that begin with a slash."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from offmoe.dialogue.conversation import Conversation
from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.sampling import Sampling
from offmoe.errors import ConfigError
from offmoe.text import did_you_mean

SETTINGS = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "max_tokens")
"""Settings that /set changes, all of `Sampling`."""
WHOLE = ("top_k", "seed", "max_tokens")


@dataclass
class State:
    """What commands change."""

    conversation: Conversation
    sampling: Sampling


def run_command(line: str, state: State, stats: Callable[[], str]) -> str | None:
    """Carry out a command.

    Args:
        line: The line, with its slash.
        state: What it may change.
        stats: Describes the expert cache and the last answer.

    Returns:
        The line to show; None: the chat ends.

    Raises:
        ConfigError: There is no such command, or it cannot be carried out.
    """
    try:
        name, *words = shlex.split(line[1:]) or [""]
    except ValueError as error:
        raise ConfigError(f"{line}: {error}.") from error
    rest = line[1:].strip().partition(" ")[2].strip()
    match name:
        case "bye" | "exit" | "quit":
            return None
        case "help" | "":
            return HELP
        case "reset":
            state.conversation.turns.clear()
            return "a new conversation begins."
        case "system":
            state.conversation.system = rest
            return "the model is told that before the conversation." if rest else "the model is told nothing before."
        case "save" | "load" if len(words) != 1:
            raise ConfigError(f"/{name} takes the name of one file.")
        case "save":
            state.conversation.save(words[0])
            return f"saved to {words[0]}."
        case "load":
            state.conversation = Conversation.load(words[0])
            return f"{len(state.conversation.turns)} turns of {words[0]}."
        case "stats":
            return stats()
        case "set":
            return _set(words, state)
    commands = [line.split()[0][1:] for line in HELP.splitlines()]
    raise ConfigError(f"unknown command /{name}{did_you_mean(name, commands)}; /help lists them.")


HELP = """\
/reset                  forget the conversation
/system TEXT            tell the model TEXT before the conversation; nothing: tell it nothing
/set NAME VALUE         change how it answers: temperature, top_p, top_k, min_p, seed, repetition_penalty, max_tokens
/set                    show these settings
/save FILE, /load FILE  keep the conversation in a file
/stats                  show what the expert cache does
/bye                    end; so does Ctrl-D
Ctrl-C ends the answer only. Alt-Enter, or \\ at the end of a line, begins a new line."""


def _set(words: list[str], state: State) -> str:
    if not words:
        now = {name: getattr(state.sampling, name) for name in SETTINGS}
        return ", ".join(f"{name} {'default' if value is None else value}" for name, value in now.items())
    name, *values = words
    if name not in SETTINGS:
        raise ConfigError(f"/set {name}: unknown setting{did_you_mean(name, SETTINGS)}; one of {', '.join(SETTINGS)}.")
    if len(values) != 1:
        raise ConfigError(f"/set {name} takes one value; 'default' leaves it to the model.")
    state.sampling = with_setting(state.sampling, name, values[0])
    return f"{name} is {values[0]}."


def with_setting(sampling: Sampling, name: str, text: str) -> Sampling:
    """The settings with one of them changed. ConfigError if the value is none of it."""
    assert name in {f.name for f in fields(Sampling)}
    value: Any = None
    if text != "default":
        try:
            value = int(text) if name in WHOLE else float(text)
        except ValueError:
            kind = "a whole number" if name in WHOLE else "a number"
            raise ConfigError(f"/set {name}: {text!r} is not {kind}.") from None
    changed = replace(sampling, **{name: value})
    try:
        changed.check()
    except RequestError as error:
        raise ConfigError(str(error)) from error
    return changed
