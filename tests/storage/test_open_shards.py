"""Few open files, however many shards a checkpoint has, and always the same file."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from offmoe.device.host_buffers import HostBuffers
from offmoe.errors import CheckpointError, MissingTensorError, ShardChangedError, TransferError
from offmoe.storage import open_shards
from offmoe.storage.layout import ExpertRecord, Segment
from offmoe.storage.open_shards import OpenShards, file_limit, most_open
from offmoe.storage.read_plan import ALIGNMENT
from offmoe.storage.store import ExpertStore
from offmoe.types import ExpertKey

SHARDS = 40
SHARD_BYTES = 5000
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    out = [tmp_path / f"{i}.safetensors" for i in range(SHARDS)]
    for i, path in enumerate(out):
        path.write_bytes(bytes([i]) * SHARD_BYTES)
    return out


def records(num: int = SHARDS) -> dict[ExpertKey, ExpertRecord]:
    """An expert per shard, which needs an unaligned read at the end of its file."""
    return {
        ExpertKey(0, i): ExpertRecord((Segment(i, 1, SHARD_BYTES - 1, torch.uint8, (SHARD_BYTES - 1,), f"t{i}"),))
        for i in range(num)
    }


def descriptors(folder: Path) -> list[str]:
    """Files of a folder that this process has open."""
    links = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:  # the descriptor of the listing itself
            continue
    return [link for link in links if link.startswith(str(folder))]


def content(store: ExpertStore, i: int, buffers: HostBuffers, buffer: int = 0) -> bytes:
    store.read_into(ExpertKey(0, i), buffers.memory(buffer))
    return store.segments(ExpertKey(0, i), buffers.tensor(buffer))[0].numpy().tobytes()


@needs_proc
@pytest.mark.parametrize("direct", [True, False])
def test_no_more_files_are_open_than_may_be(paths: list[Path], direct: bool) -> None:
    store, buffers = ExpertStore(paths, records(), direct=direct, most_open=5), HostBuffers(1, 3 * ALIGNMENT)
    for i in [*range(SHARDS), *reversed(range(SHARDS))]:
        assert content(store, i, buffers) == bytes([i]) * (SHARD_BYTES - 1)
        assert 1 <= len(descriptors(paths[0].parent)) <= 5
    store.close()
    assert not descriptors(paths[0].parent)


@needs_proc
def test_threads_that_read_all_shards_get_the_right_bytes_and_close_what_they_opened(paths: list[Path]) -> None:
    """More threads than files may be open: those being read from stay open, the rest are closed."""
    threads = 8
    store, buffers = ExpertStore(paths, records(), most_open=3), HostBuffers(threads, 3 * ALIGNMENT)

    def read(thread: int) -> list[int]:
        order = [(thread * 7 + n * 3) % SHARDS for n in range(120)]
        return [i for i in order if content(store, i, buffers, thread) != bytes([i]) * (SHARD_BYTES - 1)]

    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(read, range(threads))) == [[]] * threads
    assert len(descriptors(paths[0].parent)) <= 3
    store.close()
    assert not descriptors(paths[0].parent)


def test_a_file_stays_open_while_it_is_read_from(paths: list[Path]) -> None:
    shards = OpenShards(paths, [], direct=False, limit=1)
    with shards.reading(0) as first:
        for number in range(1, SHARDS):
            with shards.reading(number):
                pass
        assert os.pread(first.buffered, 3, 0) == b"\0\0\0"
    shards.close()


def test_two_threads_open_one_shard_once(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    both, closed = threading.Barrier(2), []
    real_open, real_close = os.open, os.close

    def open_together(path: Path, flags: int) -> int:
        both.wait(10)
        return real_open(path, flags)

    def close(descriptor: int) -> None:
        closed.append(descriptor)
        real_close(descriptor)

    shards = OpenShards(paths, [], direct=False)
    monkeypatch.setattr(os, "open", open_together)
    monkeypatch.setattr(os, "close", close)
    with ThreadPoolExecutor(2) as pool, ExitStack() as stack:
        found = list(pool.map(lambda _: stack.enter_context(shards.reading(7)), range(2)))
        assert found[0] is found[1]
        assert found[0].users == 2
        assert len(closed) == 1
    shards.close()
    assert len(closed) == 2


def rewrite(path: Path) -> None:
    path.write_bytes(b"x" * SHARD_BYTES)
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("change", [rewrite, replace, Path.unlink])
def test_a_file_that_is_opened_again_is_the_same_file(paths: list[Path], change: Callable[[Path], None]) -> None:
    """At once, not only after the second in which an open file is not looked at."""
    buffers = HostBuffers(1, 3 * ALIGNMENT)
    store = ExpertStore(paths, records(), most_open=2, clock=lambda: 0.0)
    content(store, 0, buffers)
    for i in (1, 2, 3):
        content(store, i, buffers)
    change(paths[0])
    with pytest.raises(ShardChangedError, match=paths[0].name):
        content(store, 0, buffers)
    assert content(store, 1, buffers) == bytes([1]) * (SHARD_BYTES - 1)
    store.close()


def test_idle_files_are_closed_where_the_process_may_open_no_more(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another part of the program has used up the descriptors: the store gives back its own before it fails."""
    real_open, real_close = os.open, os.close
    open_now: set[int] = set()

    def limited(path: Path, flags: int) -> int:
        if len(open_now) >= 4:
            raise OSError(errno.EMFILE, "Too many open files")
        open_now.add(descriptor := real_open(path, flags))
        return descriptor

    def close(descriptor: int) -> None:
        open_now.discard(descriptor)
        real_close(descriptor)

    monkeypatch.setattr(os, "open", limited)
    monkeypatch.setattr(os, "close", close)
    shards = OpenShards(paths, range(4), direct=False, limit=64)
    assert len(open_now) == 4
    for number in range(SHARDS):
        with shards.reading(number) as file:
            assert os.pread(file.buffered, 1, 0) == bytes([number])
    with ExitStack() as stack:
        for number in range(4):
            stack.enter_context(shards.reading(number))
        with pytest.raises(TransferError, match=r"may open no more files .*ulimit -n"):
            stack.enter_context(shards.reading(4))
    with shards.reading(9) as file:  # it goes on afterwards
        assert os.pread(file.buffered, 1, 0) == b"\x09"
    shards.close()
    assert not open_now


def test_unused_shards_are_looked_at_and_not_opened(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", lambda path, flags: pytest.fail(f"{path} was opened"))
    OpenShards(paths, [], direct=True).close()
    paths[3].unlink()
    with pytest.raises(MissingTensorError, match=paths[3].name):
        OpenShards(paths, [], direct=True)


def test_a_shard_that_cannot_be_opened_is_named(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=rf"{paths[0].name}: cannot be opened \(Permission denied\)"):
        OpenShards(paths, range(3), direct=True)


@pytest.mark.parametrize(("soft", "wanted"), [(16, 4), (256, 64), (20_000, 64), (2, 1)])
def test_open_shards_are_a_share_of_what_the_process_may_open(
    monkeypatch: pytest.MonkeyPatch, soft: int, wanted: int
) -> None:
    monkeypatch.setattr(open_shards, "file_limit", lambda: (soft, 20_000))
    assert most_open() == wanted


def test_the_limit_is_the_systems() -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = file_limit()
    assert found is not None
    for real, value in zip(limits, found, strict=True):
        assert value == real or real == resource.RLIM_INFINITY
