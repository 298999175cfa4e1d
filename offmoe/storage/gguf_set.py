"""The files of one GGUF model: a single file, or the parts that llama.cpp's gguf-split wrote.

Moves: headers, no weights.
Bound: the number of parts.
Must never: take a part of another model for one of this one, or run with a part that is missing.

The parts are called NAME-00001-of-00004.gguf and so on. Each has a header of its own with the tensors that it holds;
only the first has the model's metadata.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.storage.gguf import REMEDY, GgufHead, Skipped, read_gguf
from offmoe.storage.layout import TensorInfo

SUFFIX = ".gguf"
PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""The name of a part."""
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
"""The metadata of a part: its number from 0, how many parts there are, and their tensors all together."""
OTHER_CONTENTS = {
    "adapter": "a LoRA adapter",
    "mmproj": "the image encoder of a model",
    "imatrix": "an importance matrix",
    "vocab": "a vocabulary",
}
"""general.type of files that are no model."""


@dataclass(frozen=True)
class GgufSet:
    """All files of one model, by their headers.

    Args:
        files: the paths, in the order of the parts; `TensorInfo.shard` is an index into them.
        metadata: of the first file.
        tensors: of all files, by the files' own names.
        types: each tensor's type, as a number of `enum ggml_type`.
    """

    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: dict[str, TensorInfo]
    types: Mapping[str, int]


def part_names(name: str) -> list[str]:
    """The file names of all parts of the model to which a file belongs.

    Args:
        name: a file's name, of any part.

    Returns:
        `name` alone if it is not the name of a part.
    """
    match = PART.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count:
        raise CheckpointError(
            f"{name}: its name says part {int(match['number'])} of {count}; give it its own name back"
        )
    return [f"{match['stem']}-{number + 1:05}-of-{count:05}{SUFFIX}" for number in range(count)]


def models_among(names: Iterable[str]) -> list[str]:
    """The GGUF models among the files of a folder: the name of each one's (first) file, sorted.

    Files of image encoders (mmproj), which stand beside a model, and importance matrices are none.
    """
    firsts = set()
    for name in names:
        if name.endswith(SUFFIX) and not any(word in name.lower() for word in ("mmproj", "imatrix")):
            firsts.add(PART.sub(rf"\g<stem>-00001-of-\g<count>{SUFFIX}", name))
    return sorted(firsts)


def open_set(path: Path, heads: Mapping[str, GgufHead] | None = None) -> GgufSet:
    """Read the headers of all files of one model.

    Args:
        path: the model's file, or any part of it.
        heads: headers of files that are not on this machine (yet), by file name. They count as if they were.

    Raises:
        MissingTensorError: a part is missing.
        CheckpointError: a file is damaged, or of another model.
        UnsupportedModelError: the file holds no model, or offmoe cannot read it.
    """
    files = tuple(path.with_name(name) for name in part_names(path.name))
    known = heads or {}
    parts = [known[file.name] if file.name in known else read_gguf(file) for file in files]
    metadata = parts[0].metadata
    _check_parts(files, parts)
    _check_contents(files[0], parts)
    tensors: dict[str, TensorInfo] = {}
    types: dict[str, int] = {}
    for number, (file, part) in enumerate(zip(files, parts, strict=True)):
        for name, info in part.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{file}: has tensor {name!r}, as {files[tensors[name].shard].name} does; the parts are not of one "
                    "model: download them again"
                )
            tensors[name] = replace(info, shard=number)
        types |= part.types
    return GgufSet(files, metadata, tensors, types)


def _check_parts(files: tuple[Path, ...], parts: list[GgufHead]) -> None:
    """Check that every part is the one that its name says, and that together they have all tensors."""
    total = sum(len(part.tensors) for part in parts)
    for number, (file, part) in enumerate(zip(files, parts, strict=True)):
        count = part.metadata.get(COUNT, 1)
        if count in (0, 1) and len(parts) == 1:
            continue
        stated = part.metadata.get(NUMBER)
        if count != len(parts) or stated != number:
            raise CheckpointError(
                f"{file}: says that it is part {stated} (from 0) of {count}, its name says {number} of {len(parts)}; "
                "give the parts the names back that they were published under, or download them again"
            )
        expected = part.metadata.get(TENSORS, total)
        if expected != total:
            raise CheckpointError(
                f"{file}: says that the model has {expected} tensors, its {len(parts)} parts have {total}; the parts "
                "are not of one model: download them again"
            )


def _check_contents(file: Path, parts: list[GgufHead]) -> None:
    """Refuse files that hold something else than a model."""
    metadata = parts[0].metadata
    kind, architecture = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if architecture == "clip":
        kind = "mmproj"
    if kind in OTHER_CONTENTS:
        raise UnsupportedModelError(f"{file}: holds {OTHER_CONTENTS[kind]}, not a model; give the model's own file")
    if not isinstance(architecture, str) or not architecture:
        raise CheckpointError(f"{file}: names no architecture (general.architecture); download it again")
    if not any(part.tensors for part in parts):
        tokens = metadata.get("tokenizer.ggml.tokens")
        what = f"a vocabulary of {tokens.length} tokens and no weights" if isinstance(tokens, Skipped) else "no weights"
        raise UnsupportedModelError(f"{file}: holds {what}; {REMEDY}")
