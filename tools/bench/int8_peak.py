#!/usr/bin/env python3
"""Measures the C kernels on many tokens against what the processor's units for int8 products give.

A few lines of C, compiled for this processor, multiply registers with each other and nothing else: `vpdpbusd` where
there is one, else `vpmaddubsw` and what adds up its results. Rounds alternate between that, with one thread per core,
and one expert on all of its tokens with int8 activations. Prints billions of products per second and their ratio,
medians and ranges; --json one object as the last line. Needs a C compiler and an x86-64 processor with AVX2.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkout  # noqa: F401
import torch

from offmoe.compute.kernels.cpu import CpuKernels, Glu, Rows
from offmoe.compute.kernels.library import status
from offmoe.compute.kernels.native.build import find_compiler
from offmoe.device.cores import usable_cores
from offmoe.quant.packed_weight import INT8, int4
from tools.bench.figures import spread
from tools.bench.kernels import MIXTRAL, QWEN3, packed_experts

PASSES = 20_000_000
"""Of the loop per call: some 50 ms."""
SOURCE = """
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#define SUMS 12
#if defined(__AVX512VNNI__)
enum { PRODUCTS = 64 };
typedef __m512i lanes;
#define SET(x) _mm512_set1_epi32(x)
#define DOT(sum, a, b) _mm512_dpbusd_epi32(sum, a, b)
#else
enum { PRODUCTS = 32 };
typedef __m256i lanes;
#define SET(x) _mm256_set1_epi32(x)
#if defined(__AVXVNNI__)
#define DOT(sum, a, b) _mm256_dpbusd_avx_epi32(sum, a, b)
#else
#define DOT(sum, a, b) _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b))
#endif
#endif
int64_t products(int64_t passes, int32_t seed, int32_t *out) {
    lanes sums[SUMS], a = SET(seed), b = SET(seed + 1);
    for (int i = 0; i < SUMS; i++) sums[i] = SET(i);
    for (int64_t n = 0; n < passes; n++) {
        __asm__ volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 12
        for (int i = 0; i < SUMS; i++) sums[i] = DOT(sums[i], a, b);
    }
    memcpy(out, sums, sizeof sums); /* so that they count for something */
    return passes * SUMS * PRODUCTS;
}
"""


def compiled(folder: Path) -> Callable[[], int]:
    """A function that multiplies in the calling thread, and gives the number of products."""
    compiler = find_compiler()
    if compiler is None:
        sys.exit("int8_peak.py: there is no C compiler")
    source, library = folder / "peak.c", folder / "peak.so"
    source.write_text(SOURCE)
    subprocess.run([compiler, "-O2", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).products
    function.argtypes, function.restype = (ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p), ctypes.c_int64
    return lambda: int(function(PASSES, 3, ctypes.byref((ctypes.c_int32 * 16 * 12)())))


def per_s(work: Callable[[], float]) -> float:
    """Billions of what `work` counts, per second."""
    began = time.perf_counter()
    return work() / 1e9 / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, action="append", help="of a call; may be repeated (default: 16 and 64)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    library, threads = status().library, usable_cores()
    if library is None:
        sys.exit(f"int8_peak.py: {status().message}")
    found: dict[str, object] = {}
    with (
        tempfile.TemporaryDirectory(prefix="offmoe-peak-") as folder,
        ThreadPoolExecutor(threads) as pool,
        CpuKernels(library, threads) as kernels,
        torch.inference_mode(),
    ):
        one = compiled(Path(folder))

        def peak() -> float:
            return sum(future.result() for future in [pool.submit(one) for _ in range(threads)])

        for shape, how in ((MIXTRAL, int4(32)), (MIXTRAL, int4(128)), (MIXTRAL, INT8), (QWEN3, int4(32))):
            weights = packed_experts(shape, how)[0][0]
            expert = kernels.expert(weights, Glu())
            for tokens in args.tokens or (16, 64):
                x, products = torch.randn(tokens, shape.hidden), 3.0 * shape.hidden * shape.ff * tokens

                def run(x: torch.Tensor = x, products: float = products, expert: Rows = expert) -> float:
                    expert(x)
                    return products

                run()
                rates = [(per_s(peak), per_s(run)) for _ in range(args.rounds)]
                name = f"{shape.name}, {how.kind} in groups of {how.group or 'a row'}, {tokens} tokens"
                figures = {
                    "peak": spread([of for of, _ in rates]),
                    "kernels": spread([rate for _, rate in rates]),
                    "ratio": spread([rate / of for of, rate in rates]),
                }
                found[name] = figures
                print(name, *(f"{key} {value}" for key, value in figures.items()), sep="\n  ")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
