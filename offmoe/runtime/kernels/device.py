"""Experts of one layer computed on a GPU from their slots: which kernel, on which blocks; Triton is imported here only.

What moves: a few hundred bytes to the device (where each expert's slot starts, and for many tokens which of them are
whose); the rest moves in the kernels. Few tokens go to `decode`, which memory bounds, many to `grouped`, which tensor
cores do; the number in between, and the sizes of blocks, were reasoned from published figures of GPUs. **None of this
has run on a GPU**: it was checked in Triton's interpreter and compiled for sm_80 and sm_90 (docs/measurements.md).

Numbers are those of `exactness="numeric"`: sums run in another order than torch's. What it must never do: write a row
whose expert it was not given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from offmoe.errors import UnsupportedModelError
from offmoe.runtime.formats import PARAM_ALIGNMENT
from offmoe.runtime.kernels.cpu import Glu
from offmoe.runtime.kernels.operands import GatedOperands, Operand

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


class Routing(NamedTuple):
    """What one layer is asked in one step: hidden [T, H] or [T * k, H]; ids int64 [T, k], also on the host."""

    hidden: torch.Tensor
    top_k_index: torch.Tensor
    ids: np.ndarray


class DeviceKernels:
    """Computes experts of layers that have the same operands, in slots of one allocation."""

    def __init__(
        self,
        operands: GatedOperands,
        glu: Glu,
        experts: int,
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
        self._operands, self._glu, self._experts, self._memory = operands, glu, experts, memory
        self._starts = [start // PARAM_ALIGNMENT for start in starts]
        self._full_grid, self._launch = full_grid, launch or _launch
        self._decode, self._grouped = _modules()

    def compute(self, slots: Sequence[tuple[int, int]], routing: Routing, rows: torch.Tensor) -> None:
        """Experts of some slots on their tokens: rows [T * k, H], in router order, unweighted, written in place.

        slots: (expert, slot). Rows of other experts stay as they are.
        """
        hidden = routing.hidden.contiguous()
        assert hidden.dtype in (torch.bfloat16, torch.float16, torch.float32), hidden.dtype
        assert rows.is_contiguous()
        assert rows.shape == (routing.ids.size, self._operands.hidden), rows.shape
        if not slots or not routing.ids.size:
            return
        routing = routing._replace(hidden=hidden)
        with torch.accelerator.device_index(hidden.device.index):  # kernels start on the current device
            if routing.ids.size <= DECODE_PAIRS:
                self.compute_pairs(slots, routing, rows)
            else:
                self.compute_groups(slots, routing, rows)

    def compute_pairs(self, slots: Sequence[tuple[int, int]], routing: Routing, rows: torch.Tensor) -> None:
        """`compute` by the kernels for few tokens."""
        pairs, o = routing.ids.size, self._operands
        table = np.full(self._experts, -1, dtype=np.int32)
        for expert, slot in slots:
            table[expert] = self._starts[slot]
        place = torch.from_numpy(table).to(rows.device)
        ids = routing.top_k_index.reshape(-1)
        h = torch.empty(pairs, o.inner, dtype=torch.float32, device=rows.device)
        sharing = pairs // len(routing.hidden)
        sizes = decode_blocks(o.gate, pairs, self._full_grid)
        up = self._memory, place, ids, routing.hidden, h, self._experts, sharing, o.gate, o.up, self._glu
        self._launch(self._decode.gate_up_rows, (pairs, -(-o.inner // sizes["BN"])), up, sizes)
        sizes = decode_blocks(o.down, pairs, self._full_grid)
        down = self._memory, place, ids, h, rows, self._experts, o.down
        self._launch(self._decode.down_rows, (pairs, -(-o.hidden // sizes["BN"])), down, sizes)

    def compute_groups(self, slots: Sequence[tuple[int, int]], routing: Routing, rows: torch.Tensor) -> None:
        """`compute` by the kernels for many tokens."""
        o, hidden = self._operands, routing.hidden
        flat = routing.ids.reshape(-1)
        known = flat[(flat >= 0) & (flat < self._experts)]
        counts = np.bincount(known, minlength=self._experts)
        tokens = group_tokens(len(known) / max(1, int(np.count_nonzero(counts))))
        ends = np.cumsum(counts) + np.count_nonzero(flat < 0)  # ids that are nobody's sort first, or behind all others
        table = [
            (self._starts[slot], first, int(ends[expert]))
            for expert, slot in slots
            for first in range(int(ends[expert] - counts[expert]), int(ends[expert]), tokens)
        ]
        if not table:
            return
        blocks = torch.tensor(table, dtype=torch.int32).to(rows.device)
        order = torch.argsort(routing.top_k_index.reshape(-1), stable=True)
        x = lane_by_lane(hidden, o.gate)
        h = torch.empty(len(flat), o.inner, dtype=hidden.dtype, device=rows.device)
        sharing = len(flat) // len(hidden)
        sizes = grouped_blocks(o.gate, tokens)
        up = self._memory, blocks, order, x, h, sharing, o.gate, o.up, o.down, self._glu
        self._launch(self._grouped.gate_up_blocks, (len(table), -(-o.inner // sizes["BN"])), up, sizes)
        sizes = grouped_blocks(o.down, tokens)
        down = self._memory, blocks, order, h, rows, o.down
        self._launch(self._grouped.down_blocks, (len(table), -(-o.hidden // sizes["BN"])), down, sizes)


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
    """Tokens, rows and elements that a program of `grouped` takes at a time."""
    return {"BM": tokens, "BN": 64, "BW": 64 if weight.values == 1 else 32, **COMPILER}


def group_tokens(mean: float) -> int:
    """Tokens that a program of `grouped` takes at a time, for that many per expert in the mean; 16 is the least that
    tensor cores take.
    """
    return next((n for n in (16, 32) if mean <= n), 64)


def _modules() -> tuple[ModuleType, ModuleType]:
    from offmoe.runtime.kernels.triton import decode, grouped

    return decode, grouped


def _launch(kernel: Any, grid: tuple[int, int], arguments: tuple[object, ...], options: Mapping[str, int]) -> None:
    kernel[grid](*arguments, **options)
