"""Measures how close reading whole experts at random comes to the speed of the disk: cold reads against a control.

Every expert of two synthetic checkpoints (experts of 50 MB and of 5 MB, in shards as save_file writes them) is read
into host buffers by 4 threads. The control reads the same files from end to end with O_DIRECT, in large requests, with
as many threads, into the same buffers. A disk's speed drifts by more than the difference in question, and often favors
the second reader. So each round reads experts, control, control, experts, drops the page cache before each, and the
figure is the median of the rounds' ratios.

Prints a table; with --json one last line {"cold_ratio_50mb", "cold_ratio_5mb", "limit_gb_s"}. The exit status is 1 if
the bytes read are not those written, or there is no room.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import checkout  # noqa: F401
import torch
from safetensors.torch import save_file

from offmoe.device.host_buffers import HostBuffers
from offmoe.storage.checkpoint import INDEX_FILE, Checkpoint
from offmoe.storage.layout import ExpertRecord
from offmoe.storage.store import ExpertStore
from offmoe.types import ExpertKey

THREADS = 4
REQUEST_BYTES = 16 * 2**20
SHARD_BYTES = 500_000_000
SPARE_BYTES = 10**9
VERIFIED_EXPERTS = 8
MIN_ROUNDS = 2


@dataclass(frozen=True)
class Model:
    """A synthetic checkpoint: experts of three bf16 matrices [ff, hidden], [ff, hidden], [hidden, ff]."""

    name: str
    layers: int
    experts: int
    hidden: int
    ff: int

    @property
    def expert_bytes(self) -> int:
        return 3 * 2 * self.hidden * self.ff

    @property
    def nbytes(self) -> int:
        return self.layers * (self.experts * self.expert_bytes + 2 * self.hidden * self.hidden)

    def tensors(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names and shapes in the order of a checkpoint: attention of a layer, then its experts."""
        for layer in range(self.layers):
            yield f"model.layers.{layer}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            for expert in range(self.experts):
                shapes = {"w1": (self.ff, self.hidden), "w2": (self.hidden, self.ff), "w3": (self.ff, self.hidden)}
                for part, shape in shapes.items():
                    yield _expert_tensor(ExpertKey(layer, expert), part), shape

    def expert_keys(self) -> list[ExpertKey]:
        return [ExpertKey(layer, expert) for layer in range(self.layers) for expert in range(self.experts)]


BIG = Model("50 MB", layers=6, experts=8, hidden=2048, ff=4096)
SMALL = Model("5 MB", layers=3, experts=96, hidden=2048, ff=416)


class Content:
    """The bytes of tensor i of a checkpoint: a window of one random array; no two tensors begin at the same offset."""

    def __init__(self, largest: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._base = torch.randint(-(2**15), 2**15, (largest + 4096,), dtype=torch.int16, generator=generator)

    def of(self, i: int, shape: tuple[int, int]) -> torch.Tensor:
        start = i * 37 % 4096
        values = self._base[start : start + shape[0] * shape[1]].clone()
        values[0] = i
        return values.view(torch.bfloat16).view(shape)


def write(model: Model, folder: Path, content: Content) -> None:
    """Write the checkpoint. Shards are cut at SHARD_BYTES, wherever that falls, as in published checkpoints."""
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    used = number = 0

    def finish() -> None:
        nonlocal shard, used, number
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard, used, number = {}, 0, number + 1

    for i, (name, shape) in enumerate(model.tensors()):
        nbytes = 2 * shape[0] * shape[1]
        if used + nbytes > SHARD_BYTES:
            finish()
        shard[name] = content.of(i, shape)
        used += nbytes
    finish()
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


class Pass(NamedTuple):
    """One measurement, or the sum of several."""

    gigabytes: float
    wall_s: float
    cpu_s: float

    @property
    def rate(self) -> float:
        return self.gigabytes / self.wall_s


def _sum(passes: list[Pass]) -> Pass:
    return Pass(*(sum(column) for column in zip(*passes, strict=True)))


def drop_cache(checkpoint: Checkpoint) -> None:
    for path in checkpoint.shards:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # a page that is not written yet is not dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(work: Callable[[int], int]) -> Pass:
    """Run `work(thread) -> bytes read` on THREADS threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(time.sleep, [0.001] * THREADS))  # threads exist before the clock runs
        cpu, began = time.process_time(), time.perf_counter()
        gigabytes = sum(pool.map(work, range(THREADS))) / 1e9
        return Pass(gigabytes, time.perf_counter() - began, time.process_time() - cpu)


def experts_at_random(store: ExpertStore, keys: list[ExpertKey], buffers: HostBuffers) -> Pass:
    """Read every expert once, in random order. Only the experts' own bytes count."""
    turn = iter(random.sample(keys, len(keys)))

    def work(thread: int) -> int:
        done = 0
        for key in turn:
            store.read_into(key, buffers.memory(thread))
            done += store.record(key).nbytes
        return done

    return timed(work)


def files_in_order(checkpoint: Checkpoint, buffers: HostBuffers) -> Pass:
    """The control: read the same files from end to end."""
    descriptors = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in checkpoint.shards]
    sizes = [path.stat().st_size for path in checkpoint.shards]
    turn = iter(
        [(d, offset) for d, size in zip(descriptors, sizes, strict=True) for offset in range(0, size, REQUEST_BYTES)]
    )

    def work(thread: int) -> int:
        request = buffers.memory(thread)[:REQUEST_BYTES]
        return sum(os.preadv(descriptor, [request], offset) for descriptor, offset in turn)

    try:
        return timed(work)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def verify(model: Model, store: ExpertStore, buffers: HostBuffers, content: Content) -> None:
    number = {name: i for i, (name, _) in enumerate(model.tensors())}
    for key in random.sample(model.expert_keys(), VERIFIED_EXPERTS):
        store.read_into(key, buffers.memory(0))
        parts = zip(store.record(key).segments, store.segments(key, buffers.tensor(0)), strict=True)
        for segment, raw in parts:
            expected = content.of(number[segment.name], (segment.shape[0], segment.shape[1]))
            if not torch.equal(raw, expected.view(torch.uint8).view(-1)):
                sys.exit(f"read.py: bytes of {segment.name} are not those that were written")


