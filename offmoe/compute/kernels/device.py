"""Experts of one layer computed on a GPU from their slots: chooses the kernel and its blocks, and imports Triton.

Few tokens go to the `decode` kernels, many to the `grouped` ones. The number of tokens that divides them, and the sizes
of blocks, were derived from published figures of GPUs. **None of this has run on a GPU**: it was checked in Triton's
interpreter and compiled for sm_80 and sm_90 (docs/measurements.md).
Sums run in another order than torch's, so this is for `exactness="numeric"` only.

Moves: a few hundred bytes to the device: where each expert's slot starts and, for many tokens, which tokens it gets.
Bound: memory bandwidth in `decode`, tensor cores in `grouped`.
Must never: read a slot that is not in `Pairs.slots`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch

from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.operands import GatedOperands, Operand
from offmoe.storage.layout import PARAM_ALIGNMENT

DECODE_PAIRS = 16
"""Up to so many (token, expert) pairs, every pair reads its expert by itself. Few of them share an expert then, and the
L2 cache serves those that do. Derived, not measured; tools/gpu_check times both kernels on either side of it."""

STEP = {"int32": 32, "uint8": 128, "bf16": 256, "fp16": 256, "fp32": 128}
"""Elements of a row that a `decode` program takes at a time: whole cache lines, or one FP8 block of scales."""

FULL_GRID = 512
"""Programs that keep 132 multiprocessors and the memory busy: about four per multiprocessor, of 128 threads each.
Derived, not measured."""

LAUNCH_BYTES = 64 << 20
"""Bytes of the rows between the two kernels of a launch and behind them: a prompt of 4,096 tokens of Mixtral would take
0.6 GB in one launch. 64 MB are 900 pairs of it, which fill any GPU."""

GROUP_TOKENS = (16, 32, 64)
"""Tokens that a `grouped` program may take at a time."""

NARROW = {("uint8", 64), ("mxfp4", 16)}
"""Kinds of weights and tokens of a `grouped` program for which it takes 32 rows, not 64: with 64, ptxas spilled 236
bytes of int8 on sm_86 and 668 on sm_120, and 4 of mxfp4 on sm_90 (Triton 3.9)."""

WIDE = {("int4", 32), ("mxfp4", 32)}
"""The same for which it has 8 warps, not 4: with 4, ptxas spilled 48 bytes of int4 on sm_86, 4 of mxfp4 on sm_120."""

COMPILER = {"num_warps": 4, "enable_fp_fusion": True}
"""enable_fp_fusion: multiply and add in one instruction halve the instructions of decoding; Triton 3.10 does not use it
by default."""

Launch = Callable[[Any, tuple[int, int], tuple[object, ...], Mapping[str, Any]], object]
"""launch(kernel, grid, arguments, options) starts a kernel. Tests compile or count instead."""


Upload = Callable[[np.ndarray], torch.Tensor]
"""upload(int32 table) -> the same on the device, for the kernels that are launched next."""


class Pairs(NamedTuple):
    """The (token, expert) pairs of some experts, one expert's after the other's; n in all."""

    slots: Sequence[int]
    """Per expert, its slot."""
    counts: Sequence[int]
    """Per expert, the number of its pairs."""
    order: torch.Tensor | None = None
    """int64 [n] on the device: the input of pair i is row order[i] // sharing. None: every expert has one pair, and
    there is one row."""
    sharing: int = 1
    """Consecutive positions in `order` that share a row of the inputs."""


def launch_kernel(
    kernel: Any, grid: tuple[int, int], arguments: tuple[object, ...], options: Mapping[str, Any]
) -> None:
    """Start a kernel by Triton: a `Launch`."""
    kernel[grid](*arguments, **options)


class DeviceKernels:
    """Computes experts of layers with equal operands, in slots at most 512 GiB apart."""

    def __init__(
        self,
        operands: GatedOperands,
        glu: Glu,
        memory: torch.Tensor,
        starts: Sequence[int] | np.ndarray,
        full_grid: int = FULL_GRID,
        launch: Launch = launch_kernel,
        upload: Upload | None = None,
    ) -> None:
        """Prepare; nothing is compiled before the first call.

        Args:
            memory: uint8 on the device, aligned to PARAM_ALIGNMENT.
            starts: per slot, the bytes from the address of `memory` to its first byte.
            full_grid: the least number of programs that a launch should have.
            upload: copies tables to the device; None: from pageable memory, for which the host waits.
        """
        from offmoe.compute.kernels.triton import decode, grouped  # imports Triton: where `available`, only

        self._operands, self._glu = operands, glu
        self._hidden, self._inner = operands.hidden, operands.inner
        self.read_from(memory, starts)
        self._full_grid, self._launch = full_grid, launch
        self._upload: Upload = upload or (lambda table: torch.from_numpy(table).to(memory.device))
        self._decode, self._grouped = decode, grouped
        self._launches: dict[int, tuple[tuple[tuple[int, int], dict[str, int]], ...]] = {}
        """By number of pairs, grid and blocks of the two `decode` kernels."""

    def read_from(self, memory: torch.Tensor, starts: Sequence[int] | np.ndarray) -> None:
        """Read slots from here on at these addresses. Arguments as of the constructor."""
        assert memory.dtype == torch.uint8
        places, rest = np.divmod(np.asarray(starts, dtype=np.int64), PARAM_ALIGNMENT)
        assert not rest.any()
        self._memory, self._starts = memory, places.astype(np.int32)
        if not np.array_equal(self._starts, places):
            raise OverflowError("slots are more than 512 GiB apart")

    def compile(self, dtype: torch.dtype, top_k: int) -> int:
        """Compile every variant that `compute` may launch, so that none is compiled in the middle of a generation.

        Triton keeps what it compiled on disk: a variant takes about a second once per machine.

        Args:
            dtype: of the inputs.
            top_k: experts per token.

        Returns:
            The number of variants. 0 if launches are not Triton's own.
        """
        if self._launch is not launch_kernel:
            return 0
        seen: set[object] = set()

        def warm_up(
            kernel: Any, grid: tuple[int, int], arguments: tuple[object, ...], sizes: Mapping[str, int]
        ) -> None:
            variant = kernel.__name__, tuple(sizes.items()), tuple(type(value) for value in arguments)
            if variant not in seen:
                seen.add(variant)
                if hasattr(kernel, "warmup"):  # Triton's interpreter compiles nothing
                    kernel.warmup(*arguments, grid=grid, **sizes)

        kernels, device = copy(self), self._memory.device
        kernels._launch = warm_up
        with torch.accelerator.device_index(device.index):
            one = torch.zeros(1, self._operands.hidden, dtype=dtype, device=device)  # [1, H]
            kernels.by_pair(Pairs([0] * top_k, [1] * top_k), one)
            for n in range(1, DECODE_PAIRS + 1):
                kernels.by_pair(Pairs([0], [n], torch.arange(n, device=device), top_k), one)
            for n in GROUP_TOKENS:
                kernels.by_group(Pairs([0, 0], [n, n], torch.arange(2 * n, device=device), top_k), one)
        return len(seen)

    @property
    def kind(self) -> tuple[GatedOperands, Glu]:
        """What the compiler sees of a layer: layers of one kind share compiled kernels."""
        return self._operands, self._glu

    @property
    def most_pairs(self) -> int:
        """Pairs of one launch whose intermediate and output rows take LAUNCH_BYTES, at four bytes a number."""
        return max(1, LAUNCH_BYTES // (4 * (self._inner + self._hidden)))

    def compute(self, pairs: Pairs, hidden: torch.Tensor) -> torch.Tensor:
        """Experts on their inputs: hidden [m, H] -> rows [n, H] of its dtype, in the order of `pairs`, unweighted."""
        assert hidden.dtype in (torch.bfloat16, torch.float16, torch.float32), hidden.dtype
        assert hidden.shape[1] == self._hidden, hidden.shape
        hidden = hidden.contiguous()
        by_pair = pairs.order is None or sum(pairs.counts) <= DECODE_PAIRS
        index = hidden.device.index
        if index is None or torch.accelerator.current_device_index() == index:
            return self.by_pair(pairs, hidden) if by_pair else self.by_group(pairs, hidden)
        with torch.accelerator.device_index(index):  # kernels start on the current device
            return self.by_pair(pairs, hidden) if by_pair else self.by_group(pairs, hidden)

    def by_pair(self, pairs: Pairs, hidden: torch.Tensor) -> torch.Tensor:
        """`compute` by the kernels for few tokens."""
        o, starts = self._operands, self._starts.take(pairs.slots)
        if pairs.order is not None:
            starts = np.repeat(starts, pairs.counts)
        n = len(starts)
        if n == 0:
            return hidden.new_empty(0, self._hidden)
        places = self._upload(starts)  # int32 [n]
        (up_grid, up_sizes), (down_grid, down_sizes) = self._launches.get(n) or self._decode_launches(n)
        h = torch.empty(n, self._inner, dtype=torch.float32, device=hidden.device)
        out = hidden.new_empty(n, self._hidden)
        up = self._memory, places, pairs.order, hidden, h, pairs.sharing, o.gate, o.up, self._glu
        self._launch(self._decode.gate_up_rows, up_grid, up, up_sizes)
        down = self._memory, places, h, out, o.down
        self._launch(self._decode.down_rows, down_grid, down, down_sizes)
        return out

    def _decode_launches(self, pairs: int) -> tuple[tuple[tuple[int, int], dict[str, int]], ...]:
        """Grid and blocks of the two `decode` kernels."""
        weights = (self._operands.gate, self._inner), (self._operands.down, self._hidden)
        blocks = [(decode_blocks(weight, pairs, self._full_grid), rows) for weight, rows in weights]
        launches = tuple([((pairs, -(-rows // sizes["BN"])), sizes) for sizes, rows in blocks])
        self._launches[pairs] = launches
        return launches

    def by_group(self, pairs: Pairs, hidden: torch.Tensor) -> torch.Tensor:
        """`compute` by the kernels for many tokens."""
        assert pairs.order is not None
        n, o = sum(pairs.counts), self._operands
        tokens = group_tokens(n / len(pairs.counts))
        table, end = [], 0
        for slot, count in zip(pairs.slots, pairs.counts, strict=True):
            first, end = end, end + count
            table += [(int(self._starts[slot]), start, end) for start in range(first, end, tokens)]
        blocks = self._upload(np.array(table, dtype=np.int32))  # [blocks, 3]
        h = hidden.new_empty(n, self._inner)
        out = hidden.new_empty(n, self._hidden)
        sizes = grouped_blocks(o.gate, tokens)
        x = lane_by_lane(hidden, o.gate)
        up = self._memory, blocks, pairs.order, x, h, pairs.sharing, o.gate, o.up, o.down, self._glu
        self._launch(self._grouped.gate_up_blocks, (len(table), -(-self._inner // sizes["BN"])), up, sizes)
        sizes = grouped_blocks(o.down, tokens)
        down = self._memory, blocks, h, out, o.down
        self._launch(self._grouped.down_blocks, (len(table), -(-self._hidden // sizes["BN"])), down, sizes)
        return out


def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def lane_by_lane(x: torch.Tensor, weight: Operand) -> torch.Tensor:
    """x [n, cols] in the order that `grouped` reads: [n, weights per element, elements], flattened."""
    if weight.values == 1:
        return x
    return x.view(len(x), weight.width, weight.values).transpose(1, 2).contiguous()


def decode_blocks(weight: Operand, pairs: int, full_grid: int = FULL_GRID) -> dict[str, int]:
    """Rows and elements that a `decode` program takes at a time: as many rows as still give `full_grid` programs.

    64 rows of weights that are not quantized do not fit the registers: ptxas spilled 6,900 bytes of bf16 on sm_80.
    """
    most = (32,) if weight.kind == "float" else (64, 32)
    rows = next((n for n in most if weight.rows % n == 0 and pairs * weight.rows >= n * full_grid), 16)
    return {"BN": rows, "BW": STEP[weight.element], **COMPILER}


def grouped_blocks(weight: Operand, tokens: int) -> dict[str, int]:
    """Tokens, rows and elements that a `grouped` program takes at a time.

    Desktop GPUs have 99 KB of shared memory: two stages of int4 fit, three do not. 64 rows of some formats do not fit
    the registers of four warps (`NARROW`, `WIDE`).
    """
    kind = weight.kind, tokens
    sizes = {"BM": tokens, "BN": 32 if kind in NARROW else 64, "BW": 64 if weight.values == 1 else 32, "num_stages": 2}
    return {**sizes, **COMPILER, "num_warps": 8 if kind in WIDE else 4}


def group_tokens(mean: float) -> int:
    """Tokens that a `grouped` program takes at a time, by the mean number per expert. Tensor cores take 16 or more."""
    return next((n for n in GROUP_TOKENS if mean <= n), GROUP_TOKENS[-1])
