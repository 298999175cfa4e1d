"""Lines of a file of prompts, and the file of their results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from offmoe.batch.lines import CHAT, COMPLETIONS, Line, read_lines
from offmoe.batch.results import Results
from offmoe.errors import ConfigError, OffmoeError


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_both_forms_of_lines_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.jsonl",
        {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": []}},
        "",
        {"prompt": "x", "max_tokens": 3},
        {"custom_id": "c", "messages": [{"role": "user", "content": "x"}]},
    )
    lines = read_lines(path)
    assert [(line.number, line.custom_id, line.url) for line in lines] == [
        (1, "a", CHAT),
        (3, "line-3", COMPLETIONS),
        (4, "c", CHAT),
    ]
    assert lines[1].body == {"prompt": "x", "max_tokens": 3}
    assert len({line.digest for line in lines}) == 3


def test_files_of_other_editors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n\r\n{"prompt": "\xe2\x80\xa8"}')  # a mark, CRLF, no last newline
    assert [(line.number, line.body) for line in read_lines(path)] == [(1, {"prompt": "x"}), (3, {"prompt": "\u2028"})]
    path.write_bytes(b'{"prompt": "\xff"}\n' + json.dumps({"prompt": "x" * 10**7}).encode())
    bad, huge = read_lines(path)
    assert bad.error is not None
    assert len(huge.body["prompt"]) == 10**7


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ('{"prompt": "\\ud800"}', "not JSON"),
        ("[1]", "has to be a JSON object"),
        ({"custom_id": 5, "prompt": "x"}, "custom_id has to be a text"),
        ({"custom_id": "", "prompt": "x"}, "not an empty one"),
        ("[" * 100_000, "not JSON"),
        ('{"prompt": "x"} {"prompt": "y"}', "not JSON"),
        ({"text": "x"}, "neither url and body, nor a prompt"),
        ({"url": "/v1/embeddings", "body": {}}, "/v1/chat/completions or /v1/completions"),
        ({"url": CHAT, "method": "GET", "body": {}}, "has to be POST"),
        ({"url": CHAT}, "body is missing"),
        ({"url": CHAT, "body": {}, "more": 1}, "more: unknown field"),
    ],
)
def test_a_line_that_cannot_be_read_keeps_its_error(tmp_path: Path, line: object, words: str) -> None:
    good, bad = read_lines(write(tmp_path / "in.jsonl", {"prompt": "x"}, line))
    assert good.error is None
    assert bad.error is not None
    assert words in str(bad.error)
    assert bad.number == 2


def test_what_is_wrong_with_the_whole_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no lines"):
        read_lines(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_lines(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigError, match="lines 1 and 2 have the same custom_id 'a'"):
        read_lines(
            write(tmp_path / "twice.jsonl", {"custom_id": "a", "prompt": "x"}, {"custom_id": "a", "prompt": "y"})
        )


LINES = [Line(i, f"id-{i}", COMPLETIONS, {}, f"digest-{i}") for i in (1, 2, 3)]


def result(line: Line, fingerprint: str = "f", **more: Any) -> dict[str, Any]:
    body = {"system_fingerprint": fingerprint}
    response = {"status_code": 200, "request_id": line.digest, "body": body}
    return {"custom_id": line.custom_id, "response": response, "error": None, **more}


def test_results_get_the_order_of_requests_and_a_half_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Results(path, LINES, "f") as results:
        results.add(LINES[2], result(LINES[2]), failed=False)
        results.add(LINES[0], result(LINES[0], error={"message": "no"}), failed=True)
    assert [json.loads(line)["custom_id"] for line in path.read_text().splitlines()] == ["id-3", "id-1"]
    path.write_bytes(path.read_bytes() + b'{"custom_id": "id-2", "resp')  # as a killed run leaves it
    with Results(path, LINES, "f") as results:
        assert [results.is_done(line) for line in LINES] == [False, False, True]  # what failed is tried again
        assert results.num_failed == 0
        for line in LINES[:2]:
            results.add(line, result(line), failed=False)
        results.finish()
    assert [json.loads(line)["custom_id"] for line in path.read_text().splitlines()] == ["id-1", "id-2", "id-3"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a text", "no result of a batch"),
        ({"custom_id": "id-1"}, "no result of a batch"),
        (result(LINES[0], "g"), "of another model or of other options"),
        (result(Line(1, "id-1", digest="other")), "asked for something else"),
        (result(Line(9, "id-9")), "is in no line of the input"),
    ],
)
def test_results_of_something_else_are_refused_and_stay(tmp_path: Path, line: object, words: str) -> None:
    path = write(tmp_path / "out.jsonl", line)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=words):
        Results(path, LINES, "f")
    assert path.read_bytes() == before


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """A file cannot become longer than `room` bytes while the block runs."""
    resource = pytest.importorskip("resource", reason="this system has no limit of a file's size")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_no_result_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    room = len(json.dumps(result(LINES[0]))) + 20  # the second result fits in part
    with full_disk(room), Results(path, LINES, "f") as results:
        results.add(LINES[0], result(LINES[0]), failed=False)
        with pytest.raises(OffmoeError, match=r"cannot be written .*; free space and give the command again"):
            results.add(LINES[1], result(LINES[1]), failed=False)
    assert path.stat().st_size == room
    with Results(path, LINES, "f") as results:
        assert [results.is_done(line) for line in LINES] == [True, False, False]
        for line in LINES[1:]:
            results.add(line, result(line), failed=False)
        before = path.read_bytes()
        with full_disk(room), pytest.raises(OffmoeError, match="cannot be written"):
            results.finish()
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    with full_disk(room), pytest.raises(ConfigError, match="cannot be written"):
        Results(path, LINES, "f").__enter__()
    assert path.read_bytes() == before
