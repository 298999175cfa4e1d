import errno
import io
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, TimeoutError
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from offmoe.device.host_buffers import HostBuffers
from offmoe.errors import CheckpointError, MissingTensorError, ShardChangedError, TransferError
from offmoe.storage import read_plan
from offmoe.storage import store as store_module
from offmoe.storage.layout import ExpertRecord, Segment
from offmoe.storage.read_plan import ALIGNMENT, READ_THROUGH_BYTES
from offmoe.storage.store import ExpertStore, ReadAt, positional_read
from offmoe.types import ExpertKey

SHARD_BYTES = 300_001  # no multiple of anything
KEY = ExpertKey(0, 0)


def segment(shard: int, offset: int, nbytes: int) -> Segment:
    return Segment(shard, offset, nbytes, torch.uint8, (nbytes,), f"t{shard}.{offset}")


RECORDS = {
    KEY: ExpertRecord((segment(0, 1057, 5000), segment(0, 6057, 7001))),  # adjacent, unaligned
    ExpertKey(0, 1): ExpertRecord((segment(1, 100, 40_000), segment(0, 250_000, 50_001))),  # cut by the shard boundary
    ExpertKey(0, 2): ExpertRecord((segment(1, 299_000, 1001), segment(1, 3, 1), segment(1, 90_000, 4096))),  # far apart
    ExpertKey(1, 0): ExpertRecord((segment(2, 0, SHARD_BYTES),)),
    ExpertKey(1, 1): ExpertRecord(
        (segment(2, 50_000, 9000), segment(2, 50_005, 10), segment(2, SHARD_BYTES, 0))
    ),  # overlap
    ExpertKey(1, 2): ExpertRecord(()),
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    generator = torch.Generator().manual_seed(1)
    for path in paths:
        path.write_bytes(
            torch.randint(0, 256, (SHARD_BYTES,), dtype=torch.uint8, generator=generator).numpy().tobytes()
        )
    return paths


@pytest.fixture
def buffers() -> Iterator[HostBuffers]:
    buffers = HostBuffers(8, SHARD_BYTES + 2 * ALIGNMENT)
    yield buffers
    buffers.close()


def expected(shards: list[Path], key: ExpertKey) -> list[bytes]:
    out = []
    for part in RECORDS[key].segments:
        content = shards[part.shard].read_bytes()
        out.append(content[part.offset : part.offset + part.nbytes])
    return out


def read(store: ExpertStore, key: ExpertKey, buffers: HostBuffers, i: int = 0) -> list[bytes]:
    buffers.tensor(i).fill_(0xAA)
    store.read_into(key, buffers.memory(i))
    return [view.numpy().tobytes() for view in store.segments(key, buffers.tensor(i))]


def failing(times: int, error: OSError) -> ReadAt:
    """A read that raises `error` the first `times` times."""
    real, remaining = positional_read(), [times]

    def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
        if remaining[0]:
            remaining[0] -= 1
            raise error
        return real(descriptor, buffer, offset)

    return read_at


def short(limit: int) -> ReadAt:
    """A read that never gives more than `limit` bytes."""
    real = positional_read()

    def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
        got = min(real(descriptor, buffer, offset), limit)
        buffer[got:] = bytes(len(buffer) - got)
        return got

    return read_at


class TestBytes:
    @pytest.mark.parametrize("direct", [True, False])
    @pytest.mark.parametrize("key", RECORDS)
    def test_every_expert_is_bit_identical(
        self, shards: list[Path], buffers: HostBuffers, key: ExpertKey, direct: bool
    ) -> None:
        store = ExpertStore(shards, RECORDS, direct=direct)
        assert read(store, key, buffers) == expected(shards, key)
        assert store.record(key) is RECORDS[key]
        store.close()

    @pytest.mark.parametrize("missing", [["O_DIRECT"], ["O_DIRECT", "preadv"], ["O_DIRECT", "preadv", "pread"]])
    def test_without_what_only_linux_has(
        self, shards: list[Path], buffers: HostBuffers, monkeypatch: pytest.MonkeyPatch, missing: list[str]
    ) -> None:
        for name in missing:
            monkeypatch.delattr(os, name, raising=False)
        store = ExpertStore(shards, RECORDS)
        want = {key: expected(shards, key) for key in RECORDS}

        def wrong(i: int) -> list[ExpertKey]:
            return [key for key in list(RECORDS) * 20 if read(store, key, buffers, i) != want[key]]

        with ThreadPoolExecutor(4) as pool:  # seek-and-read shares one file position
            assert list(pool.map(wrong, range(4))) == [[]] * 4
        store.close()

    def test_seek_and_read_of_two_threads_do_not_mix(self, shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        both_sought = threading.Barrier(2)

        class File(io.FileIO):
            def seek(self, offset: int, whence: int = 0) -> int:
                position = super().seek(offset, whence)
                with suppress(threading.BrokenBarrierError):
                    both_sought.wait(0.05)  # passes only if another thread seeks before this one has read
                return position

        for name in ("preadv", "pread"):
            monkeypatch.delattr(os, name, raising=False)
        read_at = positional_read()
        monkeypatch.setattr(store_module, "open", lambda fd, *_, **__: File(fd, closefd=False), raising=False)
        content, into = shards[0].read_bytes(), [bytearray(100), bytearray(100)]
        descriptor = os.open(shards[0], os.O_RDONLY)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda i: read_at(descriptor, memoryview(into[i]), 5000 * i), range(2)))
        os.close(descriptor)
        assert into == [content[:100], content[5000:5100]]

    @pytest.mark.parametrize("limit", [1000, 4096, 10_000])
    def test_short_reads_are_continued_and_no_reason_to_give_up_direct_reads(
        self, shards: list[Path], buffers: HostBuffers, caplog: pytest.LogCaptureFixture, limit: int
    ) -> None:
        store = ExpertStore(shards, RECORDS, read_at=short(limit))
        for key in RECORDS:
            assert read(store, key, buffers) == expected(shards, key)
        assert not caplog.records
        store.close()

    def test_large_reads_are_cut(
        self, shards: list[Path], buffers: HostBuffers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(read_plan, "part_bytes", lambda nbytes: 2 * ALIGNMENT)
        store = ExpertStore(shards, RECORDS)
        for key in RECORDS:
            assert read(store, key, buffers) == expected(shards, key)
        store.close()

    def test_eight_threads(self, shards: list[Path], buffers: HostBuffers) -> None:
        store = ExpertStore(shards, RECORDS)
        want = {key: expected(shards, key) for key in RECORDS}
        keys = list(RECORDS)

        def reader(i: int) -> int:
            return sum(read(store, keys[(i + n) % 6], buffers, i) == want[keys[(i + n) % 6]] for n in range(30))

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(reader, range(8))) == [30] * 8
        store.close()


