"""Measures reading, copying and computing on this machine, each the way the runtime does it.

Every figure is a median, because the mean on a shared machine depends on the other users. Shards are dropped from the
page cache first, so that memory is never reported as a disk.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from offmoe.device.backend import Backend
from offmoe.device.host_buffers import HostBuffers
from offmoe.io_limits import READERS
from offmoe.storage.layout import ExpertLayout
from offmoe.storage.store import ExpertStore
from offmoe.transfer.staging import staging_plan
from offmoe.types import ExpertKey

ROUNDS = 5
COLD_BYTES = 64 << 20
"""Bytes written between two rounds of computing, so that weights come from memory and not from the CPU's caches."""


class DiskProbe:
    """Reads experts in random order, with as many threads and experts at once as the runtime."""

    def __init__(self, store: ExpertStore, keys: Iterable[ExpertKey], shards: Sequence[Path]):
        """shards: the files that the store reads. They are dropped from the page cache now."""
        self._store, self._keys = store, list(keys)
        self._random = random.Random(0)
        self.at_once = staging_plan(store.buffer_bytes).at_once
        self._buffers = HostBuffers(self.at_once, store.buffer_bytes)
        drop_page_cache(shards)

    def close(self) -> None:
        self._buffers.close()

    def lone_s(self) -> float:
        """Seconds of one read while no other read is under way."""
        key = self._random.choice(self._keys)
        if self._store.parts(key) == 1:  # starting threads would take longer than the read
            return timed(lambda: self._read_share(key, 0, 0, 1))
        return timed(lambda: self._together(lambda i: self._read_share(key, 0, i, READERS)))

    def gb_s(self, seconds: float, meanwhile: Callable[[], object] | None = None) -> float:
        """GB/s of all readers together over `seconds`; every reader reads at least once.

        meanwhile: called again and again in this thread while they read, at least once.
        """
        stop, done = threading.Event(), [0] * READERS
        sharing = READERS // self.at_once
        order = [self._random.sample(self._keys, len(self._keys)) for _ in range(self.at_once)]

        def read(i: int) -> None:
            buffer, turn = i % self.at_once, 0
            while not stop.is_set() or not turn:
                key = order[buffer][turn % len(self._keys)]
                done[i] += self._read_share(key, buffer, i // self.at_once, sharing)
                turn += 1

        def wait() -> None:
            pass_time = meanwhile or partial(time.sleep, seconds)
            pass_time()
            while time.perf_counter() - began < seconds:
                pass_time()

        began = time.perf_counter()
        self._together(read, wait, stop)
        return sum(done) / 1e9 / (time.perf_counter() - began)

    def _read_share(self, key: ExpertKey, buffer: int, share: int, of: int) -> int:
        """Read one reader's parts of an expert. Returns the bytes read."""
        parts = self._store.parts(key)
        for part in range(share, parts, of):
            self._store.read_part(key, part, self._buffers.memory(buffer))
        return self._store.record(key).nbytes * len(range(share, parts, of)) // max(1, parts)

    @staticmethod
    def _together(
        work: Callable[[int], object],
        meanwhile: Callable[[], object] = lambda: None,
        stop: threading.Event | None = None,
    ) -> None:
        """Run work(i) in a thread for each reader. `stop` is set when `meanwhile` has returned."""
        with ThreadPoolExecutor(READERS, "offmoe-probe") as pool:
            reads = [pool.submit(work, i) for i in range(READERS)]
            try:
                meanwhile()
            finally:
                if stop is not None:
                    stop.set()
        for read in reads:
            read.result()


def drop_page_cache(files: Iterable[Path]) -> None:
    """Drop these files from the page cache, if the system can."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with suppress(OSError), open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_gb_s(backend: Backend, nbytes: int, rounds: int = ROUNDS) -> float:
    """Median GB/s of copies of `nbytes` from a staging buffer to the device. The buffer is pinned if possible."""
    with closing(HostBuffers(1, nbytes, pinning=backend)) as buffers:
        destination = torch.empty(buffers.nbytes, dtype=torch.uint8, device=backend.device)
        event = backend.event()

        def copy() -> None:
            backend.copies.copy(destination, buffers.tensor(0))
            event.record(backend.copies)
            event.synchronize()

        return buffers.nbytes / 1e9 / median_s(copy, rounds)


def host_expert_us(layout: ExpertLayout, tokens: int, rounds: int = ROUNDS) -> float | None:
    """Microseconds of one expert's matrix products with `tokens` rows on the CPU; None if it has no plain matrices.

    Activation and biases are left out; they are small in comparison.
    """
    compute = host_expert(layout, tokens)
    if compute is None:
        return None
    others = torch.empty(COLD_BYTES, dtype=torch.uint8)
    return median_s(compute, rounds, before=others.zero_) * 1e6


def host_expert(layout: ExpertLayout, tokens: int) -> Callable[[], None] | None:
    """A function that computes one expert's matrix products on the CPU; None if it has no plain matrices."""
    params = [p for p in layout.params if len(p.shape) == 2]
    if not params or any(not p.dtype.is_floating_point or p.dtype.itemsize < 2 for p in params):
        return None
    weights = [torch.ones(p.shape, dtype=p.dtype) for p in params]
    inputs = [torch.ones(tokens, p.shape[1], dtype=p.dtype) for p in params]

    def compute() -> None:
        for x, weight in zip(inputs, weights, strict=True):
            F.linear(x, weight)

    return compute


def median_s(work: Callable[[], object], rounds: int, before: Callable[[], object] = lambda: None) -> float:
    """Median seconds of `work`, after one call that does not count. before: called before each round, not timed."""
    work()
    times = []
    for _ in range(rounds):
        before()
        times.append(timed(work))
    return statistics.median(times)


def timed(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
