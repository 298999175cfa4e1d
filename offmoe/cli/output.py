"""Where output goes; the only module of the package that prints.

stdout carries the result: the model's text or a table, or with `--json` one JSON object and nothing else. Everything
else goes to stderr. A character that the terminal cannot show is replaced.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from offmoe.errors import OffmoeError

if TYPE_CHECKING:
    from rich.table import Table


class Output:
    """Output of one command. json: whether stdout is for the JSON object alone."""

    def __init__(self, json: bool):
        self._json = json
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")

    def text(self, piece: str) -> None:
        """Show generated text at once."""
        _write(piece, sys.stderr if self._json else sys.stdout)

    def note(self, line: str) -> None:
        """Write a line about the run to stderr."""
        _write(line + "\n", sys.stderr)

    def result(self, *parts: Table | str) -> None:
        """Show the tables and lines that the command is for."""
        self._show(parts, sys.stderr if self._json else sys.stdout)

    def details(self, *parts: Table | str) -> None:
        """Show tables and lines that accompany the result, on stderr."""
        self._show(parts, sys.stderr)

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Show a bar on stderr while the block runs, if that is a terminal; yields a function that advances it."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
        # Without a stderr there is no terminal either. Four updates a second cost nothing measurable.
        console = Console(file=sys.stderr, highlight=False)
        hidden = sys.stderr is None or not console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=hidden, refresh_per_second=4) as bar:
            task = bar.add_task(what, total=total)
            yield lambda units: bar.advance(task, units)

    @contextmanager
    def transfer(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar in bytes on stderr, but not with `json`; yields a function of (bytes done, total bytes)."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        console = Console(file=sys.stderr, highlight=False)
        hidden = self._json or sys.stderr is None or not console.is_terminal
        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=hidden, refresh_per_second=4) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def json(self, values: Mapping[str, object]) -> None:
        """Write the last line of stdout, with `--json`."""
        if self._json:
            _write(json.dumps(values, allow_nan=False) + "\n", sys.stdout)

    def _show(self, parts: tuple[Table | str, ...], stream: TextIO) -> None:
        from rich.console import Console

        if stream is None:
            return
        console = Console(file=stream, highlight=False)
        for part in parts:
            if isinstance(part, str):
                _write(part + "\n", stream)
            else:
                with _written(stream):
                    console.print(part)


def _write(text: str, stream: TextIO) -> None:
    with _written(stream):
        print(text, end="", file=stream, flush=True)


@contextmanager
def _written(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        name = "stdout" if stream is sys.stdout else "stderr"
        raise OffmoeError(f"cannot write to {name}: {error.strerror}; free space or send it elsewhere.") from error


@contextmanager
def logging_to_stderr(verbose: bool) -> Iterator[None]:
    """Write offmoe's own log to stderr while a command runs: warnings, with `verbose` everything."""
    logger = logging.getLogger("offmoe")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("offmoe: %(levelname)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
