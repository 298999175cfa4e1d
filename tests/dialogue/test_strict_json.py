"""JSON by the letter."""

from __future__ import annotations

import pytest

from offmoe.dialogue.strict_json import parse_json


@pytest.mark.parametrize(
    "text", ['{"a": [1, "\\u00e9", "\\ud83d\\ude00"]}', b'{"a": [1, "\xc3\xa9", "\xf0\x9f\x98\x80"]}']
)
def test_json_is_taken(text: bytes | str) -> None:
    assert parse_json(text) == {"a": [1, "é", "😀"]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "NaN",
        "[-Infinity]",
        b"\xff\xfe",
        '"\\ud800"',
        b'"\\udc00"',
        '"\ud800"',
        b'"\xed\xa0\x80"',
        "[" * 100_000,
    ],
    ids=lambda text: ascii(text)[:16],
)
def test_what_other_parsers_refuse_is_refused(text: bytes | str) -> None:
    with pytest.raises(ValueError, match=r"^not JSON: ."):
        parse_json(text)
