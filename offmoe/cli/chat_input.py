"""The input line of `offmoe chat`: several lines, history, and completion of commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from offmoe.cli.chat_commands import HELP

COMMANDS = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")] + ["/load"]


def reader(keys: Input | None = None, screen: Output | None = None, history: Path | None = None) -> Iterator[str]:
    """The texts that the user enters, until Ctrl-D. Ctrl-C empties the line.

    Args:
        keys: Where keys come from; None: the terminal.
        screen: Where the line is shown; None: the terminal.
        history: File of earlier lines; None: in the user's folder for such files.
    """
    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    session: PromptSession[Any] = PromptSession(
        history=_history(history),
        key_bindings=bindings,
        multiline=True,
        completer=WordCompleter(COMMANDS, sentence=True),
        complete_while_typing=False,
        prompt_continuation="… ",
        input=keys,
        output=screen,
    )
    while True:
        try:
            text = session.prompt("> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if text:
            yield text


def _history(path: Path | None) -> History:
    path = path or Path.home() / ".local" / "state" / "offmoe" / "chat_history"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        return FileHistory(str(path))
    return InMemoryHistory()
