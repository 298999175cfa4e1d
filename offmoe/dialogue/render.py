"""Turns a conversation into the prompt that the model's chat template writes for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from offmoe.dialogue.errors import RequestError
from offmoe.dialogue.messages import Message, Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as token ids. `text`: with the template's markers; the parser of the answer reads them."""

    text: str
    ids: tuple[int, ...]


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer

    @property
    def has_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), options: Mapping[str, Any] | None = None
    ) -> Prompt:
        """The prompt of a conversation, up to where the model's answer begins.

        A template without a role "developer" gets "system". If the template refuses a system message in the middle,
        that message joins the first one.

        Args:
            messages: The conversation, oldest first.
            tools: Functions that the model may call.
            options: Variables of the template, such as `enable_thinking`.

        Raises:
            RequestError: The model has no chat template, or its template refuses the conversation.
        """
        if not self.has_template:
            raise RequestError(
                "this model's tokenizer has no chat template; send a text to /v1/completions instead.", "messages"
            )
        if not messages:
            raise RequestError("messages is empty; send at least one message.", "messages")
        if "developer" not in self._template_text(bool(tools)):
            messages = [replace(m, role="system") if m.role == "developer" else m for m in messages]
        try:
            text = self._text(messages, tools, options)
        except Exception as error:  # a template is a program of the checkpoint's author: it can fail in any way
            merged = _system_first(messages)
            if merged == list(messages):
                raise _refused(error) from error
            try:
                text = self._text(merged, tools, options)
            except Exception:
                raise _refused(error) from error
        return Prompt(text, tuple(self.encode(text, special=False)))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text. special: add the tokens that begin a text; a rendered template has its own."""
        # verbose: a prompt beyond the tokenizer's own limit is judged by the context that memory is reserved for.
        return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def reads(self, option: str, value: object) -> bool:
        """Whether the template's result depends on one of its options; an option that it ignores changes nothing."""
        probe = [Message("user", "a")]
        try:
            return self._text(probe, (), {option: value}) != self._text(probe, (), {})
        except Exception:  # a template that fails with the option has read it
            return True

    def thinking(self, wanted: bool) -> dict[str, Any] | None:
        """Options of the template that turn reasoning on or off; None: the model does not reason.

        A model that always reasons gets no option.
        """
        for option in ("enable_thinking", "thinking"):
            if self.reads(option, True) or self.reads(option, False):
                return {option: wanted}
        opened = self._text([Message("user", "a")], (), {})
        always = any(mark in opened for mark in ("<think>", "[THINK]")) or "reasoning_effort" in self._template_text(
            False
        )
        return {} if always else None

    def _text(self, messages: Sequence[Message], tools: Sequence[Tool], options: Mapping[str, Any] | None) -> str:
        written = self._tokenizer.apply_chat_template(
            [message.for_template() for message in messages],
            tools=[tool.for_template() for tool in tools] or None,
            add_generation_prompt=True,
            tokenize=False,
            **(options or {}),
        )
        assert isinstance(written, str)
        return written

    def _template_text(self, with_tools: bool) -> str:
        template: Any = self._tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("tool_use" if with_tools else "default") or next(iter(template.values()))
        return str(template)


def _system_first(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with one system message, at its beginning."""
    texts = [message.text for message in messages if message.role == "system" and message.text]
    rest = [message for message in messages if message.role != "system"]
    return ([Message("system", "\n\n".join(texts))] if texts else []) + rest


def _refused(error: Exception) -> RequestError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return RequestError(f"the model's chat template refuses these messages: {reason}", "messages")
