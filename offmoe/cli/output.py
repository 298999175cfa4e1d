"""Where output goes; the only module of the package that prints.

stdout carries the result: the model's text or a table, or with `--json` one JSON object and nothing else. Everything
else goes to stderr. A character that the terminal cannot show is replaced.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich import progress
from rich.console import Console, RenderableType
from rich.table import Table

from offmoe.errors import OffmoeError


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

    def console(self) -> Console:
        """A console for text that is drawn anew while it comes; stderr with `json`."""
        return Console(file=sys.stderr if self._json else sys.stdout, highlight=False)

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
        with _bar(what, total, progress.MofNCompleteColumn(), progress.TextColumn(unit)) as (bar, task):
            yield lambda units: bar.advance(task, units)

    @contextmanager
    def transfer(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar in bytes on stderr, but not with `json`; yields a function of (bytes done, total bytes)."""
        with _bar(what, None, progress.DownloadColumn(), progress.TransferSpeedColumn(), hidden=self._json) as (
            bar,
            task,
        ):
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextmanager
    def polled(self, what: str, poll: Callable[[], tuple[int, ...]]) -> Iterator[Callable[[], None]]:
        """Show a bar in bytes on stderr while something goes on by itself, but not with `json`.

        Args:
            what: The text before the bar.
            poll: Gives (bytes done, total bytes); asked four times a second, in a thread of the bar.

        Yields:
            A function that ends the bar early, so that text can follow. A second call does nothing.
        """
        columns = (progress.DownloadColumn(), progress.TransferSpeedColumn())
        with _bar(what, None, *columns, hidden=self._json, poll=poll) as (bar, _):
            yield bar.stop

    def json(self, values: Mapping[str, object]) -> None:
        """Write the last line of stdout, with `--json`."""
        if self._json:
            _write(json.dumps(values, allow_nan=False) + "\n", sys.stdout)

    def _show(self, parts: tuple[Table | str, ...], stream: TextIO) -> None:
        if stream is None:
            return
        console = Console(file=stream, highlight=False)
        for part in parts:
            if isinstance(part, str):
                _write(part + "\n", stream)
            else:
                with _written(stream):
                    console.print(part)


def new_table(
    title: str, left: Sequence[str] = (), right: Sequence[str] = (), *, no_wrap: bool = False, **options: Any
) -> Table:
    """An empty table of rich.

    Args:
        title: The line above it.
        left: Headers of the first columns, which are aligned to the left.
        right: Headers of the others. If no column has a header, no row of headers is shown.
        no_wrap: Whether cells keep to one line.
        options: Options of rich's `Table`.
    """
    table = Table(title=title, title_justify="left", show_header=any((*left, *right)), **options)
    for name in left:
        table.add_column(name, no_wrap=no_wrap)
    for name in right:
        table.add_column(name, justify="right", no_wrap=no_wrap)
    return table


@contextmanager
def _bar(
    what: str,
    total: int | None,
    *units: progress.ProgressColumn,
    hidden: bool = False,
    poll: Callable[[], tuple[int, ...]] | None = None,
) -> Iterator[tuple[progress.Progress, progress.TaskID]]:
    console = Console(file=sys.stderr, highlight=False)
    hidden = hidden or sys.stderr is None or not console.is_terminal  # without a stderr there is no terminal either
    columns = (progress.TextColumn(what), progress.BarColumn(), *units, progress.TimeRemainingColumn())
    # Four updates a second cost nothing measurable.
    with _Bar(*columns, console=console, transient=True, disable=hidden, refresh_per_second=4) as bar:
        task = bar.add_task(what, total=total)
        bar.poll, bar.polled = poll, task
        yield bar, task


class _Bar(progress.Progress):
    """A bar that may ask for its own state each time that it is drawn."""

    poll: Callable[[], tuple[int, ...]] | None = None
    polled = progress.TaskID(0)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn; nothing while there is nothing to do."""
        if self.poll is not None:
            done, total = self.poll()
            self.update(self.polled, completed=done, total=total, visible=total > 0)
        return super().get_renderables()


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
