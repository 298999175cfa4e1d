"""The tokenizer of a model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from offmoe.errors import CheckpointError
from offmoe.hf.gguf.tokenizer import gguf_tokenizer


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: a folder, or a GGUF file. Tokenizer files beside a GGUF file win over its metadata."""
    is_file = model.is_file()
    folder = model.parent if is_file else model
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tokenizer_config.json")
    present = [name for name in names if (folder / name).is_file()]
    if not present and not is_file:
        raise CheckpointError(f"{folder}: has no tokenizer; add the model's tokenizer.json and tokenizer_config.json.")
    try:
        return AutoTokenizer.from_pretrained(folder) if present else gguf_tokenizer(model)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        raise CheckpointError(
            f"{model}: the tokenizer ({', '.join(present) or 'metadata'}) cannot be loaded: "
            f"{str(error).strip().split(chr(10))[0]}. Download tokenizer.json and tokenizer_config.json of the model"
            f"{', and put them beside the file.' if is_file else ' again.'}"
        ) from error
