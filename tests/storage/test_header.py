"""Headers of shards: what the safetensors reader refuses is refused, with the file's name and the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.storage.checkpoint import SINGLE_FILE, Checkpoint


def write_shard(path: Path, header: object, data: bytes = b"", padding: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += padding
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(start: int, end: int, dtype: object = "U8", shape: object = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def test_header_padding_any_order_and_odd_offsets_are_valid(tmp_path: Path) -> None:
    header = {"b": entry(3, 11, "F32", [2]), "a": entry(0, 3)}
    write_shard(tmp_path / SINGLE_FILE, header, bytes(range(11)), padding=b" " * 4000)
    info = Checkpoint.open(tmp_path).tensors["b"]
    assert (tmp_path / SINGLE_FILE).read_bytes()[info.offset :][: info.nbytes] == bytes(range(3, 11))


@pytest.mark.parametrize(
    ("header", "data", "what"),
    [
        (b"[]", b"", "not JSON"),
        (b' {"a": 1}', b"", "not JSON"),
        (b"{", b"", "not JSON"),
        (b"{}\0\0", b"", "not JSON"),
        (b'{"a": NaN}', b"", "malformed"),
        (b'{"a":' * 50_000, b"", "not JSON"),
        (b'{"\xff": 1}', b"", "not JSON"),
        (b'{"a": 1, "a": 1}', b"", "twice"),
        ({"a": 1}, b"", "malformed"),
        ({"a": {"dtype": "U8", "shape": [1]}}, b"", "malformed"),
        ({"a": entry(0, 4, "U9")}, bytes(4), "unknown dtype"),
        ({"a": entry(0, 4, ["U8"])}, bytes(4), "malformed"),
        ({"a": entry(0, 4, "F32", [2])}, bytes(4), "needs 8 bytes and has 4"),
        ({"a": entry(0, 4, "U8", [True, 4])}, bytes(4), "non-negative integers"),
        ({"a": entry(0, 4, "U8", [4.0])}, bytes(4), "non-negative integers"),
        ({"a": entry(0, 4, "U8", [-2, -2])}, bytes(4), "non-negative integers"),
        ({"a": entry(0, 4, "U8", "4")}, bytes(4), "non-negative integers"),
        ({"a": entry(4, 0, "U8", [4])}, bytes(4), "has -4"),
        ({"a": entry(0, 0, "U8", [0, 2**62, 2**62])}, b"", "impossible shape"),
        ({"a": entry(0, 1, "U8", [1] * 65)}, bytes(1), "65 dimensions"),
        ({"a": {**entry(0, 4), "data_offsets": [0, 2, 4]}}, bytes(4), "malformed"),
        ({"a": entry(2, 6)}, bytes(6), "hole or overlap"),
        ({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8), "hole or overlap before tensor 'b'"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6), "hole or overlap"),
        ({"a": entry(0, 4)}, bytes(3), "truncated or was appended to"),
        ({"a": entry(0, 4)}, bytes(5), "truncated or was appended to"),
        ({"__metadata__": {"x": 1}}, b"", "__metadata__"),
        ({"__metadata__": [1]}, b"", "__metadata__"),
        ({"__metadata__": []}, b"", "__metadata__"),
    ],
)
def test_what_safetensors_refuses_is_refused(tmp_path: Path, header: object, data: bytes, what: str) -> None:
    path = tmp_path / SINGLE_FILE
    write_shard(path, header, data)
    with pytest.raises(CheckpointError, match=what) as caught:
        Checkpoint.open(tmp_path)
    assert SINGLE_FILE in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"abc", (10**9).to_bytes(8, "little") + b"{}", b"\xff" * 64])
def test_no_room_for_a_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot hold the header"):
        Checkpoint.open(tmp_path)


def test_header_above_the_limit_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / SINGLE_FILE, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(200_000_000)  # sparse
    with pytest.raises(CheckpointError, match="cannot hold the header"):
        Checkpoint.open(tmp_path)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Checkpoint.open(tmp_path)


def test_dtype_below_a_byte(tmp_path: Path) -> None:
    write_shard(tmp_path / SINGLE_FILE, {"a": entry(0, 4, "F4", [8])}, bytes(4))
    with pytest.raises(UnsupportedModelError, match="'a' is stored as F4"):
        Checkpoint.open(tmp_path)