class TestPlan:
    @pytest.mark.parametrize("nbytes", [884_736, 1_290_240, 1_671_168], ids=["Q4_K", "Q6_K", "Q8_0"])
    def test_an_expert_in_three_stacked_tensors_costs_one_percent_at_most(self, nbytes: int) -> None:
        """The matrices of Qwen3-30B-A3B (768 x 2048) in a GGUF file: 128 experts of a tensor follow each other, and a
        tensor begins at a multiple of 32 bytes."""
        for start in range(0, ALIGNMENT, 32):
            for expert in (0, 1, 127):
                offsets = [start + tensor * 128 * nbytes + expert * nbytes for tensor in range(3)]
                record = ExpertRecord(tuple(segment(0, offset, nbytes) for offset in offsets))
                assert read_plan.plan_reads(record).nbytes <= 1.01 * 3 * nbytes

    def calls(self, shards: list[Path], record: ExpertRecord, buffers: HostBuffers) -> list[tuple[int, int]]:
        """(offset, length) of every system call that reading the record takes."""
        calls: list[tuple[int, int]] = []
        real = positional_read()

        def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
            calls.append((offset, len(buffer)))
            return real(descriptor, buffer, offset)

        store = ExpertStore(shards, {KEY: record}, read_at=read_at)
        store.read_into(KEY, buffers.memory(0))
        store.close()
        return calls

    def test_neighbors_are_one_aligned_read_whatever_their_order(
        self, shards: list[Path], buffers: HostBuffers
    ) -> None:
        record = ExpertRecord((segment(0, 20_000, 100), segment(0, 5000, 15_000)))
        assert self.calls(shards, record, buffers) == [(4096, 20_480 - 4096)]

    @pytest.mark.parametrize(("gap", "reads"), [(READ_THROUGH_BYTES - 1, 1), (READ_THROUGH_BYTES, 2)])
    def test_small_gaps_are_read_through(self, shards: list[Path], buffers: HostBuffers, gap: int, reads: int) -> None:
        record = ExpertRecord((segment(0, 0, 4096), segment(0, 4096 + gap, 100)))
        assert len(self.calls(shards, record, buffers)) == reads

    def test_buffer_bytes_hold_the_largest_expert(self, shards: list[Path]) -> None:
        store = ExpertStore(shards, RECORDS)
        assert store.buffer_bytes == 303_104  # 300,001 rounded up to 4096
        exact = HostBuffers(1, store.buffer_bytes)
        for key in RECORDS:
            assert read(store, key, exact) == expected(shards, key)
        store.close()

    def test_segments_are_views_of_the_buffer(self, shards: list[Path], buffers: HostBuffers) -> None:
        store = ExpertStore(shards, RECORDS)
        first, last = buffers.tensor(0).data_ptr(), buffers.tensor(0).data_ptr() + buffers.nbytes
        for view in store.segments(KEY, buffers.tensor(0)):
            assert view.dtype is torch.uint8
            assert first <= view.data_ptr() < last
        store.close()


