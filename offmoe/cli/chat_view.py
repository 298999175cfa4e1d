"""How `offmoe chat` shows an answer while it comes: Markdown on a terminal, plain text elsewhere."""

from __future__ import annotations

import json
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text as Styled

from offmoe.dialogue.answer import Call, Reasoning, Text
from offmoe.serve.job import Update

FENCES = ("```", "~~~")


class AnswerView:
    """Shows the updates of one answer. A context manager.

    On a terminal, a paragraph that is complete is printed for good, and the last one is drawn anew as it grows. A long
    answer would flicker if all of it were drawn anew.

    Args:
        console: Where to show it.
    """

    def __init__(self, console: Console):
        self._console = console
        self._live: Live | None = None
        self._paragraph = ""
        self._is_reasoning = False

    def __enter__(self) -> AnswerView:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="visible", transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_paragraph()
        if self._live is not None:
            self._live.stop()

    def show(self, update: Update) -> None:
        """Show an update, if it is a part of the answer."""
        match update:
            case Reasoning(text):
                self._add(text, is_reasoning=True)
            case Text(text):
                self._add(text, is_reasoning=False)
            case Call(call):
                self._end_paragraph()
                written = json.dumps(dict(call.arguments), ensure_ascii=False)
                self._print(Styled(f"→ {call.name}({written})", style="cyan"))

    def _add(self, text: str, is_reasoning: bool) -> None:
        if is_reasoning != self._is_reasoning:
            self._end_paragraph()
            self._is_reasoning = is_reasoning
        if self._live is None:
            self._console.out(Styled(text).plain, end="", style="dim" if is_reasoning else None, highlight=False)
            self._paragraph += text
            return
        self._paragraph += text
        complete, self._paragraph = split_paragraphs(self._paragraph)
        if complete:
            self._print(self._rendered(complete))
        self._live.update(self._rendered(self._paragraph), refresh=True)

    def _end_paragraph(self) -> None:
        rest, self._paragraph = self._paragraph, ""
        if self._live is None:
            if rest and not rest.endswith("\n"):
                self._console.out("")
        elif rest.strip():
            self._live.update("", refresh=True)
            self._print(self._rendered(rest))

    def _rendered(self, text: str) -> Markdown | Styled:
        return Styled(text.strip("\n"), style="dim italic") if self._is_reasoning else Markdown(text)

    def _print(self, part: Markdown | Styled) -> None:
        self._console.print(part)


def split_paragraphs(text: str) -> tuple[str, str]:
    """(the paragraphs of a Markdown text that are complete, the rest). A blank line in a block of code ends nothing."""
    end, position, fence = 0, 0, ""
    for line in text.splitlines(keepends=True):
        position += len(line)
        start = line.strip()[:3]
        if start in FENCES and fence in ("", start):
            fence = "" if fence else start
        if not line.strip() and line.endswith("\n") and not fence:
            end = position
    return text[:end], text[end:]
