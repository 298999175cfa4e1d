"""Rows of a dataset are answered as the lines of a file are. No cluster is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the extra offmoe[serve] is not installed")
pytest.importorskip("openai", reason="the extra offmoe[serve] is not installed")
pytest.importorskip("pyarrow", reason="the extra offmoe[ray] is not installed")

import pyarrow as pa

from offmoe.batch.lines import CHAT, COMPLETIONS
from offmoe.errors import ConfigError, OffmoeError
from offmoe.ray import Generator

BODY = {"prompt": "And the LORD said", "temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    made = Generator("demo", device="cpu", batch_size=2, fingerprint="f", created=7, max_new_tokens=3)
    yield made
    made.close()
    made.close()


def table_of(*rows: dict[str, Any]) -> pa.Table:
    """A table with the columns of all rows; a row has null in those that it lacks."""
    names = {name: None for row in rows for name in row}
    return pa.Table.from_pylist([{**names, **row} for row in rows])


def texts(table: Any) -> list[str | None]:
    """The text of each answer; None for an error."""
    found = []
    for row in table.to_pylist():
        body = json.loads(row["response"])["body"]
        found.append(body["choices"][0]["text"] if row["error"] is None else None)
    return found


def test_rows_of_every_form_get_their_answers_in_order(generator: Generator) -> None:
    line = {"custom_id": "a", "url": COMPLETIONS, "body": BODY}
    nested = generator(table_of(line, {**line, "custom_id": "b", "body": {**BODY, "prompt": "x"}}))
    assert nested.column_names == ["id", "custom_id", "response", "error"]
    assert set(nested.schema.types) == {pa.string()}
    assert nested["custom_id"].to_pylist() == ["a", "b"]
    assert nested["id"].to_pylist() == ["batch_req_1", "batch_req_2"]
    first, second = texts(nested)
    assert first == " unto me, I"
    response = json.loads(nested["response"][0].as_py())
    assert (response["body"]["system_fingerprint"], response["body"]["created"]) == ("f", 7)
    numbers = {"line": np.array([5, 9]), "url": np.array([COMPLETIONS] * 2), "custom_id": np.array(["a", "b"])}
    bodies = np.array([json.dumps(BODY), json.dumps({**BODY, "prompt": "x"})], dtype=object)
    as_text = generator({**numbers, "body": bodies})
    assert texts(as_text) == [first, second]
    assert as_text["id"].to_pylist() == ["batch_req_5", "batch_req_9"]
    assert as_text["response"][0] == nested["response"][0]
    assert texts(generator({"text": np.array([json.dumps(line), json.dumps(BODY)])})) == [first, first]


def test_columns_that_a_row_does_not_have_are_absent(generator: Generator) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    rows: list[dict[str, Any]] = [
        BODY,
        {"custom_id": "c", "url": COMPLETIONS, "body": {"prompt": "x", "max_tokens": 2}},
    ]
    rows.append({"messages": messages})
    table = generator(table_of(*rows))
    assert table["error"].to_pylist() == [None] * 3
    assert table["custom_id"].to_pylist() == ["line-1", "c", "line-3"]
    kinds = [json.loads(response)["body"]["object"] for response in table["response"].to_pylist()]
    assert kinds == ["text_completion", "text_completion", "chat.completion"]


def test_a_row_that_cannot_be_answered_has_its_error(generator: Generator) -> None:
    rows: list[dict[str, Any]] = [
        {"custom_id": "a", "url": COMPLETIONS, "body": "{"},
        {"custom_id": "a", "url": CHAT, "body": None},
        {"custom_id": "a", "prompt": "x", "n": 9},
        {"custom_id": "a", "prompt": "And the LORD said"},
    ]
    table = generator(table_of(*rows))
    assert [error is None for error in table["error"].to_pylist()] == [False, False, False, True]
    assert json.loads(table["response"][3].as_py())["body"]["usage"]["completion_tokens"] == 3
    assert json.loads(generator({"text": np.array(["{bad"])})["error"][0].as_py())["code"] == "invalid_json"
    assert generator(pa.table({"text": pa.array([], pa.string())})).num_rows == 0


def test_what_no_row_can_do_without_is_one_error(generator: Generator) -> None:
    with pytest.raises(ConfigError, match="'line' has to hold numbers"):
        generator({"text": np.array(["{}"]), "line": np.array(["first"])})
    with pytest.raises(OffmoeError, match="no-such-folder"):
        Generator("/no-such-folder")
