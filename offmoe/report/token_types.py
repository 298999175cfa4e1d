"""Classifies tokens by their text: word starts, word pieces, numbers, code, scripts.

A single piece of text says little (is "in" a preposition or Python?), so the rules are few, and ambiguous pieces count
as prose. Nothing depends on a tokenizer: pieces of every vocabulary are plain text.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

WORD_START = "word start"
WORD_PIECE = "word piece"
NUMBER = "number"
PUNCTUATION = "punctuation"
CODE = "code"
SPACE = "spaces"
NEWLINE = "line break, indent"
SPECIAL = "special token"
BYTES = "part of a character"
OTHER_SCRIPT = "other script"
SYMBOL = "symbol"

TYPES = {
    WORD_START: "Latin letters after a space, or with a capital: ' the', 'In'",
    WORD_PIECE: "Latin letters that continue a word: 'ing', 'tion'",
    NUMBER: "digits, with a separator or a sign at most: '7', ' 42', '3.14'",
    PUNCTUATION: "marks of prose: '.', ',', ' \"', ' ('",
    CODE: "operators, brackets and names that prose does not have: ' ==', '):', 'self', 'snake_case'",
    SPACE: "spaces and tabs alone",
    NEWLINE: "whitespace with a line break, or four spaces and more",
    SPECIAL: "control tokens such as '<|endoftext|>'",
    BYTES: "bytes that are no character by themselves",
    SYMBOL: "emoji, arrows, box drawing, mathematics",
}
"""Meaning of every type that is not a script. Letters of other scripts have the script's name as their type:
'Cyrillic', 'Greek', 'Chinese, Japanese, Korean', ... ."""

SCRIPTS = {
    **dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "FULLWIDTH", "HALFWIDTH"), "Chinese, Japanese, Korean"),
    **{name.upper(): name for name in ("Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Thai")},
}
"""Type of the letters whose Unicode names begin with a word."""

_SPECIAL = re.compile(
    r"<\|.*\|>|<\uff5c.*\uff5c>|</?(s|pad|unk|bos|eos|cls|sep|mask|think|unused\d*|\w+_of_\w+)>|"
    r"\[/?(PAD|UNK|CLS|SEP|MASK|INST|BOS|EOS)\]"
)
_NUMBER = re.compile(r"[+-]?[\d.,_]*\d[\d.,_%]*")
_PROSE_MARKS = set(".,;:!?'\"()-\u2013\u2014\u2026\u201c\u201d\u2018\u2019\u00ab\u00bb\u00bf\u00a1\u3001\u3002")
_ASCII_MARKS = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_OPENING = set('"(\u201c\u2018\u00ab\u00bf\u00a1')
_PROSE_RUNS = re.compile(
    r"[.!?]+|[.,;:!?]?['\"\u201c\u201d\u2018\u2019)]{1,2}[.,;!?]?|['\"(\u201c]{1,2}|-{1,3}|[^\x00-\x7f]+|[,;:]"
)
_CODE_WORD = re.compile(
    "def|elif|self|cls|kwargs|args|isinstance|len|str|int|bool|dict|tuple|lambda|async|await|const|func|fn|impl|struct|"
    "printf|sizeof|nullptr|malloc|argv|argc|stdout|stderr|True|False|None|null|undefined|var|elsif|endif|ifdef|enum|"
    "typedef|println|bytearray|frozenset"
)
_CODE_NAME = re.compile(r"\w*_\w*|[a-z]+[A-Z]\w*|[A-Za-z]+\d\w*|0[xb][0-9a-fA-F]+")


@lru_cache(maxsize=1 << 16)
def token_type(piece: str) -> str:
    """The type of one token's text: a key of TYPES, or the name of a script."""
    text = piece.strip()
    if not text:
        return NEWLINE if "\n" in piece or "\r" in piece or len(piece) >= 4 else SPACE
    if "\ufffd" in text or re.fullmatch(r"<0x[0-9A-F]{2}>", text):
        return BYTES
    if _SPECIAL.fullmatch(text):
        return SPECIAL
    if _NUMBER.fullmatch(text):
        return NUMBER
    letters = [char for char in text if char.isalpha()]
    if not letters:
        return _marks(text)
    script = _script(letters)
    if script is not None:
        return script
    if (
        _CODE_WORD.fullmatch(text)
        or _CODE_NAME.fullmatch(text)
        or any(char in _ASCII_MARKS - _PROSE_MARKS for char in text)
    ):
        return CODE
    if text[0] in ".(" and len(text) > 1 and not piece[0].isspace():
        return CODE  # an attribute or an argument: '.append', '(self'
    return WORD_START if piece[0].isspace() or text[0].isupper() or text[0] in _OPENING else WORD_PIECE


def _marks(text: str) -> str:
    if _PROSE_RUNS.fullmatch(text) and all(char in _PROSE_MARKS for char in text):
        return PUNCTUATION
    if any(char in _ASCII_MARKS or char.isdigit() for char in text):
        return CODE
    return PUNCTUATION if all(unicodedata.category(char).startswith("P") for char in text) else SYMBOL


def _script(letters: list[str]) -> str | None:
    """The script of the first letter that is not Latin; None if all are."""
    for char in letters:
        if not char.isascii():
            name = unicodedata.name(char, "").split(" ")[0]
            if name not in ("LATIN", "MODIFIER", "FEMININE", "MASCULINE", "MICRO"):
                return SCRIPTS.get(name, OTHER_SCRIPT)
    return None
