"""The header of one safetensors shard: names, dtypes, shapes and byte offsets of its tensors.

What moves: 8 bytes and the JSON behind them; bounded by the number of tensors, and by 100 MB. The rules are those of
the safetensors reader itself, so that what passes here can be read anywhere in the file without another bounds check,
and a download cut short is named at once. Must never read a weight, wait for a pipe, or end in anything but tensors or
an `OffmoeError`, whatever bytes the file holds.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from offmoe.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from offmoe.storage.layout import DTYPES

MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors reader; an index is held to it too."""

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
"""safetensors dtype names that a tensor of a checkpoint may have; an expert's must be in `DTYPES`."""

SUB_BYTE_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
LARGEST = 2**63 - 1
MAX_DIMS = 64
"""torch has no more, and the product of a million huge sizes would take for ever."""


@dataclass(frozen=True, slots=True)
class ShardHead:
    """A shard without its weights. data: its bytes up to the end of the header; size: of the whole file, in bytes."""

    data: bytes
    size: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor at rest. shard: index into `Checkpoint.shards`; offset: bytes from the start of that file."""

    shard: int
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def header_end(prefix: bytes, size: int, path: Path) -> int:
    """Bytes up to the end of the header. prefix: the first 8 or more bytes of a shard of `size`; path: for messages.

    The file is: 8 bytes little-endian N, N bytes of JSON, then the tensors back to back up to the end of the file.
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
    """Tensors of one shard in file order, after the safetensors reader's own checks."""
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
    if not isinstance(entries, dict):
        raise ValueError("not an object")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise ValueError("__metadata__ is not a map of strings")
    found: list[tuple[int, int, str, TensorInfo]] = []
    for name, entry in entries.items():
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
        # max(1, ..): a zero among the sizes must not hide others that no tensor can have
        if math.prod([max(1, n) for n in shape]) * dtype.itemsize > LARGEST:
            raise ValueError(f"tensor {name!r} has the impossible shape {list(shape)}")
        nbytes = math.prod(shape) * dtype.itemsize
        if end - start != nbytes:
            raise ValueError(f"tensor {name!r} needs {nbytes} bytes and has {end - start}")
        found.append((start, end, name, TensorInfo(shard, base + start, nbytes, dtype, shape)))
    found.sort(key=lambda item: item[:2])
    covered = 0
    for start, end, name, _ in found:
        if start != covered:
            raise ValueError(f"hole or overlap before tensor {name!r}")
        covered = end
    if base + covered != size:
        raise CheckpointError(
            f"{path}: the header describes {base + covered} bytes, the file has {size}; "
            "it is truncated or was appended to: download it again"
        )
    return ((name, info) for _, _, name, info in found)


def regular_size(path: Path) -> int:
    """Size in bytes. Opening a pipe would wait for ever, and a device has no size: CheckpointError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file; put the file itself there")
    return status.st_size


def _integers(values: object, name: str) -> tuple[int, ...]:
    """JSON numbers that are non-negative integers; true and 1.0 are not."""
    if not isinstance(values, list) or not all(type(n) is int and 0 <= n <= LARGEST for n in values):
        raise ValueError(f"tensor {name!r} has sizes or offsets that are not non-negative integers")
    return tuple(values)


def parse_json(data: bytes) -> object:
    """JSON in UTF-8 only; ValueError for anything else and for a name given twice (the second would hide the first)."""
    return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice")
    return out