def measure(model: Model, folder: Path, seconds: float) -> tuple[float, list[float]]:
    """The median paired ratio, and the control's GB/s in every round."""
    folder.mkdir()
    content = Content(max(shape[0] * shape[1] for _, shape in model.tensors()))
    write(model, folder, content)
    checkpoint = Checkpoint.open(folder)
    records = {
        key: ExpertRecord(tuple(checkpoint.segment(_expert_tensor(key, part)) for part in ("w1", "w2", "w3")))
        for key in model.expert_keys()
    }
    store = ExpertStore(checkpoint.shards, records)
    buffers = HostBuffers(THREADS, max(store.buffer_bytes, REQUEST_BYTES))
    cut = sum(len({segment.shard for segment in record.segments}) > 1 for record in records.values())
    print(
        f"{model.name} experts: {len(records)} of {model.expert_bytes / 1e6:.1f} MB "
        f"in {len(checkpoint.shards)} shards, {cut} cut by a shard's end"
    )
    print("  round   experts GB/s   control GB/s   ratio   CPU s/GB experts  control")
    ratios: list[float] = []
    limits: list[float] = []
    deadline = time.perf_counter() + seconds
    try:
        while time.perf_counter() < deadline or len(ratios) < MIN_ROUNDS:
            runs: dict[str, list[Pass]] = {"experts": [], "control": []}
            for which in ("experts", "control", "control", "experts"):
                drop_cache(checkpoint)
                if which == "experts":
                    runs[which].append(experts_at_random(store, list(records), buffers))
                else:
                    runs[which].append(files_in_order(checkpoint, buffers))
            ours, control = _sum(runs["experts"]), _sum(runs["control"])
            limits.append(control.rate)
            ratios.append(ours.rate / control.rate)
            print(
                f"  {len(ratios):5d}   {ours.rate:12.2f}   {control.rate:12.2f}   {ratios[-1]:5.2f}"
                f"   {ours.cpu_s / ours.gigabytes:16.3f}  {control.cpu_s / control.gigabytes:7.3f}"
            )
        verify(model, store, buffers, content)
    finally:
        store.close()
        buffers.close()
        shutil.rmtree(folder)
    print(
        f"  median ratio {statistics.median(ratios):.3f} of {len(ratios)} rounds; {VERIFIED_EXPERTS} experts verified"
    )
    return statistics.median(ratios), limits


def _expert_tensor(key: ExpertKey, part: str) -> str:
    return f"model.layers.{key.layer}.block_sparse_moe.experts.{key.expert}.{part}.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description="Cold reads of whole experts against the disk's own limit.")
    parser.add_argument(
        "--dir", type=Path, default=Path.cwd(), help="where to write up to 2.5 GB for a minute (default: here)"
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="of measuring per expert size (default: 40)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    if not hasattr(os, "O_DIRECT"):
        sys.exit("read.py: this platform has no O_DIRECT, so there is no limit to compare with; run it on Linux")
    if not arguments.dir.is_dir():
        sys.exit(f"read.py: {arguments.dir} is not a folder; give an existing one as --dir")
    needed = max(BIG.nbytes, SMALL.nbytes) + SPARE_BYTES
    free = shutil.disk_usage(arguments.dir).free
    if free < needed:
        sys.exit(
            f"read.py: {arguments.dir} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed; "
            "give another --dir"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the files are removed
    with tempfile.TemporaryDirectory(prefix="offmoe-read-", dir=arguments.dir) as folder:
        big, big_limits = measure(BIG, Path(folder, "big"), arguments.seconds)
        small, small_limits = measure(SMALL, Path(folder, "small"), arguments.seconds)
    limit = statistics.median(big_limits + small_limits)
    print(f"limit (control) {limit:.2f} GB/s; target: both ratios at least 0.90")
    if arguments.json:
        print(
            json.dumps(
                {"cold_ratio_50mb": round(big, 3), "cold_ratio_5mb": round(small, 3), "limit_gb_s": round(limit, 3)}
            )
        )


if __name__ == "__main__":
    main()
