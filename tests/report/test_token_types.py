from __future__ import annotations

import pytest

from offmoe.report.token_types import token_type


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [
        ("word start", [" the", "In", " \u201cand", '"The', " caf\u00e9", " \u00c9tat"]),
        ("word piece", ["ing", "tion", "n't", "'s", "\u00e9e", "x"]),
        ("number", ["7", " 42", "3.14", "-3", "1,000", "50%"]),
        ("punctuation", [".", ",", ' "', "(", " (", "...", "--", "\u2026", '."', "\u3002"]),
        (
            "code",
            [" ==", "):", "self", "snake_case", "camelCase", ".append", "(self", "{", "->", " |-", "utf8", "0x1f"],
        ),
        ("spaces", [" ", "  ", "\t"]),
        ("line break, indent", ["\n", "\n    ", "        ", "\r\n"]),
        ("special token", ["<|endoftext|>", "<s>", "</s>", "<pad>", "<start_of_turn>", "[PAD]", "<\uff5cbegin\uff5c>"]),
        ("part of a character", ["\ufffd", "<0x0A>"]),
        ("Cyrillic", [" \u043f\u0440\u0438", "\u0416"]),
        ("Greek", ["\u03b1"]),
        ("Chinese, Japanese, Korean", ["\u6f22", "\u3067\u3059", "\ud55c"]),
        ("other script", ["\u10d0"]),
        ("symbol", ["\u2192", "\U0001f600"]),
    ],
)
def test_types(kind: str, pieces: list[str]) -> None:
    assert {piece: token_type(piece) for piece in pieces} == dict.fromkeys(pieces, kind)


def test_html_is_not_special() -> None:
    assert token_type("<script>") == "code"


def test_an_empty_piece_has_a_type() -> None:
    assert token_type("") == "spaces"
