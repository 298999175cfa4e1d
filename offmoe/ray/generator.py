"""Answers rows of a dataset of Ray with a model that the worker has loaded."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from offmoe.api import HUB_OPTIONS, from_pretrained
from offmoe.batch.lines import NEW_TOKENS, Line, line_of, parse_line
from offmoe.batch.run import Batch
from offmoe.errors import ConfigError
from offmoe.hf.hub.locate import locate
from offmoe.hf.load.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

LINE, TEXT = "line", "text"
"""Columns besides those of the batch format: the number of a line, and a whole line of JSON."""


class Generator:
    """Answers requests of the batch format with one model, which is loaded once: when an actor makes this object.

    For `ray.data.Dataset.map_batches`, which gives each actor one request after another:

        requests.map_batches(
            Generator,
            fn_constructor_kwargs={"model": "demo"},
            batch_size=64,
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=8,
        )

    A row has the members of a line: `custom_id`, `url` and `body`, or `prompt` or `messages` with their options. `body`
    may be a text of JSON. A row of `ray.data.read_text` has the whole line in `text`. Members that are null count as
    absent, since a table has the same columns in all rows. `line`, a number, is what results are numbered by.

    The rows that come back are in the same order, with the columns `id`, `custom_id`, `response` and `error` of the
    batch format. `response` and `error` are texts of JSON, since a column has one type; `error` is null for an answer.

    Args:
        model: As in `offmoe.from_pretrained`. Every machine has to reach it.
        names: What requests may call the model; answers call it by the first. Default: `model`.
        fingerprint: `system_fingerprint` of answers.
        created: `created` of answers, in seconds since 1970. Default: now.
        max_new_tokens: Tokens of an answer whose request does not say.
        batch_size: Rows under way at the same time in one actor. Default: as many as pay, measured in each call.
        batch_invariant: As in `generate_many`.
        options: Of `offmoe.from_pretrained`.

    Raises:
        OffmoeError: The model cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        *,
        names: Sequence[str] = (),
        fingerprint: str = "offmoe",
        created: int | None = None,
        max_new_tokens: int = NEW_TOKENS,
        batch_size: int | None = None,
        batch_invariant: bool | None = None,
        **options: Any,
    ):
        self._model: Any = from_pretrained(model, **options)
        source = locate(model, **{name: options[name] for name in HUB_OPTIONS if name in options})
        self._batch = Batch(
            self._model,
            load_tokenizer(source.model, source.beside),
            list(names) or [str(model)],
            fingerprint,
            int(time.time()) if created is None else created,
            max_new_tokens,
            batch_size,
            batch_invariant,
        )

    def __call__(self, rows: Mapping[str, np.ndarray] | pa.Table) -> pa.Table:
        """Answer rows.

        Args:
            rows: Columns by name, or a table of Arrow (`batch_format="pyarrow"`).

        Returns:
            A table with one row for each.
        """
        lines = [_line(index, row) for index, row in enumerate(_rows(rows), 1)]
        answers = _Answers()
        # The order in which rows end is not theirs, and two rows may have one custom_id: results are kept by object.
        self._batch.run(lines, answers, lambda _: None)
        return _table([answers.results[id(line)] for line in lines])

    def close(self) -> None:
        """Release the model. Idempotent."""
        self._model.offload.close()

    def __del__(self) -> None:
        with suppress(AttributeError):  # the model was not loaded
            self.close()


class _Answers:
    """Keeps the results of one call."""

    def __init__(self) -> None:
        self.results: dict[int, Mapping[str, Any]] = {}

    def is_done(self, line: Line) -> bool:
        """Whether a line needs no answer."""
        return id(line) in self.results

    def add(self, line: Line, result: Mapping[str, Any], *, failed: bool) -> None:
        """Take the result of a line."""
        self.results[id(line)] = result


def _rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch, as objects of JSON."""
    if hasattr(batch, "to_pylist"):
        rows: list[dict[str, Any]] = batch.to_pylist()
    else:
        columns = list(batch)
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    return [_plain(row) for row in rows]


def _plain(value: Any) -> Any:
    """A value of a table as a value of JSON; members that are null are left out."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _line(index: int, row: dict[str, Any]) -> Line:
    """The request of a row."""
    number = row.pop(LINE, index)
    if not isinstance(number, int):
        raise ConfigError(f"the column {LINE!r} has to hold numbers of lines.")
    if set(row) == {TEXT}:
        return parse_line(number, row[TEXT])
    if isinstance(row.get("body"), str):
        with suppress(ValueError):
            row["body"] = json.loads(row["body"])
    return line_of(number, row)


def _table(results: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Results as rows. Types are given, so that parts without an error have the same as others."""
    import pyarrow as pa

    texts = {
        name: [None if row[name] is None else json.dumps(row[name], ensure_ascii=False) for row in results]
        for name in ("response", "error")
    }
    columns = {name: [row[name] for row in results] for name in ("id", "custom_id")}
    return pa.table({name: pa.array(values, pa.string()) for name, values in {**columns, **texts}.items()})
