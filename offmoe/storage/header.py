"""The header of one safetensors shard: names, dtypes, shapes and byte offsets of its tensors.

Moves: 8 bytes and the JSON behind them.
Bound: the number of tensors, and 100 MB of JSON.
Must never: read a weight, wait for a pipe, or end in anything but tensors or an `OffmoeError`, whatever bytes the file
holds.

The checks are those of the safetensors reader itself. A header that passes needs no further bounds check, and a
truncated download is reported at once.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offmoe.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from offmoe.storage.layout import DTYPES, TensorInfo

MAX_HEADER_BYTES = 100_000_000
"""The safetensors reader accepts no larger header. An index file is held to the same limit."""

FILE_DTYPES: dict[str, torch.dtype] = {
    **DTYPES,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""The safetensors dtype names that a tensor of a checkpoint may have. An expert's dtype must be in `DTYPES`."""

SUB_BYTE_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
"""The safetensors dtype names that torch has no equivalent for."""
LARGEST = 2**63 - 1
"""The largest size or offset: what a signed 64-bit integer holds."""
MAX_DIMS = 64
"""The most dimensions of a tensor in torch. Multiplying a million huge sizes of a damaged header would never end."""


@dataclass(frozen=True, slots=True)
class ShardHead:
    """A shard without its weights.

    Args:
        data: the file's bytes up to the end of the header.
        size: bytes of the whole file.
    """

    data: bytes
    size: int


def header_end(prefix: bytes, size: int, path: Path) -> int:
    """The number of bytes up to the end of a shard's header.

    A shard is 8 bytes (N, little-endian), N bytes of JSON, then the tensors back to back up to the end of the file.

    Args:
        prefix: the first bytes of the shard, 8 or more.
        size: bytes of the whole shard.
        path: the shard's name for messages.

    Raises:
        CheckpointError: the file cannot hold the header that it announces, or it is a git-lfs pointer.
    """
    length = int.from_bytes(prefix[:8], "little")
    if prefix[:8] == b"version " and size < 1024:
        raise CheckpointError(f"{path}: a git-lfs pointer, not the weights; fetch them with `git lfs pull`")
    if len(prefix) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointError(
            f"{path}: its {size} bytes cannot hold the header they announce; the file is truncated or not "
            "safetensors: download it again"
        )
    return 8 + length


def read_head(path: Path) -> ShardHead:
    """Read the head of one shard.

    Raises:
        MissingTensorError: the file does not exist.
        CheckpointError: the file cannot be read, or is no safetensors file.
    """
    try:
        size = regular_size(path)
        with open(path, "rb", buffering=0) as file:
            prefix = file.read(8)
            return ShardHead(prefix + file.read(header_end(prefix, size, path) - 8), size)
    except FileNotFoundError:
        raise MissingTensorError(f"{path}: this shard of the checkpoint is missing; complete the download") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check file and disk") from error


def parse_head(head: ShardHead, path: Path, shard: int) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors of one shard, in file order, after the safetensors reader's own checks.

    Args:
        head: the shard's header.
        path: the shard's name for messages.
        shard: the index that `TensorInfo.shard` gets.

    Raises:
        CheckpointError: the header is damaged, or does not describe the file.
        UnsupportedModelError: torch has no dtype for a tensor.
    """
    end = header_end(head.data, head.size, path)
    header = head.data[8:end]
    try:
        if not header.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        entries = parse_json(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error}); download it again") from error
    try:
        return _check_entries(entries, path, shard, end, head.size)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header is malformed ({error}); download it again") from error


def _check_entries(entries: object, path: Path, shard: int, base: int, size: int) -> Iterator[tuple[str, TensorInfo]]:
    """`parse_head` without its error messages. base: bytes before the first tensor; size: bytes of the file."""
    if not isinstance(entries, dict):
        raise ValueError("not an object")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise ValueError("__metadata__ is not a map of strings")
    tensors = [(name, _check_entry(name, entry, path, shard, base)) for name, entry in entries.items()]
    tensors.sort(key=lambda item: (item[1].offset, item[1].nbytes))
    end = base
    for name, info in tensors:
        if info.offset != end:
            raise ValueError(f"hole or overlap before tensor {name!r}")
        end += info.nbytes
    if end != size:
        raise CheckpointError(
            f"{path}: the header describes {end} bytes, the file has {size}; "
            "it is truncated or was appended to: download it again"
        )
    return iter(tensors)


def _check_entry(name: str, entry: Any, path: Path, shard: int, base: int) -> TensorInfo:
    dtype_name = entry["dtype"]
    if dtype_name in SUB_BYTE_DTYPES:
        raise UnsupportedModelError(
            f"{path}: tensor {name!r} is stored as {dtype_name}, which offmoe cannot read; "
            "use a bf16 or fp16 checkpoint"
        )
    dtype = FILE_DTYPES.get(dtype_name)
    if dtype is None:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype_name!r}")
    shape = _integers(entry["shape"], name)
    start, end = _integers(entry["data_offsets"], name)
    if len(shape) > MAX_DIMS:
        raise ValueError(f"tensor {name!r} has {len(shape)} dimensions")
    # A size of 0 must not hide other sizes that no tensor can have, hence max(1, n).
    if math.prod([max(1, n) for n in shape]) * dtype.itemsize > LARGEST:
        raise ValueError(f"tensor {name!r} has the impossible shape {list(shape)}")
    nbytes = math.prod(shape) * dtype.itemsize
    if end - start != nbytes:
        raise ValueError(f"tensor {name!r} needs {nbytes} bytes and has {end - start}")
    return TensorInfo(shard, base + start, nbytes, dtype, shape)


def regular_size(path: Path) -> int:
    """The size of a regular file in bytes.

    Raises:
        CheckpointError: it is no regular file. Opening a pipe would block for ever, and a device has no size.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file; put the file itself there")
    return status.st_size


def _integers(values: object, name: str) -> tuple[int, ...]:
    """`values` as a tuple if all are JSON integers, not negative; true and 1.0 are not."""
    if not isinstance(values, list) or not all(type(n) is int and 0 <= n <= LARGEST for n in values):
        raise ValueError(f"tensor {name!r} has sizes or offsets that are not non-negative integers")
    return tuple(values)


def parse_json(data: bytes) -> object:
    """Parse JSON.

    Raises:
        ValueError: it is no JSON in UTF-8, or an object names a key twice (the second would hide the first).
    """
    return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice")
    return out
