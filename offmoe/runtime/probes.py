"""What moving and computing cost on this machine, each measured the way the runtime does it.

What moves: experts from the shards to staging buffers, staging buffers to the device, one expert's matrices through the
host's cores. Every figure is a median, because a shared machine's mean is somebody else's. Bound: the seconds that the
caller gives. Must never report the page cache as a disk: shards are dropped from it first.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
import torch.nn.functional as F

from offmoe.runtime.arena import HostBuffers
from offmoe.runtime.backend import Backend
from offmoe.runtime.formats import ExpertLayout
from offmoe.runtime.store import ExpertStore
from offmoe.runtime.transfer import staging_plan
from offmoe.types import ExpertKey

ROUNDS = 5
COLD_BYTES = 64 << 20
"""Of zeros, written between two rounds of computing, so that weights come from memory as they do in a run."""


class DiskProbe:
    """Reads of whole experts in random order, by as many threads as the runtime has; a context manager."""

    def __init__(self, store: ExpertStore, keys: Iterable[ExpertKey], shards: Sequence[Path]):
        """shards: what the store reads; dropped from the page cache now."""
        self._store, self._keys = store, list(keys)
        self._random = random.Random(0)
        self.readers = staging_plan(store.buffer_bytes)[0]
        self._buffers = HostBuffers(self.readers, store.buffer_bytes)
        drop_page_cache(shards)

    def __enter__(self) -> DiskProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._buffers.close()

    def lone_s(self) -> float:
        """Seconds of one read with no other under way."""
        began = time.perf_counter()
        self._store.read_into(self._random.choice(self._keys), self._buffers.memory(0))
        return time.perf_counter() - began

    def gb_s(self, seconds: float, meanwhile: Callable[[], object] | None = None) -> float:
        """GB/s of all readers together over some seconds, a read each at least.

        meanwhile: called in this thread, once at least, again and again while they read.
        """
        stop, done = threading.Event(), [0] * self.readers
        errors: list[BaseException] = []

        def read(i: int) -> None:
            try:
                while not stop.is_set() or not done[i]:
                    key = keys[i][done_reads[i] % len(keys[i])]
                    self._store.read_into(key, self._buffers.memory(i))
                    done_reads[i] += 1
                    done[i] += self._store.record(key).nbytes
            except BaseException as error:  # raised where the figure is wanted
                errors.append(error)

        done_reads = [0] * self.readers
        keys = [self._random.sample(self._keys, len(self._keys)) for _ in range(self.readers)]
        threads = [threading.Thread(target=read, args=(i,), name=f"offmoe-probe-{i}") for i in range(self.readers)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        try:
            if meanwhile is None:
                stop.wait(seconds)
            else:
                meanwhile()
                while time.perf_counter() - began < seconds:
                    meanwhile()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        took = time.perf_counter() - began
        if errors:
            raise errors[0]
        return sum(done) / 1e9 / took


def drop_page_cache(files: Iterable[Path]) -> None:
    """Forget what the system has read of these files; nothing happens where that cannot be asked for."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def copy_gb_s(backend: Backend, nbytes: int, rounds: int = ROUNDS) -> float:
    """GB/s of copies of `nbytes` from a staging buffer to the device, pinned if that can be had; the median."""
    buffers = HostBuffers(1, nbytes, register=backend.pin, unregister=backend.unpin)
    try:
        destination = torch.empty(buffers.nbytes, dtype=torch.uint8, device=backend.device)
        event = backend.event()

        def copy() -> None:
            backend.copies.copy(destination, buffers.tensor(0))
            event.record(backend.copies)
            event.synchronize()

        return buffers.nbytes / 1e9 / median_s(copy, rounds)
    finally:
        buffers.close()


def host_expert_us(layout: ExpertLayout, tokens: int, rounds: int = ROUNDS) -> float | None:
    """Microseconds of one expert's matrix products with `tokens` rows on the CPU; None if it has no plain matrices.

    Activation and biases, which are small beside them, are left out.
    """
    compute = host_expert(layout, tokens)
    if compute is None:
        return None
    others = torch.empty(COLD_BYTES, dtype=torch.uint8)
    return median_s(compute, rounds, before=others.zero_) * 1e6


def host_expert(layout: ExpertLayout, tokens: int) -> Callable[[], None] | None:
    """What `host_expert_us` times."""
    params = [p for p in layout.params if len(p.shape) == 2]
    if not params or any(not p.dtype.is_floating_point or p.dtype.itemsize < 2 for p in params):
        return None
    weights = [torch.ones(p.shape, dtype=p.dtype) for p in params]
    inputs = [torch.ones(tokens, p.shape[1], dtype=p.dtype) for p in params]

    def compute() -> None:
        for x, weight in zip(inputs, weights, strict=True):
            F.linear(x, weight)

    return compute


def median_s(work: Callable[[], object], rounds: int, before: Callable[[], object] | None = None) -> float:
    """Median seconds of `work`, after one call that does not count. before: done each time, and not timed."""
    work()
    times = []
    for _ in range(rounds):
        if before is not None:
            before()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
