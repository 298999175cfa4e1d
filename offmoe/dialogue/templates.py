"""How the answers of a model family are written: where reasoning and tool calls begin and end.

A response template is the dictionary that `PreTrainedTokenizerBase.get_response_parser` reads. A tokenizer that has
one wins. Formats are those of the families' chat templates; tests/dialogue holds an answer of each, fed character by
character.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_BAR = "\uff5c"
"""DeepSeek's markers are written with a fullwidth bar."""
_WHOLE = {"type": "function", "function": "{content}"}


@dataclass(frozen=True)
class CallSyntax:
    """How the model writes one tool call, so that a grammar can make it do so.

    opening: text before the name.
    between: text between the name and the JSON of the arguments.
    closing: text after the arguments.
    """

    opening: str
    between: str
    closing: str


@dataclass(frozen=True)
class Channels:
    """What a model that answers in channels writes around them.

    reasoning: text before its reasoning, if it reasons.
    closing: text between the reasoning and the next channel.
    content: text before the content.
    """

    reasoning: str
    closing: str
    content: str


@dataclass(frozen=True)
class ResponseFormat:
    """How a family writes its answers.

    template: for the response parser.
    calls: how a tool call is written; None: no grammar can ask for one.
    channels: what a grammar begins with; None: an answer without reasoning begins with its content.
    """

    template: dict[str, Any]
    calls: CallSyntax | None = None
    channels: Channels | None = None


_HERMES_CALLS = CallSyntax('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")
QWEN = ResponseFormat(
    {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": _WHOLE,
            },
            "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"},
        },
    },
    _HERMES_CALLS,
)
"""Qwen2 and Qwen3: Hermes' tags around a JSON object."""
QWEN_TAGS = ResponseFormat(
    {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
                "close_pattern": r"</function>\s*</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>",
                },
                "transform": _NAMED,
            },
            "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"},
        },
    }
)
"""Qwen3.5: one tag per parameter."""
HARMONY = ResponseFormat(
    {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|start|>assistant",
        "fields": {
            "reasoning_content": {
                "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>",
                "close": ["<|end|>", "<|return|>"],
                "content": "text",
            },
            "tool_calls": {
                "open_pattern": (
                    r"(?:<\|start\|>assistant)?(?:<\|channel\|>commentary)? to=functions\.(?P<name>[\w.-]+)"
                    r"(?:<\|channel\|>commentary)?\s*(?:<\|constrain\|>)?(?:json)?<\|message\|>"
                ),
                "close": ["<|call|>"],
                "repeats": True,
                "content": "json",
                "transform": _NAMED,
            },
            "content": {
                "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)<\|message\|>",
                "close": ["<|return|>", "<|end|>"],
                "content": "text",
            },
        },
    },
    CallSyntax("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "<|call|>"),
    Channels("<|channel|>analysis<|message|>", "<|end|><|start|>assistant", "<|channel|>final<|message|>"),
)
"""gpt-oss: channels. Source: the Harmony response format's page of OpenAI's cookbook."""
GLM = ResponseFormat(
    {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|assistant|>",
        "fields": {
            "reasoning_content": {"open_pattern": r"\s*<think>", "close": "</think>", "content": "text"},
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>(?P<name>[^\n<]+)\n?",
                "close": "</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
                },
                "transform": _NAMED,
            },
            "content": {
                "close_pattern": r"\s*(?:<\|user\|>|<\|endoftext\|>|<\|observation\|>)",
                "content": "text",
            },
        },
    }
)
"""GLM-4.5 and later: one pair of tags per argument."""
MISTRAL = ResponseFormat(
    {
        "defaults": {"role": "assistant"},
        "start_anchor": "[/INST]",
        "fields": {
            "tool_calls": {
                "open_pattern": r"\[TOOL_CALLS\](?P<name>[\w.-]+)\[ARGS\]",
                "close_pattern": r"(?=\[TOOL_CALLS\])|</s>",
                "repeats": True,
                "content": "json",
                "transform": _NAMED,
            },
            "content": {"close": ["</s>"], "content": "text"},
        },
    },
    CallSyntax("[TOOL_CALLS]", "[ARGS]", ""),
)
"""Mistral's tokenizers of version 11 and later."""
DEEPSEEK = ResponseFormat(
    {
        "defaults": {"role": "assistant"},
        "start_anchor": f"<{_BAR}Assistant{_BAR}>",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
            "tool_calls": {
                "open_pattern": (
                    rf"\s*(?:<{_BAR}tool▁calls▁begin{_BAR}>)?\s*<{_BAR}tool▁call▁begin{_BAR}>"
                    rf"(?P<name>[^<]+)<{_BAR}tool▁sep{_BAR}>"
                ),
                "close_pattern": rf"<{_BAR}tool▁call▁end{_BAR}>(?:\s*<{_BAR}tool▁calls▁end{_BAR}>)?",
                "repeats": True,
                "content": "json",
                "transform": _NAMED,
            },
            "content": {
                "close_pattern": rf"\s*(?:<{_BAR}tool▁calls▁end{_BAR}>|<{_BAR}end▁of▁sentence{_BAR}>)",
                "content": "text",
            },
        },
    },
    CallSyntax(
        f"<{_BAR}tool▁calls▁begin{_BAR}><{_BAR}tool▁call▁begin{_BAR}>",
        f"<{_BAR}tool▁sep{_BAR}>",
        f"<{_BAR}tool▁call▁end{_BAR}><{_BAR}tool▁calls▁end{_BAR}>",
    ),
)
"""DeepSeek V3.1 and later."""

FORMATS = {
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "qwen2", "qwen3"), QWEN),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text"), QWEN_TAGS),
    **dict.fromkeys(("gpt_oss",), HARMONY),
    **dict.fromkeys(("glm4_moe", "glm4_moe_lite", "glm4v_moe"), GLM),
    **dict.fromkeys(("mixtral", "mistral", "ministral", "mistral3"), MISTRAL),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32"), DEEPSEEK),
}
"""By the `model_type` of a configuration."""


def response_format(tokenizer: PreTrainedTokenizerBase, model_type: str) -> ResponseFormat | None:
    """How a model writes its answers; None: as plain text.

    A tokenizer's own response template wins over the table of families.
    """
    own = getattr(tokenizer, "response_template", None)
    if own is not None:
        return ResponseFormat(own, _HERMES_CALLS if _is_hermes(own) else None)
    return FORMATS.get(model_type)


def _is_hermes(template: dict[str, Any]) -> bool:
    """Whether tool calls are JSON objects with "name" and "arguments" between <tool_call> tags."""
    calls = template.get("fields", {}).get("tool_calls", {})
    opens = calls.get("open", "") or calls.get("open_pattern", "")
    return (
        isinstance(opens, str)
        and opens.endswith("<tool_call>")
        and calls.get("content") == "json"
        and calls.get("transform", {}).get("function") == "{content}"
    )
