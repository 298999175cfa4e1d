"""Which files of a folder or repository belong to a model, and which of those are not its weights."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Name patterns of a model's files: weights, index, configs, tokenizer."""
SMALL_FILES = tuple(pattern for pattern in MODEL_FILES if pattern != "*.safetensors")
TEMPLATES = "additional_chat_templates"
"""The folder in which transformers keeps a tokenizer's chat templates, but for the first one."""


def _other_folders(folder: str) -> tuple[str, ...]:
    """Patterns of everything in any folder but this one."""
    longer = [f"{folder[:i]}[!{folder[i]}/]*/*" for i in range(len(folder))]
    return (*longer, *(f"{folder[:i]}/*" for i in range(1, len(folder))), f"{folder}?*/*", "*/*/*")


JUNK = (*_other_folders(TEMPLATES), "consolidated*", "*[!s].index.json", "*.index.*.json")
"""Matches of SMALL_FILES that are not needed: other folders, the publisher's own format, indexes of other formats and
of variants."""


def side_files(folder: Path) -> list[str]:
    """Names of the files of a model's folder that are not its weights: index, configs, tokenizer, chat templates."""
    names = [
        name
        for name in sorted(os.listdir(folder))
        if any(fnmatch.fnmatch(name, pattern) for pattern in SMALL_FILES) and (folder / name).is_file()
    ]
    templates = folder / TEMPLATES
    if templates.is_dir():
        names += [f"{TEMPLATES}/{name}" for name in sorted(os.listdir(templates)) if name.endswith(".jinja")]
    return names
