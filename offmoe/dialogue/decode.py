"""Token ids become text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 6
"""Tokens before the answer that are decoded with it. A tokenizer that joins words drops the space before the first of
what it decodes, so the answer may not come first."""
WINDOW_TOKENS = 24
"""Tokens decoded at once at most, while text comes; shortening the window costs a decode of its own."""


class TextDecoder:
    """Decodes one token after the other. A character of several tokens appears with its last token.

    It decodes a short window, so that a token costs the same however long the text is.

    Args:
        tokenizer: The model's tokenizer.
        before: Token ids of the prompt.
        skip_special: Whether special tokens give no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = (), skip_special: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special
        self._window = list(before[-CONTEXT_TOKENS:])
        """The latest ids; the last of them may have given no text yet."""
        self._known = self._decode(self._window)
        """The text of the window that was given already, or stood in the prompt."""

    def add(self, token: int) -> str:
        """The text that a token completes; "" while a character lacks some of its tokens."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._known) :]
        self._known = text
        if len(self._window) > WINDOW_TOKENS:
            self._window = self._window[-CONTEXT_TOKENS:]
            self._known = self._decode(self._window)
        return new

    def finish(self) -> str:
        """The text of tokens that wait for more, with U+FFFD for what is incomplete."""
        text = self._decode(self._window)
        new, self._known = text[len(self._known) :], text
        return new

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip))
