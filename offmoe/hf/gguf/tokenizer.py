"""The tokenizer of a GGUF model: files beside it win, else transformers builds one from the file's metadata."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from offmoe.errors import CheckpointError
from offmoe.hf.upstream import known_splits
from offmoe.storage.gguf import read_gguf

logger = logging.getLogger(__name__)

TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
"""Files that may hold a chat template."""
GPT2_SPLITS = frozenset({"default", "gpt-2", "gpt2"})
"""Names of the way in which GPT-2 splits a text before merges, which transformers takes for any unknown name too."""


def gguf_tokenizer(file: Path, folders: Sequence[Path]) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file describes.

    Args:
        file: the model's first file.
        folders: where a chat template is looked for, which wins over the one in the file.

    Raises:
        CheckpointError: a file beside it is damaged.
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
    template = next(filter(None, map(_template_in, folders)), None)
    logger.info("%s: the tokenizer is that of the file's metadata; a tokenizer.json beside the file would win", file)
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
    if template is not None:
        path, tokenizer.chat_template = template
        logger.info("%s: the chat template is that of %s", file, path)
    return tokenizer


def _template_in(folder: Path) -> tuple[Path, Any] | None:
    """The chat template of a folder, and the file that it stands in; None if there is none.

    Raises:
        CheckpointError: a file that may hold it is damaged.
    """
    path, settings = folder / TEMPLATE_FILE, folder / TOKENIZER_CONFIG
    try:
        if path.is_file():
            return path, path.read_text(encoding="utf-8")
        found = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    except (OSError, ValueError) as error:
        where = path if path.is_file() else settings
        raise CheckpointError(f"{where}: cannot be read ({error}); download it again, or remove it") from error
    template = found.get("chat_template") if isinstance(found, dict) else None
    if isinstance(template, list):  # several, by name
        template = {each["name"]: each["template"] for each in template}
    return None if template is None else (settings, template)
