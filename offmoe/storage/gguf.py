"""The header of one GGUF file: its metadata, and the names, types, shapes and byte offsets of its tensors.

Moves: the bytes before the tensors, by growing ranges: some KB, or up to 20 MB with a large vocabulary.
Bound: the number of strings in the vocabulary, which are skipped, not decoded (300,000 take 0.1 s).
Must never: read a weight, map the file, or end in anything but a header or an `OffmoeError`, whatever bytes it holds.

A header that passes needs no further bounds check: every tensor lies inside the file and overlaps no other. The layout
is that of ggml's GGUF specification, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from offmoe.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from offmoe.storage.gguf_types import BLOCK_TYPES, PLAIN_TYPES, type_name
from offmoe.storage.header import LARGEST, regular_size
from offmoe.storage.layout import TensorInfo, aligned

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
"""Bytes. Tensors begin at multiples of it unless general.alignment says otherwise."""
FIRST_READ = 1 << 16
"""Bytes of the first range. Each further range doubles what was read."""
MAX_HEADER_BYTES = 1 << 28
"""A larger header is refused. The vocabularies of 250,000 tokens take 10 to 20 MB."""
MAX_ITEMS = 1 << 22
"""Most strings of an array, tensors of a file or keys of its metadata. The largest vocabulary has 262,144 tokens."""
MAX_ARRAY = 1 << 12
"""A longer array of numbers is skipped. Arrays with a number per layer are shorter."""
MAX_DIMS = 4
"""The most dimensions of a tensor in ggml."""
MAX_DEPTH = 4
"""The deepest nesting of arrays that is accepted."""
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The value types that are numbers, as letters of `struct`; 7 is a boolean."""
SIZES = {kind: struct.calcsize(f"<{letter}") for kind, letter in SCALARS.items()}
COUNT, PAIR, TYPE_AND_COUNT, TYPE_AND_OFFSET = map(struct.Struct, ("<Q", "<QQ", "<IQ", "<IQ"))
OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg")
"""ggml, ggmf, ggjt and ggla, little-endian: llama.cpp's files until August 2023."""
LFS = b"version https://git-lfs"
REMEDY = "use a file of the model in Q4_K_M, Q5_K_M, Q6_K, Q8_0, MXFP4 or BF16"

ReadRange = Callable[[int, int], bytes]
"""read(offset, count): bytes [offset, offset + count) of the file, fewer if it ends before."""


class Skipped(NamedTuple):
    """A metadata array that was not kept: strings, long arrays and nested ones. length: its number of elements."""

    length: int


