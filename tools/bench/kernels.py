"""Measures how close experts computed on the CPU come to the speed of memory: C kernels against a read probe.

The weights of one expert after the other are cold, in huge pages as in offmoe's slots. Experts are Mixtral's (4096 x
14336) and Qwen3-30B-A3B's (2048 x 768), int4 in groups of 64, fp8 in groups of 128, bf16. Rounds alternate between
experts and a probe that only reads memory. The figure is the median of the rounds' ratios, with its quartiles. One
thread is timed by its own CPU time, so that other work on the machine matters only by the memory that it uses.

shared_core_slowdown: wall time per Mixtral expert with one thread per core while another process spins on every core,
divided by the time without it, alternating. It is valid only on an otherwise idle machine.

rows_into_tiles_gb_s: int4 words of a Mixtral matrix that one core puts into tiles per second of its CPU time.

Prints a table; with --json one last line {"int4_mixtral_m1", "int4_mixtral_m4", "int4_qwen3_m1", "int4_qwen3_m4",
"bf16_mixtral_m1", "fp8_mixtral_m1", "vs_torch_int4", "shared_core_slowdown", "rows_into_tiles_gb_s"}. The exit status
is 1 without C kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import checkout  # noqa: F401
import torch
import torch.nn.functional as F

from offmoe.compute.kernels.cpu import CpuKernels, GatedExpert, Glu, Rows
from offmoe.compute.kernels.library import Library, status
from offmoe.compute.kernels.place import carry_out, tiling
from offmoe.device.arena import SlotArena
from offmoe.device.cores import usable_cores, usable_cpus
from offmoe.device.pages import map_pages
from offmoe.quant.packed_weight import TILE_ROWS, PackedWeight, WeightFormat, fp8, int4
from offmoe.storage.layout import ExpertLayout

GROUP, FP8_GROUP = 64, 128
PROBE_BYTES = 32 * 2**20
PROBE_BUFFER_BYTES = 256 * 2**20
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Shape:
    """The sizes of an expert, and a number of experts that no cache holds."""

    name: str
    hidden: int
    ff: int
    experts: int


MIXTRAL = Shape("mixtral", 4096, 14336, 2)
QWEN3 = Shape("qwen3", 2048, 768, 64)


def packed_experts(shape: Shape, how: WeightFormat) -> tuple[list[GatedExpert], int]:
    """Random experts, and the bytes of one. fp8 weights are normally distributed, with 448 at 4.5 deviations."""
    sizes = {"gate": (shape.ff, shape.hidden), "up": (shape.ff, shape.hidden), "down": (shape.hidden, shape.ff)}
    params = [how.params(name, rows, cols, tiled=True) for name, (rows, cols) in sizes.items()]
    layout = ExpertLayout.of(params[0] | params[1] | params[2])
    experts = []
    for record in _slots(layout, shape.experts):
        views = layout.views(record)
        for name, (_, cols) in sizes.items():
            if how.kind == "fp8":
                for codes in views[name].view(torch.float8_e4m3fn).split(16):  # torch's floats are 4 times as large
                    codes.copy_(torch.randn(codes.shape).mul_(100).clamp_(-448, 448))
            else:
                views[name].random_(-(2**31), 2**31 - 1)
            for plane, (dtype, _) in how.planes(cols).items():
                if dtype.is_floating_point:
                    views[name + plane].uniform_(1e-3, 2e-3)
                elif plane:
                    low, high = (-(2**31), 2**31 - 1) if dtype == torch.int32 else (0, 64)
                    views[name + plane].random_(low, high)
        gate, up, down = (PackedWeight.of(how, name, views) for name in sizes)
        experts.append(GatedExpert(gate, up, down))
    return experts, layout.nbytes


def bf16_experts(shape: Shape) -> tuple[list[GatedExpert], int]:
    sizes = {"gate_up_proj": (2 * shape.ff, shape.hidden), "down_proj": (shape.hidden, shape.ff)}
    layout = ExpertLayout.of({name: (torch.bfloat16, size) for name, size in sizes.items()})
    experts = []
    for record in _slots(layout, shape.experts):
        views = layout.views(record)
        for view in views.values():
            view.uniform_(-0.02, 0.02)
        gate, up = views["gate_up_proj"].chunk(2)
        experts.append(GatedExpert(gate, up, views["down_proj"]))
    return experts, layout.nbytes


def torch_int4_experts(shape: Shape) -> list[Rows]:
    """The same work with torch's own int4 operator, on weights in its layout."""

    def weight(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
        q = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        return packed, torch.full((cols // GROUP, rows, 2), 1e-3, dtype=torch.bfloat16)

    def expert() -> Rows:
        gate, up = weight(shape.ff, shape.hidden), weight(shape.ff, shape.hidden)
        down = weight(shape.hidden, shape.ff)

        def linear(x: torch.Tensor, w: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], GROUP, w[1])

        def run(x: torch.Tensor) -> torch.Tensor:
            x = x.bfloat16()
            return linear(F.silu(linear(x, gate)) * linear(x, up), down)

        return run

    return [expert() for _ in range(shape.experts)]


def _slots(layout: ExpertLayout, count: int) -> list[torch.Tensor]:
    arena = SlotArena(lambda nbytes: torch.frombuffer(map_pages(nbytes), dtype=torch.uint8), [layout] * count)
    return [arena.bytes(i) for i in range(count)]


class Probe:
    """Reads memory that no cache holds; every call moves on by one window."""

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels, self._start = kernels, 0
        self._memory = torch.frombuffer(map_pages(PROBE_BUFFER_BYTES), dtype=torch.uint8).fill_(1)

    def __call__(self) -> None:
        self._kernels.read(self._memory[self._start : self._start + PROBE_BYTES])
        self._start = (self._start + PROBE_BYTES) % PROBE_BUFFER_BYTES


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    work()
    return clock() - began


def rounds(budget_s: float) -> Iterator[None]:
    """MIN_ROUNDS rounds, and more for so many seconds."""
    end, done = time.perf_counter() + budget_s, 0
    while done < MIN_ROUNDS or time.perf_counter() < end:
        yield
        done += 1


def against_probe(
    runs: list[Rows],
    nbytes: int,
    x: torch.Tensor,
    probe: Probe,
    budget_s: float,
    clock: Callable[[], float] = time.thread_time,
) -> list[float]:
    """For each round: bytes per CPU second of experts, relative to the probe before and after them.

    clock: CPU seconds, of this thread or of all.
    """
    ratios: list[float] = []
    runs[0](x)
    for _ in rounds(budget_s):
        reads = seconds(probe, clock)
        ours = sum(seconds(lambda run=run: run(x), clock) for run in runs)  # type: ignore[misc]
        reads += seconds(probe, clock)
        ratios.append(nbytes * len(runs) / ours / (2 * PROBE_BYTES / reads))
    return ratios


def against_torch(runs: list[Rows], theirs: list[Rows], x: torch.Tensor, budget_s: float) -> list[float]:
    """For each round: CPU seconds of torch's experts relative to ours, on the same tokens."""
    ratios: list[float] = []
    runs[0](x), theirs[0](x)
    for _ in rounds(budget_s):
        ours = sum(seconds(lambda run=run: run(x), time.thread_time) for run in runs)  # type: ignore[misc]
        other = sum(seconds(lambda run=run: run(x), time.thread_time) for run in theirs)  # type: ignore[misc]
        ratios.append(other / ours)
    return ratios


def tiles_gb_s(library: Library, budget_s: float) -> list[float]:
    """For each round: GB per CPU second of int4 words of a Mixtral matrix, from rows into tiles that are in memory."""
    rows = torch.randint(-(2**31), 2**31 - 1, (MIXTRAL.ff, MIXTRAL.hidden // 8), dtype=torch.int32)
    tiles = torch.zeros(MIXTRAL.ff // TILE_ROWS, MIXTRAL.hidden // 8, TILE_ROWS, dtype=torch.int32)
    step = tiling(rows, tiles)
    assert step is not None
    return [rows.nbytes / 1e9 / seconds(lambda: carry_out(library, step), time.thread_time) for _ in rounds(budget_s)]


@contextmanager
def busy_cores() -> Iterator[None]:
    """Another process spins on every core."""
    cores = usable_cpus()
    spin = "import sys\nprint(flush=True)\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) for _ in range(cores)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it spins
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def shared_cores(runs: list[Rows], x: torch.Tensor, budget_s: float) -> list[float]:
    """For each round: wall time per expert with spinning processes, relative to without them."""
    ratios: list[float] = []
    end = time.perf_counter() + budget_s

    def mean_s() -> float:
        began, n = time.perf_counter(), 0
        while n < 2 * len(runs) or time.perf_counter() - began < 1.0:  # many of the scheduler's time slices
            runs[n % len(runs)](x)
            n += 1
        return (time.perf_counter() - began) / n

    while len(ratios) < 3 or time.perf_counter() < end:
        alone = mean_s()
        with busy_cores():
            shared = mean_s()
        ratios.append(2 * shared / (alone + mean_s()))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description="Experts on the CPU against the bandwidth of the memory.")
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring per figure (default: 6)")
    parser.add_argument("--variant", help="of the kernels (default: the fastest here)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    found = status()
    if found.library is None:
        sys.exit(f"kernels.py: {found.message}")
    torch.set_num_threads(1)
    print(f"{found.message}; one thread, CPU time; load average {os.getloadavg()[0]:.1f}")
    print("                     ratio  quartiles      rounds")
    results: dict[str, float] = {}

    def report(name: str, ratios: list[float]) -> None:
        low, middle, high = statistics.quantiles(ratios, n=4)
        results[name] = round(middle, 3)
        print(f"{name:20} {middle:6.2f}  {low:.2f} to {high:.2f}   {len(ratios):6d}", flush=True)

    report("rows_into_tiles_gb_s", tiles_gb_s(found.library, arguments.seconds))
    generator = torch.Generator().manual_seed(0)
    with CpuKernels(found.library, 1, arguments.variant) as kernels:
        probe = Probe(kernels)
        for shape in (MIXTRAL, QWEN3):
            experts, nbytes = packed_experts(shape, int4(GROUP))
            runs = [kernels.expert(expert, Glu()) for expert in experts]
            for tokens in (1, 4):
                x = torch.randn(tokens, shape.hidden, generator=generator)
                report(f"int4_{shape.name}_m{tokens}", against_probe(runs, nbytes, x, probe, arguments.seconds))
        experts, nbytes = bf16_experts(MIXTRAL)
        runs = [kernels.expert(expert, Glu()) for expert in experts]
        x = torch.randn(1, MIXTRAL.hidden, generator=generator)
        report("bf16_mixtral_m1", against_probe(runs, nbytes, x, probe, arguments.seconds))
        del experts, runs
        experts, nbytes = packed_experts(MIXTRAL, fp8(FP8_GROUP))
        runs = [kernels.expert(expert, Glu()) for expert in experts]
        report("fp8_mixtral_m1", against_probe(runs, nbytes, x, probe, arguments.seconds))
        del experts, runs
        experts, _ = packed_experts(MIXTRAL, int4(GROUP))
        runs = [kernels.expert(expert, Glu()) for expert in experts]
        report("vs_torch_int4", against_torch(runs, torch_int4_experts(MIXTRAL), x, arguments.seconds))
    with CpuKernels(found.library, usable_cores(), arguments.variant) as kernels:
        runs = [kernels.expert(expert, Glu()) for expert in experts]
        report("shared_core_slowdown", shared_cores(runs, x, 2 * arguments.seconds))
    print(
        "targets: int4 m1 at least 0.88 (mixtral), 0.75 (qwen3); m4 at least 0.65, 0.40; bf16 at least 0.75; "
        "torch at least 1.5; shared at most 2.5; tiles at least 6 GB/s"
    )
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