class TestRefusals:
    @pytest.mark.parametrize("code", [errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP])
    def test_direct_refused_while_reading_falls_back_with_one_warning(
        self, shards: list[Path], buffers: HostBuffers, caplog: pytest.LogCaptureFixture, code: int
    ) -> None:
        direct: set[int] = set()
        real, real_open = positional_read(), os.open

        def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
            if descriptor in direct:
                raise OSError(code, os.strerror(code))
            return real(descriptor, buffer, offset)

        def open_and_note(path: Path, flags: int) -> int:
            descriptor = real_open(path, flags)
            if flags & os.O_DIRECT:
                direct.add(descriptor)
            return descriptor

        with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(os, "open", open_and_note)
            store = ExpertStore(shards, RECORDS, read_at=read_at)
            for key in RECORDS:
                assert read(store, key, buffers) == expected(shards, key)
        assert direct, "this file system opened no shard unbuffered, the test has shown nothing"
        assert len(caplog.records) == 1
        assert "page cache" in caplog.text
        store.close()

    def test_direct_refused_while_opening(
        self,
        shards: list[Path],
        buffers: HostBuffers,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        real_open = os.open

        def refuse(path: Path, flags: int) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real_open(path, flags)

        monkeypatch.setattr(os, "open", refuse)
        store = ExpertStore(shards, RECORDS)
        assert read(store, KEY, buffers) == expected(shards, KEY)
        assert len(caplog.records) == 1
        store.close()

    @pytest.mark.parametrize("direct", [True, False])
    def test_one_eio_is_retried(self, shards: list[Path], buffers: HostBuffers, direct: bool) -> None:
        store = ExpertStore(shards, RECORDS, direct=direct, read_at=failing(1, OSError(errno.EIO, "I/O error")))
        assert read(store, KEY, buffers) == expected(shards, KEY)
        store.close()

    def test_a_second_eio_names_path_and_offset_and_the_store_lives_on(
        self, shards: list[Path], buffers: HostBuffers
    ) -> None:
        store = ExpertStore(shards, RECORDS, read_at=failing(2, OSError(errno.EIO, "I/O error")))
        with pytest.raises(TransferError, match=rf"{shards[0].name} @ byte 0: .*I/O error"):
            read(store, KEY, buffers)
        assert read(store, KEY, buffers) == expected(shards, KEY)
        store.close()

    def test_other_errors_are_not_retried(self, shards: list[Path], buffers: HostBuffers) -> None:
        store = ExpertStore(shards, RECORDS, read_at=failing(1, OSError(errno.ENOMEM, "no memory")))
        with pytest.raises(TransferError, match="no memory"):
            read(store, KEY, buffers)
        store.close()

    def test_einval_of_a_buffered_read_is_an_error_not_a_loop(self, shards: list[Path], buffers: HostBuffers) -> None:
        store = ExpertStore(shards, RECORDS, direct=False, read_at=failing(9, OSError(errno.EINVAL, "invalid")))
        with pytest.raises(TransferError, match="invalid"):
            read(store, KEY, buffers)
        store.close()

    def test_interrupted_reads_are_repeated(self, shards: list[Path], buffers: HostBuffers) -> None:
        store = ExpertStore(shards, RECORDS, read_at=failing(5, InterruptedError(errno.EINTR, "interrupted")))
        assert read(store, KEY, buffers) == expected(shards, KEY)
        store.close()


def rewrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(1, 1))  # the clock of mtime may not have ticked since the fixture wrote


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    status = os.stat(path)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