@dataclass(frozen=True)
class GgufHead:
    """A GGUF file without its weights.

    Args:
        metadata: by key; an array is a tuple of numbers, or `Skipped`.
        tensors: by the file's own names. Rows of a quantized tensor are uint8 [..., bytes of a row]. `shard` is 0.
        types: each tensor's type, as a number of `enum ggml_type`.
        header_bytes: bytes before the first tensor.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    types: dict[str, int]
    header_bytes: int


def read_gguf(path: Path) -> GgufHead:
    """Read the header of one GGUF file.

    Raises:
        MissingTensorError: the file does not exist.
        CheckpointError: the file cannot be read, is truncated or damaged.
        UnsupportedModelError: offmoe does not read such a file, or a tensor of such a type.
    """
    try:
        size = regular_size(path)
        with open(path, "rb", buffering=0) as file:

            def read(offset: int, count: int) -> bytes:
                file.seek(offset)
                return file.read(count)

            return parse_gguf(read, size, path)
    except FileNotFoundError:
        raise MissingTensorError(f"{path}: this file of the model is missing; complete the download") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check file and disk") from error


def parse_gguf(read: ReadRange, size: int, path: Path) -> GgufHead:
    """The header of a GGUF file.

    Args:
        read: reads a range of the file; called with growing ranges that follow each other.
        size: bytes of the whole file.
        path: the file's name for messages.

    Raises:
        CheckpointError: the header is damaged, or does not describe the file.
        UnsupportedModelError: another version or byte order, or a tensor of a type that offmoe does not decode.
    """
    cursor = _Cursor(read, size, path)
    try:
        return _header(cursor)
    except (ValueError, OverflowError, struct.error) as error:
        raise CheckpointError(f"{path}: the GGUF header is malformed ({error}); download it again") from error


class _Cursor:
    """Takes a file's bytes one after the other. Only the part that was needed so far is in memory."""

    def __init__(self, read: ReadRange, size: int, path: Path) -> None:
        self.size, self.path, self.at = size, path, 0
        self._read, self._data = read, bytearray()

    def need(self, count: int) -> None:
        """Bring the next `count` bytes into memory; CheckpointError if the file or the header cannot hold them."""
        end = self.at + count
        if end <= len(self._data):
            return
        if end > self.size:
            raise CheckpointError(
                f"{self.path}: its {self.size} bytes end in the header; the file is truncated: download it again"
            )
        if end > MAX_HEADER_BYTES:
            raise ValueError(f"it is larger than {MAX_HEADER_BYTES} bytes")
        wanted = min(self.size, max(end, 2 * len(self._data), FIRST_READ))
        self._data += self._read(len(self._data), wanted - len(self._data))
        if end > len(self._data):
            raise CheckpointError(f"{self.path}: ends before its header does; it was truncated: download it again")

    def take(self, count: int) -> bytes:
        self.need(count)
        self.at += count
        return bytes(self._data[self.at - count : self.at])

    def unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        self.need(form.size)
        self.at += form.size
        return form.unpack_from(self._data, self.at - form.size)

    def number(self, kind: int) -> Any:
        raw = self.take(SIZES[kind])
        if kind == 7 and raw not in (b"\0", b"\1"):
            raise ValueError(f"a boolean is {raw[0]}")
        return struct.unpack(f"<{SCALARS[kind]}", raw)[0]

    def text(self, errors: str = "strict") -> str:
        (length,) = self.unpack(COUNT)
        return self.take(length).decode("utf-8", errors)

    def skip_strings(self, count: int) -> None:
        self.check_count(count, COUNT.size, "strings")
        data, length_at = self._data, COUNT.unpack_from
        for _ in range(count):
            at = self.at
            if at + 8 > len(data):
                self.need(8)
            self.at = at + 8 + length_at(data, at)[0]
        self.need(0)

    def skip(self, count: int) -> None:
        self.need(count)
        self.at += count

    def check_count(self, count: int, nbytes: int, what: str) -> None:
        """ValueError if `count` things of at least `nbytes` bytes each cannot be in the rest of the file."""
        if count > MAX_ITEMS or count * nbytes > self.size - self.at:
            raise ValueError(f"it announces {count} {what}")


def _header(cursor: _Cursor) -> GgufHead:
    _check_magic(cursor)
    num_tensors, num_keys = cursor.unpack(PAIR)
    cursor.check_count(num_keys, 13, "keys")  # the shortest: a key without letters, a type and one byte
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"the key {key!r} occurs twice")
        metadata[key] = _value(cursor, cursor.number(4))
    cursor.check_count(num_tensors, 24, "tensors")  # the shortest: no letter, no dimension
    described: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name = cursor.text()
        num_dims = cursor.number(4)
        if num_dims > MAX_DIMS:
            raise ValueError(f"tensor {name!r} has {num_dims} dimensions")
        if name in described:
            raise ValueError(f"tensor {name!r} occurs twice")
        shape = tuple(cursor.number(10) for _ in range(num_dims))[::-1]
        described[name] = (shape, *cursor.unpack(TYPE_AND_OFFSET))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"the alignment {alignment!r} is not a power of two")
    base = aligned(cursor.at, alignment)
    tensors = {
        name: _tensor(cursor.path, name, shape, kind, base + offset)
        for name, (shape, kind, offset) in described.items()
    }
    for name, (_, _, offset) in described.items():
        if offset % alignment:
            raise ValueError(f"tensor {name!r} stands at {offset}, not at a multiple of {alignment}")
    _check_places(cursor, tensors, base)
    return GgufHead(metadata, tensors, {name: kind for name, (_, kind, _) in described.items()}, base)


