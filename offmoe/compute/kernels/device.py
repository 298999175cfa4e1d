"""Experts of one layer computed on a GPU from their slots: which kernel, on which blocks; Triton is imported here only.

What moves: a few hundred bytes to the device (where each expert's slot starts, and for many tokens which of them are
whose); the rest moves in the kernels. Few tokens go to `decode`, which memory bounds, many to `grouped`, which tensor
cores do; the number in between, and the sizes of blocks, were reasoned from published figures of GPUs. **None of this
has run on a GPU**: it was checked in Triton's interpreter and compiled for sm_80 and sm_90 (docs/measurements.md).

Numbers are those of `exactness="numeric"`: sums run in another order than torch's. What it must never do: read a slot
that it was not given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch

from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.operands import GatedOperands, Operand
from offmoe.errors import UnsupportedModelError
from offmoe.storage.layout import PARAM_ALIGNMENT

DECODE_PAIRS = 16
"""(token, expert) pairs up to which every pair reads its expert for itself: few share an expert, and the L2 cache
catches those that do. Reasoned, not measured; tools/gpu_check times both kernels on either side of it."""

STEP = {"int32": 32, "uint8": 128, "bf16": 256, "fp16": 256, "fp32": 128}
"""Elements of a row that a program of `decode` takes at a time: whole cache lines; of FP8, one block of scales."""

FULL_GRID = 512
"""Programs that keep 132 multiprocessors busy and the memory's queue full: four of 128 threads each. Not measured."""

COMPILER = {"num_warps": 4, "enable_fp_fusion": True}
"""Multiply and add in one instruction is half of what decoding computes; Triton 3.10 will not do it unasked."""

Launch = Callable[[Any, tuple[int, int], tuple[object, ...], Mapping[str, int]], object]
"""launch(kernel, grid, arguments, options): how a kernel is started; tests compile or count instead."""


class Pairs(NamedTuple):
    """(token, expert) pairs of some experts, one expert's after the other's. slots, counts: of each expert, where it is
    and how many pairs it has. order: int64 [n] on the device, pair i has row order[i] // sharing of the inputs; None:
    every expert has one pair, and there is one input.
    """

    slots: Sequence[int]
    counts: Sequence[int]
    order: torch.Tensor | None = None
    sharing: int = 1


