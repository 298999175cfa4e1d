"""The file of results: one line per request, whole or not at all.

While a run goes on, results are appended as they end, each with one write. At the end the file is written anew in the
order of the requests. A run that finds the file goes on with it: results that are there are not computed again, the
half line that a killed run may leave is dropped, and requests that failed are tried again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from offmoe.batch.lines import Line
from offmoe.errors import ConfigError, OffmoeError
from offmoe.files import check_writable, replacing


class Sink(Protocol):
    """Where the results of lines go."""

    def is_done(self, line: Line) -> bool:
        """Whether a line has an answer and needs no other."""

    def add(self, line: Line, result: Mapping[str, Any], *, failed: bool) -> None:
        """Take the result of a line. failed: it is an error."""


class Results:
    """The results of a run; a context manager that closes the file.

    Args:
        path: The file.
        lines: The requests.
        fingerprint: Of the model and its options; results of another one are refused.

    Raises:
        ConfigError: The file holds something else, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], lines: Sequence[Line], fingerprint: str):
        self._path, self._lines, self._fingerprint = Path(path), lines, fingerprint
        check_writable(self._path, f"-o {self._path}")
        self._done: dict[str, bytes] = {}
        self._by_id = {line.custom_id: line for line in lines}
        self._failed: set[str] = set()
        for number, result in enumerate(self._existing(), 1):
            self._take(number, result)
        self._file: BufferedRandom | None = None

    def is_done(self, line: Line) -> bool:
        """Whether a line has an answer."""
        return line.custom_id in self._done

    @property
    def num_failed(self) -> int:
        """Lines whose result is an error."""
        return len(self._failed)

    def __enter__(self) -> Results:
        try:
            self._rewrite(list(self._done.values()))
            self._file = open(self._path, "r+b")
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise ConfigError(f"-o {self._path}: cannot be written ({error.strerror}).") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            with suppress(OSError):  # the end of a line that could not be written
                self._file.close()

    def add(self, line: Line, result: Mapping[str, Any], *, failed: bool) -> None:
        """Append the result of a line.

        Raises:
            OffmoeError: The file cannot be written; what it has stays.
        """
        assert self._file is not None
        raw = json.dumps(result, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            self._file.write(raw)
            self._file.flush()
        except OSError as error:
            raise self._full(error) from error
        self._done[line.custom_id] = raw
        if failed:
            self._failed.add(line.custom_id)

    def finish(self) -> None:
        """Write all results in the order of the requests. OffmoeError if they cannot be written."""
        try:
            self._rewrite([self._done[line.custom_id] for line in self._lines if line.custom_id in self._done])
        except OSError as error:
            raise self._full(error) from error

    def _full(self, error: OSError) -> OffmoeError:
        return OffmoeError(
            f"-o {self._path}: cannot be written ({error.strerror}); free space and give the command again, it goes on."
        )

    def _rewrite(self, results: Sequence[bytes]) -> None:
        with replacing(self._path) as temporary, open(temporary, "wb") as file:
            file.writelines(results)

    def _existing(self) -> list[bytes]:
        """The whole lines of the file."""
        try:
            raw = self._path.read_bytes() if self._path.exists() else b""
        except OSError as error:
            raise ConfigError(f"-o {self._path}: cannot be read ({error.strerror}).") from error
        return [line + b"\n" for line in raw.split(b"\n")[:-1]]

    def _take(self, number: int, raw: bytes) -> None:
        """Keep a result of an earlier run, if it is an answer to a request of this one."""
        where = f"-o {self._path}, line {number}"
        try:
            result = json.loads(raw)
            custom_id, response, error = result["custom_id"], result["response"], result["error"]
            body = response["body"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{where}: no result of a batch; choose another file, or remove it.") from None
        line = self._by_id.get(custom_id)
        if line is None:
            raise ConfigError(
                f"{where}: {custom_id!r} is in no line of the input; choose another file for its results."
            )
        if error is not None:
            return
        if body.get("system_fingerprint") != self._fingerprint:
            raise ConfigError(
                f"{where}: the result of another model or of other options; choose another file, or remove it."
            )
        if response.get("request_id") != line.digest:
            raise ConfigError(f"{where}: {custom_id!r} asked for something else then; choose another file.")
        self._done[custom_id] = raw
