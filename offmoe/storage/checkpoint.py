"""A checkpoint by its headers: which tensors it has, and in which bytes of which shard (safetensors, or GGUF).

Moves: headers and the index, no weights.
Bound: the number of tensors (90,000 in the largest models, seconds at most).
Must never: map a file (a shard truncated under a mapping kills the process, a short read is an exception), unpickle
(`.bin`, `.pth`), open a file outside the folder because an index names it, or end in anything but a checkpoint or an
`OffmoeError`, whatever bytes the files hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from offmoe.errors import CheckpointError, MissingTensorError, ShardChangedError, UnsupportedModelError
from offmoe.storage.gguf import GgufHead
from offmoe.storage.gguf_set import GgufSet, open_set
from offmoe.storage.header import MAX_HEADER_BYTES, ShardHead, parse_head, read_head, regular_size
from offmoe.storage.layout import Segment, TensorInfo

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
"""Endings of files that hold pickled weights."""
Identity = tuple[int, int, int, int]
"""A file's device, inode, size in bytes and time of last change in ns."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors shards, or the files of one GGUF model, by their headers.

    Args:
        folder: the folder, an absolute path.
        shards: the shards' paths; `TensorInfo.shard` is an index into them.
        tensors: the tensors by the checkpoint's own names.
        identities: each shard's identity when its header was read; None for a shard that is not in the folder (yet).
        gguf: the metadata and the tensors' types, if the files are GGUF.
        misplaced: tensors that the index names and no shard has, and the file that it places them in.
    """

    folder: Path
    shards: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    identities: tuple[Identity | None, ...] = ()
    gguf: GgufSet | None = None
    misplaced: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], heads: Mapping[str, ShardHead] | None = None) -> Checkpoint:
        """Read the headers of a checkpoint folder.

        As in transformers, `model.safetensors` wins over the index. The index says which files hold the tensors, and
        nothing else: of a tensor in two of them, the one in the last file counts, by file name. Without either, every
        `*.safetensors` counts.

        Args:
            folder: the checkpoint's folder.
            heads: heads of shards that are not in the folder (yet), by file name. They count as if they were.

        Raises:
            MissingTensorError: a shard is absent.
            UnsupportedModelError: there are only pickles, or torch has no dtype for a tensor.
            CheckpointError: a header or the index is damaged.
        """
        folder = Path(folder).absolute()  # so that a later change of the working directory does not matter
        heads = heads or {}
        weight_map: dict[str, str] = {}
        if SINGLE_FILE in heads or os.path.lexists(folder / SINGLE_FILE):
            files = [SINGLE_FILE]
        elif os.path.lexists(folder / INDEX_FILE):
            weight_map = _read_index(folder / INDEX_FILE)
            files = sorted(set(weight_map.values()))
        else:
            files = _safetensors_in(folder)
        shards = tuple(folder / name for name in files)
        identities = tuple(None if name in heads else _identity_of(folder / name) for name in files)
        headers = [
            dict(parse_head(heads[name] if name in heads else read_head(path), path, number))
            for number, (name, path) in enumerate(zip(files, shards, strict=True))
        ]
        if not weight_map:
            return cls(folder, shards, _merge(headers, files, folder), identities)
        tensors = {name: info for header in headers for name, info in header.items()}
        misplaced = {name: file for name, file in weight_map.items() if name not in tensors}
        return cls(folder, shards, tensors, identities, misplaced=misplaced)

    @classmethod
    def open_gguf(cls, file: str | os.PathLike[str], heads: Mapping[str, GgufHead] | None = None) -> Checkpoint:
        """Read the headers of a GGUF model.

        Args:
            file: the model's file, or any of its parts.
            heads: headers of files that are not on this machine (yet), by file name. They count as if they were.

        Raises:
            MissingTensorError: a part is absent.
            CheckpointError: a file is damaged, or its parts are not of one model.
            UnsupportedModelError: the file holds no model, or a tensor of a type that offmoe does not decode.
        """
        gguf = open_set(Path(file).absolute(), heads)
        identities = tuple(None if path.name in (heads or {}) else _identity_of(path) for path in gguf.files)
        return cls(gguf.files[0].parent, gguf.files, gguf.tensors, identities, gguf)

    @property
    def index_fault(self) -> str:
        """What is wrong with the index, to end a message about an absent tensor; "" if nothing is."""
        if not self.misplaced:
            return ""
        name, file = next(iter(self.misplaced.items()))
        more = f" (and {len(self.misplaced) - 1} others)" if len(self.misplaced) > 1 else ""
        return (
            f". {self.folder / INDEX_FILE} places tensor {name!r}{more} in {file}, where it is not: index and shards "
            "are not of the same download, so fetch both again"
        )

    @property
    def model(self) -> Path:
        """What the checkpoint is called: its folder, or the (first) file of a GGUF model."""
        return self.folder if self.gguf is None else self.shards[0]

    @property
    def shards_absent(self) -> tuple[str, ...]:
        """File names of the shards that are not in the folder, and known by their heads only."""
        pairs = zip(self.shards, self.identities, strict=True)
        return tuple(path.relative_to(self.folder).as_posix() for path, known in pairs if known is None)

    def check_unchanged(self) -> None:
        """Check that every shard still is the file whose header was read.

        Raises:
            ShardChangedError: one was replaced or rewritten.
        """
        for path, known in zip(self.shards, self.identities, strict=True):
            if _identity_of(path) != known:
                raise ShardChangedError(f"{path}: was replaced or rewritten while the model was loading; load it again")

    def info(self, name: str) -> TensorInfo:
        """Where a tensor is.

        Raises:
            MissingTensorError: the checkpoint has no tensor of this name.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise MissingTensorError(
                f"{self.model}: the checkpoint has no tensor {name!r}; "
                f"the download is incomplete or belongs to another architecture{self.index_fault}"
            ) from None

    def segment(self, name: str, index: int | None = None, count: int = 1) -> Segment:
        """The bytes of a tensor, or of one of `count` equal slices of its first dimension.

        Args:
            name: the tensor.
            index: which slice, 0 .. count - 1. None: the whole tensor. A slice of one row drops the first dimension.
            count: how many slices.

        Raises:
            MissingTensorError: the checkpoint has no tensor of this name.
            CheckpointError: the tensor cannot be cut so.
        """
        info = self.info(name)
        if index is None:
            return Segment(info.shard, info.offset, info.nbytes, info.dtype, info.shape, name)
        if not info.shape or not 0 <= index < count or info.shape[0] % count or not info.shape[0]:
            raise CheckpointError(
                f"{self.shards[info.shard]}: tensor {name!r} has shape {list(info.shape)} and therefore no part "
                f"{index} of {count} equal ones; config.json and the shards are not of the same model"
            )
        nbytes, rows = info.nbytes // count, info.shape[0] // count
        shape = info.shape[1:] if rows == 1 else (rows, *info.shape[1:])
        return Segment(info.shard, info.offset + index * nbytes, nbytes, info.dtype, shape, name)


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Read one tensor of a checkpoint into new memory.

    Raises:
        ShardChangedError: the shard ends before the tensor does.
    """
    info = checkpoint.info(name)
    path = checkpoint.shards[info.shard]
    octets = torch.empty(info.nbytes, dtype=torch.uint8)
    with open(path, "rb") as file:
        file.seek(info.offset)
        if file.readinto(octets.numpy()) < info.nbytes:  # type: ignore[arg-type]
            raise ShardChangedError(
                f"{path}: ends before tensor {name!r} does; it was truncated while the model was loading"
            )
    return octets.view(info.dtype).view(info.shape)


def identity(status: os.stat_result) -> Identity:
    """The identity of a file, by which a replaced or rewritten one is recognized."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _identity_of(path: Path) -> Identity | None:
    try:
        return identity(os.stat(path))
    except (OSError, ValueError):
        return None