class DeviceKernels:
    """Computes experts of layers that have the same operands, in slots of one allocation."""

    def __init__(
        self,
        operands: GatedOperands,
        glu: Glu,
        memory: torch.Tensor,
        starts: Sequence[int],
        full_grid: int = FULL_GRID,
        launch: Launch | None = None,
    ) -> None:
        """Prepare; nothing is compiled before the first call.

        memory: uint8, aligned to PARAM_ALIGNMENT, on the device. starts: where each slot begins in it, in bytes.
        full_grid: programs that a launch should have at least. UnsupportedModelError without Triton.
        """
        if not available():
            raise UnsupportedModelError(
                "the GPU kernels need Triton, which is not installed; install it, or use exactness='bitwise'"
            )
        assert memory.dtype == torch.uint8
        assert all(start % PARAM_ALIGNMENT == 0 for start in starts)
        self._operands, self._glu, self._memory = operands, glu, memory
        self._starts = [start // PARAM_ALIGNMENT for start in starts]
        self._full_grid, self._launch = full_grid, launch or _launch
        self._decode, self._grouped = _modules()

    def compute(self, pairs: Pairs, hidden: torch.Tensor) -> torch.Tensor:
        """Experts on their inputs: hidden [m, H] -> rows [n, H] in the order of `pairs`, unweighted, of its dtype."""
        assert hidden.dtype in (torch.bfloat16, torch.float16, torch.float32), hidden.dtype
        assert hidden.shape[1] == self._operands.hidden, hidden.shape
        hidden = hidden.contiguous()
        with torch.accelerator.device_index(hidden.device.index):  # kernels start on the current device
            if sum(pairs.counts) == 0:
                return hidden.new_empty(0, hidden.shape[1])
            if pairs.order is None or sum(pairs.counts) <= DECODE_PAIRS:
                return self.by_pair(pairs, hidden)
            return self.by_group(pairs, hidden)

    def by_pair(self, pairs: Pairs, hidden: torch.Tensor) -> torch.Tensor:
        """`compute` by the kernels for few tokens."""
        n, o = sum(pairs.counts), self._operands
        starts = [
            self._starts[slot] for slot, count in zip(pairs.slots, pairs.counts, strict=True) for _ in range(count)
        ]
        places = torch.tensor(starts, dtype=torch.int32).to(hidden.device)
        h = torch.empty(n, o.inner, dtype=torch.float32, device=hidden.device)
        out = hidden.new_empty(n, o.hidden)
        sizes = decode_blocks(o.gate, n, self._full_grid)
        up = self._memory, places, pairs.order, hidden, h, pairs.sharing, o.gate, o.up, self._glu
        self._launch(self._decode.gate_up_rows, (n, -(-o.inner // sizes["BN"])), up, sizes)
        sizes = decode_blocks(o.down, n, self._full_grid)
        self._launch(
            self._decode.down_rows, (n, -(-o.hidden // sizes["BN"])), (self._memory, places, h, out, o.down), sizes
        )
        return out

    def by_group(self, pairs: Pairs, hidden: torch.Tensor) -> torch.Tensor:
        """`compute` by the kernels for many tokens."""
        assert pairs.order is not None
        n, o = sum(pairs.counts), self._operands
        tokens = group_tokens(n / len(pairs.counts))
        table, end = [], 0
        for slot, count in zip(pairs.slots, pairs.counts, strict=True):
            first, end = end, end + count
            table += [(self._starts[slot], start, end) for start in range(first, end, tokens)]
        blocks = torch.tensor(table, dtype=torch.int32).to(hidden.device)
        h = hidden.new_empty(n, o.inner)
        out = hidden.new_empty(n, o.hidden)
        sizes = grouped_blocks(o.gate, tokens)
        x = lane_by_lane(hidden, o.gate)
        up = self._memory, blocks, pairs.order, x, h, pairs.sharing, o.gate, o.up, o.down, self._glu
        self._launch(self._grouped.gate_up_blocks, (len(table), -(-o.inner // sizes["BN"])), up, sizes)
        sizes = grouped_blocks(o.down, tokens)
        down = self._memory, blocks, h, out, o.down
        self._launch(self._grouped.down_blocks, (len(table), -(-o.hidden // sizes["BN"])), down, sizes)
        return out


def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def lane_by_lane(x: torch.Tensor, weight: Operand) -> torch.Tensor:
    """[n, cols] in the order that `grouped` reads: [n, weights per element, elements], flattened."""
    if weight.values == 1:
        return x
    return x.view(len(x), weight.width, weight.values).transpose(1, 2).contiguous()


def decode_blocks(weight: Operand, pairs: int, full_grid: int = FULL_GRID) -> dict[str, int]:
    """Rows and elements that a program of `decode` takes at a time: as many rows as still fill the GPU."""
    rows = next((n for n in (64, 32) if weight.rows % n == 0 and pairs * weight.rows >= n * full_grid), 16)
    return {"BN": rows, "BW": STEP[weight.element], **COMPILER}


def grouped_blocks(weight: Operand, tokens: int) -> dict[str, int]:
    """Tokens, rows and elements that a program of `grouped` takes at a time.

    Two stages of int4 fit into the 99 KB of shared memory that GPUs for desktops have, three do not.
    """
    return {"BM": tokens, "BN": 64, "BW": 64 if weight.values == 1 else 32, "num_stages": 2, **COMPILER}


def group_tokens(mean: float) -> int:
    """Tokens that a program of `grouped` takes at a time, for that many per expert in the mean; 16 is the least that
    tensor cores take.
    """
    return next((n for n in (16, 32) if mean <= n), 64)


def _modules() -> tuple[ModuleType, ModuleType]:
    from offmoe.compute.kernels.triton import decode, grouped

    return decode, grouped


def _launch(kernel: Any, grid: tuple[int, int], arguments: tuple[object, ...], options: Mapping[str, int]) -> None:
    kernel[grid](*arguments, **options)
