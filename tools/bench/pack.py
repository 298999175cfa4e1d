"""Measures how close `offmoe pack` comes to its limit: the disk's reads and writes, or the quantizer.

A synthetic bf16 checkpoint with Mixtral's names (2.1 GB, experts of 50 MB) is read cold. Its int4 copy is written,
synced and read back. Two limits are measured in every round, before and after the run. The disk's limit is the time to
read as many bytes of the same shards (with O_DIRECT, or buffered if that is slower), to write as many as the copy has
and to read these back. The quantizer's limit is the time of all cores on matrices in memory, for all bytes of experts.
The larger time is the limit. The figure is its ratio to the time of the run, as a median over rounds.

Prints a table; with --json one last line {"pack_mb_s", "disk_mb_s", "quantizer_mb_s", "binds", "ratio"}, in MB of bf16
input per second. The exit status is 1 if there is no room, or the ratio is below 0.5.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import checkout  # noqa: F401
import torch

from offmoe.device.cores import usable_cores
from offmoe.device.host_buffers import HostBuffers
from offmoe.measure.probes import drop_page_cache
from offmoe.pack.pack import pack, weight_format
from offmoe.pack.quantizer import quantizer
from tools.bench.synthetic import write_mixtral

HIDDEN, FF, LAYERS, EXPERTS = 2048, 4096, 5, 8
REQUEST_BYTES = 16 << 20
AT_LEAST = 0.5
SHARD_BYTES = 1 << 26
"""The copy has 0.6 GB. Shards of the usual size would be only two, too few to be written at the same time."""


class Round(NamedTuple):
    """Seconds of one run, and of each limit."""

    run: float
    disk: float
    quantizer: float

    @property
    def ratio(self) -> float:
        return max(self.disk, self.quantizer) / self.run


def read_s(files: list[Path], direct: bool) -> float:
    """Seconds to read files from end to end, cold."""
    drop_page_cache(files)
    buffers = HostBuffers(1, REQUEST_BYTES)
    flags = os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if direct else 0)
    began = time.perf_counter()
    for path in files:
        descriptor = os.open(path, flags)
        while os.readv(descriptor, [buffers.memory(0)]) == REQUEST_BYTES:
            pass
        os.close(descriptor)
    took = time.perf_counter() - began
    buffers.close()
    return took


def write_s(path: Path, nbytes: int) -> float:
    block = memoryview(os.urandom(REQUEST_BYTES))
    began = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for start in range(0, nbytes, REQUEST_BYTES):
            file.write(block[: min(REQUEST_BYTES, nbytes - start)])
        os.fsync(file.fileno())
    return time.perf_counter() - began


def disk_s(source: list[Path], scratch: Path, copied: int) -> float:
    """Seconds that the disk needs for a run that only reads and writes."""
    reads = min(read_s(source, direct) for direct in (True, False))
    writes = write_s(scratch, copied)
    back = min(read_s([scratch], direct) for direct in (True, False))
    scratch.unlink()
    return reads + writes + back


def quantizer_s(nbytes: int, cores: int) -> float:
    """Seconds that the quantizer needs for experts of `nbytes` bytes in memory."""
    matrix = (torch.randn(FF, HIDDEN) * HIDDEN**-0.5).bfloat16()
    how, times = weight_format("int4"), []
    with quantizer(cores) as quantize:
        for _ in range(9):
            began = time.perf_counter()
            quantize(matrix, how)
            times.append(time.perf_counter() - began)
    return statistics.median(times) / matrix.nbytes * nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description="offmoe pack against what the disk and the quantizer allow.")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    experts = 3 * 2 * HIDDEN * FF * LAYERS * EXPERTS
    if shutil.disk_usage(arguments.folder).free < 3 * experts:
        sys.exit(f"pack.py: {arguments.folder} has not the {3 * experts / 1e9:.1f} GB that are needed")
    cores, rounds = usable_cores(), []
    with tempfile.TemporaryDirectory(prefix="offmoe-bench-", dir=arguments.folder) as folder:
        model, out, scratch = Path(folder, "model"), Path(folder, "out"), Path(folder, "scratch")
        write_mixtral(model, HIDDEN, FF, layers=LAYERS, experts=EXPERTS, top_k=2, vocabulary=4096)
        source = sorted(model.glob("*.safetensors"))
        copied = experts * 265 // 1000  # 4 bits and a sixteen-bit scale for 64 of them, of 16
        print(f"{cores} cores, load average {os.getloadavg()[0]:.1f}; seconds")
        print("    run   disk   quantizer   ratio", flush=True)
        bytes_in = 0
        for _ in range(arguments.rounds):
            before = disk_s(source, scratch, copied), quantizer_s(experts, cores)
            drop_page_cache(source)
            began = time.perf_counter()
            bytes_in = pack(model, out, weight_format("int4"), shard_bytes=SHARD_BYTES).bytes_in
            run = time.perf_counter() - began
            shutil.rmtree(out)
            after = disk_s(source, scratch, copied), quantizer_s(experts, cores)
            rounds.append(Round(run, *((a + b) / 2 for a, b in zip(before, after, strict=True))))
            last = rounds[-1]
            print(f"{last.run:7.2f} {last.disk:6.2f} {last.quantizer:11.2f} {last.ratio:7.2f}", flush=True)
    run, disk, computing = (statistics.median(values) for values in zip(*rounds, strict=True))
    found = {
        "pack_mb_s": round(bytes_in / run / 1e6),
        "disk_mb_s": round(bytes_in / disk / 1e6),
        "quantizer_mb_s": round(bytes_in / computing / 1e6),
        "binds": "disk" if disk > computing else "quantizer",
        "ratio": round(statistics.median(one.ratio for one in rounds), 3),
    }
    print(f"the {found['binds']} binds; ratio {found['ratio']}, asked: at least {AT_LEAST}")
    if arguments.json:
        print(json.dumps(found))
    if found["ratio"] < AT_LEAST:
        sys.exit("pack.py: slower than asked")


if __name__ == "__main__":
    main()
