"""Measures how fast experts of a GGUF file get from the disk into slots for the C kernels, against the disk's own rate.

Every expert is read in random order and put into tiles, by 4 threads with a buffer and a slot each: while one tiles,
the others read. A second pass reads them only, so the difference is what tiles cost. The control reads the same file
from end to end with O_DIRECT, in large requests, with as many threads. Each round runs experts, reads, control,
control, reads, experts, with the page cache dropped before each. Prints per round the rates and their ratios to the
control's, and the bytes that experts take of the file's; --json prints one object as the last line. Without a file, one
is written into --dir (`gguf_model.py`) and removed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import checkout  # noqa: F401
import torch

from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.device.backend import copy_in_ram
from offmoe.device.host_buffers import HostBuffers
from offmoe.hf.catalog.catalog import CatalogLayer
from offmoe.storage.store import ExpertStore
from offmoe.types import ExpertKey
from tools.bench.gguf_model import write_model
from tools.bench.read import MIN_ROUNDS, REQUEST_BYTES, THREADS, Pass, drop_cache, files_in_order, timed

Layers = tuple[CatalogLayer, ...]


def read_experts(store: ExpertStore, layers: Layers, buffers: HostBuffers, slots: HostBuffers | None) -> Pass:
    """Read every expert once, in random order. Only the experts' own bytes count.

    Args:
        store: the experts.
        layers: by `ExpertKey.layer`.
        buffers: one per thread to read into.
        slots: one per thread to put tiles into; None: experts are read only.
    """
    keys = expert_keys(layers)
    turn = iter(random.sample(keys, len(keys)))

    def work(thread: int) -> int:
        done = 0
        views: dict[int, dict[str, torch.Tensor]] = {}  # of the thread's slot, by layer, as the runtime keeps them
        for key in turn:
            store.read_into(key, buffers.memory(thread))
            done += store.record(key).nbytes
            if slots is None:
                continue
            slot, segments = layers[key.layer].cpu_slot, store.record(key).segments
            assert slot is not None
            if key.layer not in views:
                views[key.layer] = slot.layout.views(slots.tensor(thread)[: slot.layout.nbytes])
            data = store.segments(key, buffers.tensor(thread))
            slot.assembly.place(segments, data, views[key.layer], copy_in_ram)
        return done

    return timed(work)


def expert_keys(layers: Layers) -> list[ExpertKey]:
    return [ExpertKey(i, expert) for i, layer in enumerate(layers) for expert in range(layer.num_experts)]


def measure(file: Path, seconds: float) -> dict[str, float]:
    """The figures by name."""
    inspected = inspect(file, OffloadConfig(device="cpu", exactness="numeric"))
    layers, checkpoint = inspected.catalog.layers, inspected.checkpoint
    if any(layer.cpu_slot is None for layer in layers):
        sys.exit(f"gguf_read.py: {next(layer.without_kernel for layer in layers if layer.cpu_slot is None)}")
    largest = max(layer.cpu_slot.layout.nbytes for layer in layers if layer.cpu_slot is not None)
    rates: dict[str, list[float]] = {"experts": [], "reads": [], "control": []}
    with closing(ExpertStore(checkpoint.shards, inspected.catalog.records)) as store:
        buffers = HostBuffers(THREADS, max(store.buffer_bytes, REQUEST_BYTES))
        with closing(buffers), closing(HostBuffers(THREADS, largest)) as slots:
            passes: dict[str, Callable[[], Pass]] = {
                "experts": lambda: read_experts(store, layers, buffers, slots),
                "reads": lambda: read_experts(store, layers, buffers, None),
                "control": lambda: files_in_order(checkpoint, buffers),
            }
            print("experts into slots GB/s   ratio   read only GB/s   ratio   control GB/s")
            deadline = time.perf_counter() + seconds
            while time.perf_counter() < deadline or len(rates["control"]) < MIN_ROUNDS:
                runs: dict[str, list[Pass]] = {which: [] for which in passes}
                for which in (*passes, *reversed(passes)):
                    drop_cache(checkpoint)
                    runs[which].append(passes[which]())
                for which, done in runs.items():
                    rates[which].append(sum(run.gigabytes for run in done) / sum(run.wall_s for run in done))
                ours, read, control = (rates[which][-1] for which in passes)
                print(
                    f"{ours:23.2f}   {ours / control:5.3f}   {read:14.2f}   {read / control:5.3f}   {control:12.2f}",
                    flush=True,
                )
        windows = sum(store.read_bytes(key) for key in expert_keys(layers))
    own = sum(record.nbytes for record in inspected.catalog.records.values())

    def ratio(which: str) -> float:
        pairs = zip(rates[which], rates["control"], strict=True)
        return round(statistics.median(mine / control for mine, control in pairs), 3)

    return {
        "ratio": ratio("experts"),
        "read_ratio": ratio("reads"),
        **{f"{which}_gb_s": round(statistics.median(each), 3) for which, each in rates.items()},
        "read_per_expert_byte": round(windows / own, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Cold reads of a GGUF file's experts into slots, against the disk.")
    parser.add_argument("file", type=Path, nargs="?", help="a GGUF model (default: a random one of 1.4 GB)")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="where to write it (default: here)")
    parser.add_argument("--layers", type=int, default=4, help="of the random model")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring (default: 60)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="offmoe-gguf-", dir=arguments.dir) as folder:
        file = arguments.file
        if file is None:
            write_model(file := Path(folder, "model.gguf"), arguments.layers)
        figures = measure(file, arguments.seconds)
    print(f"{figures}; targets: ratio at least 0.95, bytes read at most 1.01 of the experts'")
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