def _check_magic(cursor: _Cursor) -> None:
    path = cursor.path
    if cursor.size < 8:
        raise CheckpointError(f"{path}: its {cursor.size} bytes are not a GGUF file; download it again")
    if (magic := cursor.take(4)) != MAGIC:
        cursor.at = 0
        raise CheckpointError(f"{path}: {_other_file(magic, cursor.take(min(cursor.size, 80)), cursor.size)}")
    version = cursor.number(4)
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
        raise UnsupportedModelError(f"{path}: a big-endian GGUF file; use the little-endian file of the model")
    raise UnsupportedModelError(
        f"{path}: GGUF version {version}, and offmoe reads {VERSIONS[0]} and {VERSIONS[1]}; use a newer file of the "
        "model"
    )


def _other_file(magic: bytes, start: bytes, size: int) -> str:
    """What a file that is no GGUF file is instead, and what to do. start: its first bytes."""
    if size < 1024 and start.startswith(LFS):
        return "a git-lfs pointer, not the weights; fetch them with `git lfs pull`"
    if magic in OLD_MAGICS:
        return f"a file of llama.cpp from before GGUF ({magic[::-1].decode()}); {REMEDY}"
    if not start.strip(b"\0"):
        return "it begins with zeros, so its download has not finished; download it again"
    text = start.decode("utf-8", "ignore").strip()
    if text.startswith("<"):
        return (
            "a web page, not the file that was asked for; download it again, from an address with /resolve/ and not "
            "/blob/ in it on the Hub, and with a token if the repository is gated"
        )
    if len(text) > 8 and (line := text.splitlines()[0]).isprintable():
        return f"text, not a GGUF file: {line!r}; download it again"
    return f"not a GGUF file (it begins with {magic!r}); download it again"


def _value(cursor: _Cursor, kind: int, depth: int = 0) -> Any:
    """One value of the metadata. depth: of the array that holds it."""
    if kind in SCALARS:
        return cursor.number(kind)
    if kind == STRING:
        return cursor.text("replace")
    if kind != ARRAY:
        raise ValueError(f"a value has the unknown type {kind}")
    if depth == MAX_DEPTH:
        raise ValueError(f"arrays are nested deeper than {MAX_DEPTH}")
    element, count = cursor.unpack(TYPE_AND_COUNT)
    if element in SCALARS:
        if count <= MAX_ARRAY:
            return tuple(cursor.number(element) for _ in range(count))
        cursor.skip(count * SIZES[element])
    elif element == STRING:
        cursor.skip_strings(count)
    else:
        cursor.check_count(count, TYPE_AND_COUNT.size, "arrays")
        for _ in range(count):
            _value(cursor, element, depth + 1)
    return Skipped(count)


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
    # A size of 0 must not hide other sizes that no tensor can have, hence max(1, n).
    if math.prod([max(1, n) for n in shape]) * 8 > LARGEST or offset > LARGEST:
        raise ValueError(f"tensor {name!r} has the impossible shape {list(shape)}")
    if kind in PLAIN_TYPES:
        dtype = PLAIN_TYPES[kind]
        return TensorInfo(0, offset, math.prod(shape) * dtype.itemsize, dtype, shape)
    block = BLOCK_TYPES.get(kind)
    if block is None:
        raise UnsupportedModelError(
            f"{path}: tensor {name!r} is {type_name(kind)}, which offmoe cannot decode; {REMEDY}"
        )
    if not shape or shape[-1] % block.values:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} has no whole blocks of {block.name}")
    raw = (*shape[:-1], shape[-1] // block.values * block.nbytes)
    return TensorInfo(0, offset, math.prod(raw), torch.uint8, raw)


def _check_places(cursor: _Cursor, tensors: dict[str, TensorInfo], base: int) -> None:
    """Check that every tensor is inside the file and overlaps no other."""
    end = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset < end:
            raise ValueError(f"tensor {name!r} overlaps another one")
        end = info.offset + info.nbytes
    if end > cursor.size and tensors:
        raise CheckpointError(
            f"{cursor.path}: the header describes {end} bytes, the file has {cursor.size}; it is truncated: download "
            "it again"
        )
