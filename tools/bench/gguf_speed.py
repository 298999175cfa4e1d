"""Measures what the CPU does with GGUF's blocks, in ratios of one run.

kernels: one token through experts whose slots hold the type's codes in tiles; bytes of the slot per second, relative
to a probe that only reads memory with as many threads, in turns. Experts are cold, in huge pages as in offmoe's slots;
they are Mixtral's (4096 x 14336) and Qwen3-30B-A3B's (2048 x 768).

tiles: bytes of blocks per second that one thread puts into tiles. decoded: that one thread decodes into bf16. Matrices
are 768 x 2048, so blocks and results stay in the second and third cache; the relative figure is a copy of as many bytes
with torch.

Times are CPU times of all threads, so a thread that waits for the other counts only while it spins. The figure is the
median of the rounds, with quartiles. With --json, one last line has all figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import checkout  # noqa: F401
import torch

from offmoe.compute.kernels.cpu import CpuKernels, Glu
from offmoe.compute.kernels.gguf import GgufDecoder, retiling
from offmoe.compute.kernels.library import Library, status
from offmoe.compute.kernels.place import carry_out
from offmoe.device.cores import usable_cores
from offmoe.quant.gguf_formats import BLOCKS, GgufBlocks
from offmoe.quant.kernel_words import GGUF_FORMATS
from offmoe.quant.packed_weight import PackedWeight, WeightFormat
from offmoe.storage.gguf_types import BLOCK_TYPES
from offmoe.storage.layout import ExpertLayout
from tools.bench.kernels import MIXTRAL, QWEN3, Probe, against_probe, packed_experts, rounds
from tools.bench.kernels import seconds as cpu_s

TYPES = {block.name: number for number, block in BLOCK_TYPES.items()}
ROWS, COLS = 768, 2048
HALVES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()},
}
"""By type, the bytes at which a block has a float16; byte 0 of others."""
REPEATS = 20


def gb_s(nbytes: int, work: Callable[[], object], seconds: float) -> list[float]:
    def repeated() -> None:
        for _ in range(REPEATS):
            work()

    work()
    return [nbytes * REPEATS / cpu_s(repeated, time.process_time) / 1e9 for _ in rounds(seconds)]


def random_blocks(number: int) -> torch.Tensor:
    """Blocks of random bits with finite scales, as models have them: others are left to slower code."""
    block = BLOCK_TYPES[number]
    generator = torch.Generator().manual_seed(number)
    shape = (ROWS * COLS // block.values, block.nbytes)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    for at in HALVES.get(block.name, (0,)):
        blocks[:, at + 1] &= 0xBF  # the highest bit of the exponent
    return blocks.view(ROWS, -1)


def empty_tiles(how: WeightFormat) -> PackedWeight:
    layout = ExpertLayout.of(how.params("", ROWS, COLS, tiled=True))
    return PackedWeight.of(how, "", layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8)))


class Figures:
    """Prints a line per figure, and keeps it."""

    def __init__(self) -> None:
        self.by_name: dict[str, float] = {}

    def add(self, name: str, rounds: list[float]) -> None:
        low, middle, high = statistics.quantiles(rounds, n=4)
        self.by_name[name] = round(middle, 3)
        print(f"{name:36} {middle:7.2f}  {low:.2f} to {high:.2f}   {len(rounds):4d}", flush=True)


def measure_kernels(library: Library, types: list[str], seconds: float, figures: Figures) -> None:
    for shape in (MIXTRAL, QWEN3):
        x = torch.randn(1, shape.hidden, generator=torch.Generator().manual_seed(0))
        for name in types:
            experts, nbytes = packed_experts(shape, GGUF_FORMATS[TYPES[name]])
            for threads in dict.fromkeys((1, usable_cores())):
                for activations in ("float", "int8"):
                    with CpuKernels(library, threads, int8_activations=activations == "int8") as kernels:
                        runs = [kernels.expert(expert, Glu()) for expert in experts]
                        ratios = against_probe(runs, nbytes, x, Probe(kernels), seconds, time.process_time)
                    figures.add(f"{name} {shape.name} {activations} {threads} threads", ratios)
            del experts


def measure_blocks(library: Library, types: list[str], variant: str, seconds: float, figures: Figures) -> None:
    decoder = GgufDecoder(library, 1, variant)
    out = torch.empty(ROWS, COLS, dtype=torch.bfloat16)
    for name in types:
        codec, blocks = GgufBlocks(TYPES[name]), random_blocks(TYPES[name])
        copy = torch.empty_like(blocks)
        figures.add(f"{name} copied GB/s", gb_s(blocks.nbytes, lambda: copy.copy_(blocks), seconds / 4))  # noqa: B023
        if TYPES[name] in GGUF_FORMATS:
            tiles = empty_tiles(GGUF_FORMATS[TYPES[name]])
            step = retiling(codec, blocks, tiles)
            rates = gb_s(blocks.nbytes, lambda: carry_out(library, step), seconds / 2)  # noqa: B023
            figures.add(f"{name} into tiles GB/s", rates)
        rates = gb_s(blocks.nbytes, lambda: decoder(codec, {BLOCKS: blocks}, out), seconds / 2)  # noqa: B023
        figures.add(f"{name} decoded GB/s", rates)
    decoder.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="GGUF's blocks on the CPU: kernels, tiles, decoders.")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring per figure (default: 2)")
    parser.add_argument(
        "--kernels", nargs="*", default=["Q4_K", "Q6_K", "Q8_0"], metavar="TYPE", help="types to compute"
    )
    parser.add_argument("--blocks", nargs="*", default=list(TYPES), metavar="TYPE", help="types to tile and decode")
    parser.add_argument("--variant", help="of the instruction set that decodes (default: the fastest)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    found = status()
    if found.library is None:
        sys.exit(f"gguf_speed.py: {found.message}")
    torch.set_num_threads(1)
    print(f"{found.message}; load average {os.getloadavg()[0]:.1f}")
    print(f"{'':36}  median  quartiles  rounds")
    figures = Figures()
    variant = arguments.variant or found.library.variants[-1]
    measure_blocks(found.library, arguments.blocks, variant, arguments.seconds, figures)
    measure_kernels(found.library, arguments.kernels, arguments.seconds, figures)
    print("targets: Q4_K at least 0.80 (mixtral), 0.70 (qwen3); into tiles at least 2.5; Q4_K decoded at least 5")
    if arguments.json:
        print(json.dumps(figures.by_name))


if __name__ == "__main__":
    main()