def indexed_files(folder: Path) -> list[str]:
    """File names of the shards that the folder's index names, sorted.

    Raises:
        CheckpointError: the index is damaged, or names a file outside the folder.
    """
    return sorted(set(_read_index(folder / INDEX_FILE).values()))


def _safetensors_in(folder: Path) -> list[str]:
    """File names of every `*.safetensors`, sorted; an error if there is none."""
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(f"{str(folder)!r}: not a readable checkpoint folder ({error})") from error
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return shards
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise UnsupportedModelError(
            f"{folder}: holds only pickled weights ({pickles[0]}), which offmoe never loads because a pickle can run "
            "code; convert them to safetensors (save_pretrained of transformers writes it) or get such a revision"
        )
    raise MissingTensorError(f"{folder}: no *.safetensors file here; give the folder that holds the model's shards")


def _read_index(path: Path) -> dict[str, str]:
    """The index: tensor name -> file name of its shard. Every file name is a path inside the folder."""
    try:
        size = regular_size(path)
        if size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: an index of {size} bytes is not one; download it again")
        index = json.loads(path.read_bytes().decode("utf-8"))  # of a name that occurs twice, the last place counts
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON index ({error}); download it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the file's permissions") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{path}: has no "weight_map" that names tensors and their shards; download it again')
    files: set[str] = set()  # checks each of the few files once, not once per tensor
    for name, file in weight_map.items():
        if isinstance(file, str) and file in files:
            continue
        if not isinstance(file, str) or not _stays_inside(file):
            raise CheckpointError(
                f"{path}: places tensor {name!r} in {file!r}, which is not a safetensors file inside the folder; "
                "do not trust this checkpoint"
            )
        files.add(file)
    return weight_map


def _stays_inside(file: str) -> bool:
    """Whether a file name is a path inside the folder. Links are not resolved: the Hub's cache links to elsewhere."""
    if not file.endswith(".safetensors") or "\0" in file or not file.isprintable():
        return False
    paths = (PurePosixPath(file), PureWindowsPath(file))
    return not any(path.is_absolute() or path.drive or path.root or ".." in path.parts for path in paths)


def _merge(headers: list[dict[str, TensorInfo]], files: list[str], folder: Path) -> dict[str, TensorInfo]:
    """The tensors of all shards, for a folder without an index. A name in two shards is an error."""
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for name, info in header.items():
            if name in tensors:
                first, second = files[tensors[name].shard], files[info.shard]
                raise CheckpointError(
                    f"{folder}: tensor {name!r} is in {first} and in {second}, and there is no {INDEX_FILE} "
                    "to tell which; keep one set of shards in the folder"
                )
            tensors[name] = info
    return tensors