class TestChange:
    @pytest.mark.parametrize("direct", [True, False])
    @pytest.mark.parametrize("change", [rewrite, replace, append, Path.unlink])
    def test_change_is_found_at_the_next_look_and_from_then_on(
        self, shards: list[Path], buffers: HostBuffers, change: Callable[[Path], None], direct: bool
    ) -> None:
        clock = Clock()
        store = ExpertStore(shards, RECORDS, direct=direct, clock=clock)
        read(store, KEY, buffers)
        change(shards[0])
        clock.now = 1.0
        for _ in range(2):
            with pytest.raises(ShardChangedError, match=shards[0].name):
                read(store, KEY, buffers)
        assert read(store, ExpertKey(1, 0), buffers) == expected(shards, ExpertKey(1, 0))  # another shard
        store.close()

    @pytest.mark.parametrize("direct", [True, False])
    @pytest.mark.parametrize("size", [0, 4096, 5001])
    def test_truncation_is_found_at_once(
        self, shards: list[Path], buffers: HostBuffers, size: int, direct: bool
    ) -> None:
        store = ExpertStore(shards, RECORDS, direct=direct, clock=Clock())
        os.truncate(shards[0], size)
        with pytest.raises(ShardChangedError, match=rf"{shards[0].name}: ends at byte {size} .*truncated"):
            read(store, KEY, buffers)
        store.close()

    def test_identity_is_looked_at_once_a_second(
        self, shards: list[Path], buffers: HostBuffers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock, real = Clock(), os.stat
        looks: list[Path] = []

        def stat(path: Path) -> os.stat_result:
            looks.append(path)
            return real(path)

        store = ExpertStore(shards, RECORDS, clock=clock)
        monkeypatch.setattr(os, "stat", stat)
        for now in (0.0, 0.9, 1.0, 1.5, 1.9, 2.0):
            clock.now = now
            store.read_into(KEY, buffers.memory(0))
        assert looks == [shards[0]] * 2
        store.close()


class TestLife:
    def test_missing_shard(self, shards: list[Path]) -> None:
        shards[1].unlink()
        with pytest.raises(MissingTensorError, match=shards[1].name):
            ExpertStore(shards, RECORDS)

    def test_shard_shorter_than_its_records(self, shards: list[Path]) -> None:
        os.truncate(shards[2], 1000)
        with pytest.raises(CheckpointError, match=rf"{shards[2].name}: has 1000 bytes, .*300001"):
            ExpertStore(shards, RECORDS)

    @pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
    def test_no_descriptor_is_left(self, shards: list[Path]) -> None:
        before = len(os.listdir("/proc/self/fd"))
        store = ExpertStore(shards, RECORDS)
        assert len(os.listdir("/proc/self/fd")) > before
        store.close()
        store.close()
        os.truncate(shards[2], 1000)
        with pytest.raises(CheckpointError):
            ExpertStore(shards, RECORDS)
        assert len(os.listdir("/proc/self/fd")) == before

    def test_closed_store_refuses_to_read(self, shards: list[Path], buffers: HostBuffers) -> None:
        store = ExpertStore(shards, RECORDS)
        store.close()
        with pytest.raises(TransferError, match="closed"):
            read(store, KEY, buffers)

    def test_stop_ends_a_read_between_system_calls(self, shards: list[Path], buffers: HostBuffers) -> None:
        stop, real, calls = threading.Event(), positional_read(), []

        def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
            calls.append(offset)
            stop.set()
            return real(descriptor, buffer[:ALIGNMENT], offset)

        store = ExpertStore(shards, RECORDS, read_at=read_at)
        with pytest.raises(CancelledError):
            store.read_into(ExpertKey(1, 0), buffers.memory(0), stop)
        assert calls == [0]
        store.close()

    def test_close_waits_for_the_system_call_under_way_and_ends_the_read(
        self, shards: list[Path], buffers: HostBuffers
    ) -> None:
        entered, go, real = threading.Event(), threading.Event(), positional_read()

        def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
            entered.set()
            assert go.wait(10)
            return real(descriptor, buffer[:ALIGNMENT], offset)

        store = ExpertStore(shards, RECORDS, read_at=read_at)
        with ThreadPoolExecutor(2) as pool:
            reading = pool.submit(store.read_into, ExpertKey(1, 0), buffers.memory(0))
            assert entered.wait(10)
            closing = pool.submit(store.close)
            with pytest.raises(TimeoutError):
                closing.result(0.05)
            go.set()
            closing.result(10)
            assert isinstance(reading.exception(10), TransferError)

    def test_unaligned_or_small_buffers_are_our_bug(self, shards: list[Path], buffers: HostBuffers) -> None:
        store = ExpertStore(shards, RECORDS)
        with pytest.raises(AssertionError):
            store.read_into(KEY, buffers.memory(0)[8:])
        with pytest.raises(AssertionError):
            store.read_into(KEY, buffers.memory(0)[:4096])
        store.close()
