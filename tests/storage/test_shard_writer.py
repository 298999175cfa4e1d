"""A file is written whole, or it is not there and the old one still is."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offmoe.errors import CapacityError, OffmoeError, TransferError
from offmoe.storage import shard_writer
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.shard_writer import NewTensor, digest_of, fill, head_of, octets, read_chunks, write_file


def test_what_is_written_is_a_shard(tmp_path: Path) -> None:
    wanted = {
        "a": torch.arange(6, dtype=torch.int64).view(2, 3),
        "b": torch.randn(4, 8).mT,
        "empty": torch.empty(0, 3, dtype=torch.float16),
        "c": torch.randn(7).bfloat16(),
        "d": torch.tensor(True),
    }
    head = head_of([NewTensor(name, t.dtype, tuple(t.shape)) for name, t in wanted.items()])
    assert len(head) % 8 == 0
    path = tmp_path / "model.safetensors"
    digest = write_file(path, [head, *map(octets, wanted.values())])
    read = load_file(path)
    assert read.keys() == wanted.keys() == Checkpoint.open(tmp_path).tensors.keys()
    assert all(torch.equal(read[name], wanted[name]) and read[name].dtype == wanted[name].dtype for name in wanted)
    assert digest == digest_of(path)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        (errno.ENOSPC, CapacityError, "the disk is full.*finished shards are kept"),
        (errno.EDQUOT, CapacityError, "the disk is full"),
        (errno.EIO, TransferError, "cannot be written"),
    ],
)
def test_a_disk_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[OffmoeError], says: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error, match=says):
        write_file(path, [b"new"])
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_reads_back_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(descriptor: int) -> None:
        os.pwrite(descriptor, b"x", 1)

    monkeypatch.setattr(os, "fsync", flip)
    with pytest.raises(TransferError, match="not what was written"):
        write_file(tmp_path / "file", [b"new"])
    assert not os.listdir(tmp_path)


def test_an_error_of_the_source_is_its_own(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"some"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "file", pieces())
    assert not os.listdir(tmp_path)


def test_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    monkeypatch.setattr(shard_writer, "CHUNK_BYTES", 16)
    assert b"".join(map(bytes, read_chunks(path, 10, 50))) == bytes(range(10, 60))
    assert not list(read_chunks(path, 10, 0))
    buffer = bytearray(50)
    assert list(fill(path, 10, memoryview(buffer))) == [16, 32, 48, 50]
    assert buffer == bytes(range(10, 60))
    with pytest.raises(TransferError, match="truncated"):
        list(read_chunks(path, 90, 11))
    with pytest.raises(TransferError, match="reading failed"):
        list(read_chunks(tmp_path / "absent", 0, 1))
