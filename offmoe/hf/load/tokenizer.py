"""The tokenizer of a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from offmoe.errors import CheckpointError
from offmoe.hf.gguf.tokenizer import TOKENIZER_CONFIG, gguf_tokenizer

logger = logging.getLogger(__name__)

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files that hold a vocabulary."""


def load_tokenizer(model: Path, beside: Sequence[Path] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Tokenizer files beside a GGUF file win over its metadata.

    Args:
        model: a folder, or a GGUF file.
        beside: as `Source.beside`; (): the folder that the model is or stands in.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    is_file = model.is_file()
    names = VOCABULARIES if is_file else (*VOCABULARIES, TOKENIZER_CONFIG)  # these alone: a tokenizer of bytes
    folders = beside or (model.parent if is_file else model,)
    present = [folder / name for folder in folders for name in names if (folder / name).is_file()]
    if not present and not is_file:
        raise CheckpointError(f"{model}: has no tokenizer; add the model's tokenizer.json and tokenizer_config.json.")
    if is_file and present:
        logger.info("%s: the tokenizer is that of %s", model, present[0])
    try:
        return AutoTokenizer.from_pretrained(present[0].parent) if present else gguf_tokenizer(model, folders)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        raise CheckpointError(
            f"{model}: the tokenizer ({', '.join(path.name for path in present) or 'metadata'}) cannot be loaded: "
            f"{str(error).strip().split(chr(10))[0]}. Download tokenizer.json and tokenizer_config.json of the model"
            f"{', and put them beside the file.' if is_file else ' again.'}"
        ) from error
