"""Which GGUF model is meant: a repository or folder holds the same model in many quantizations, split or not.

One is chosen by the end of the model's name ("owner/name:Q4_K_M"), by a file's name (gguf_file=), or because there is
no other. Two are never downloaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from offmoe.errors import ConfigError
from offmoe.storage.gguf_set import SUFFIX, models_among, part_names

TAGGED = re.compile(r"(?P<name>[\w.-]+/[\w.-]+):(?P<tag>[\w.-]+)")
"""A Hub id with the quantization that is meant."""
SHOWN = 12
"""Most models that a message lists."""


def split_tag(model: str) -> tuple[str, str | None]:
    """A Hub id, and the quantization behind its colon; None without one."""
    match = TAGGED.fullmatch(model)
    return (match["name"], match["tag"]) if match else (model, None)


class Wanted(NamedTuple):
    """Which GGUF model of a repository is asked for.

    Args:
        tag: the quantization, such as "Q4_K_M".
        gguf_file: the file, or any of its parts.
    """

    tag: str | None = None
    gguf_file: str | None = None


def chosen_model(name: str, files: Sequence[str], wanted: Wanted) -> str | None:
    """The (first) file of the GGUF model that is meant.

    Args:
        name: the repository, for messages.
        files: names of its files.
        wanted: what is asked for.

    Returns:
        None if no GGUF model is asked for and the repository has safetensors, or has no GGUF model.

    Raises:
        ConfigError: there is no such model, or several, and nothing says which.
    """
    models, (tag, gguf_file) = models_among(files), wanted
    if gguf_file is not None:
        folder, _, file = gguf_file.rpartition("/")
        first = "/".join(filter(None, (folder, part_names(file)[0])))
        if first not in models:
            raise ConfigError(f"model {name!r}: has no GGUF file {gguf_file!r}; {_there_are(name, models)}")
        if tag is not None and not _is_tagged(first, tag):
            raise ConfigError(f"model '{name}:{tag}': {gguf_file!r} is of another quantization; leave one of them out")
        return first
    if tag is None:
        if not models or any(file.endswith(".safetensors") for file in files):
            return None
        matching = models
    else:
        matching = [model for model in models if _is_tagged(model, tag)]
    if len(matching) == 1:
        return matching[0]
    if not matching:
        raise ConfigError(f"model {name!r}: has no GGUF file for {tag!r}; {_there_are(name, models)}")
    what = "" if tag is None else f" for {tag!r}"
    raise ConfigError(f"model {name!r}: has several GGUF files{what}; {_there_are(name, matching)}")


def _is_tagged(model: str, tag: str) -> bool:
    """Whether a file's name, or the folder that it stands in, names the quantization."""
    return re.search(rf"(?<![a-z0-9]){re.escape(tag.lower())}(?![a-z0-9_])", model.lower()) is not None


def _there_are(name: str, models: Sequence[str]) -> str:
    if not models:
        return "there is no GGUF file in the repository"
    more = f" and {len(models) - SHOWN} more" if len(models) > SHOWN else ""
    example = PurePosixPath(models[0]).name.removesuffix(SUFFIX)
    quantization = re.search(r"(?i)(IQ\d\w*|Q\d\w*|MXFP4\w*|BF16|F16)", example)
    spec = f"'{name}:{quantization[1]}' or " if quantization else ""
    return f"give one of them, as {spec}--gguf-file NAME (gguf_file=): {', '.join(models[:SHOWN])}{more}"


def gguf_in(folder: Path, gguf_file: str | None = None) -> Path | None:
    """The GGUF model in a folder that has no safetensors shards; None if it holds none.

    Args:
        folder: the folder.
        gguf_file: the file that is meant, or any of its parts.

    Raises:
        ConfigError: it holds several, or has no such file.
    """
    try:
        names = os.listdir(folder)
    except OSError:  # reading the checkpoint will say so
        return None
    if gguf_file is not None:
        if not gguf_file.endswith(SUFFIX) or not os.path.isfile(folder / gguf_file):
            models = models_among(names)
            instead = f"give one of them: {', '.join(models[:SHOWN])}" if models else "it holds no GGUF model"
            raise ConfigError(f"{folder}: has no GGUF file {gguf_file!r} (--gguf-file, gguf_file=); {instead}")
        file = (folder / gguf_file).absolute()
        return file.with_name(part_names(file.name)[0])
    models = [] if any(name.endswith(".safetensors") for name in names) else models_among(names)
    if len(models) > 1:
        raise ConfigError(
            f"{folder}: holds {len(models)} GGUF models ({', '.join(models)}); give the file of one, or "
            "--gguf-file NAME"
        )
    return folder.absolute() / models[0] if models else None


def gguf_at(path: Path, gguf_file: str | None = None) -> Path:
    """The (first) file of the GGUF model that a file belongs to.

    Args:
        path: the file, any part of the model.
        gguf_file: the file that is meant; None, or another name of the same model.

    Raises:
        ConfigError: `gguf_file` names another model.
    """
    parts, absolute = part_names(path.name), path.absolute()
    if gguf_file is not None:
        named = Path(gguf_file)
        if named.name not in parts or (named.name != gguf_file and named.absolute().parent != absolute.parent):
            raise ConfigError(
                f"{path}: is one GGUF file, and --gguf-file (gguf_file=) names another, {gguf_file!r}; leave that out, "
                f"or give the folder: {path.parent}"
            )
    return absolute.with_name(parts[0])


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())
