"""The tokenizer of a GGUF model: files beside it win, else transformers builds one from the file's metadata."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from offmoe.hf.upstream import known_splits
from offmoe.storage.gguf import read_gguf

logger = logging.getLogger(__name__)

GPT2_SPLITS = frozenset({"default", "gpt-2", "gpt2"})
"""Names of the way in which GPT-2 splits a text before merges, which transformers takes for any unknown name too."""


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file describes.

    Args:
        file: the model's first file.

    Raises:
        Exception: what transformers raises for a vocabulary that it cannot build a tokenizer of.
    """
    metadata = read_gguf(file).metadata
    split = metadata.get("tokenizer.ggml.pre", "default")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and split not in known_splits() | GPT2_SPLITS:
        logger.warning(
            "%s: splits text as %r does, which transformers does not know; some text gets other tokens than it should. "
            "Put the model's tokenizer.json and tokenizer_config.json beside the file",
            file,
            split,
        )
    logger.info("%s: the tokenizer is that of the file's metadata; a tokenizer.json beside the file would win", file)
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
    return tokenizer
