"""The tokenizer of a model."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from offmoe.errors import CheckpointError
from offmoe.hf.gguf.tokenizer import gguf_tokenizer

logger = logging.getLogger(__name__)

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files that hold a vocabulary."""
SETTINGS = "tokenizer_config.json"
"""Alone, it is a tokenizer of bytes; beside a GGUF file it says nothing against the vocabulary in that."""


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: a folder, or a GGUF file. Tokenizer files beside a GGUF file win over its metadata."""
    is_file = model.is_file()
    folder = model.parent if is_file else model
    present = [name for name in (*VOCABULARIES, *(() if is_file else (SETTINGS,))) if (folder / name).is_file()]
    if not present and not is_file:
        raise CheckpointError(f"{folder}: has no tokenizer; add the model's tokenizer.json and tokenizer_config.json.")
    if is_file and present:
        logger.info("%s: the tokenizer is that of %s", model, folder / present[0])
    try:
        return AutoTokenizer.from_pretrained(folder) if present else gguf_tokenizer(model)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        raise CheckpointError(
            f"{model}: the tokenizer ({', '.join(present) or 'metadata'}) cannot be loaded: "
            f"{str(error).strip().split(chr(10))[0]}. Download tokenizer.json and tokenizer_config.json of the model"
            f"{', and put them beside the file.' if is_file else ' again.'}"
        ) from error
