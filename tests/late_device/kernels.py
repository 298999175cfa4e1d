"""The GPU kernels on the late device: what each launch computes, by torch, when the device gets to it.

The host's side of offmoe's own code runs unchanged: grouping, tables, launches. The kernels themselves are tested in
Triton's interpreter (tests/compute/kernels).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.device import DeviceKernels, Pairs
from offmoe.compute.kernels.operands import Operand
from offmoe.storage.layout import PARAM_ALIGNMENT
from tests.late_device import extension

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class LateKernels(DeviceKernels):
    """Experts that are not quantized. Reads of slots are known to the device, and nothing else of their memory."""

    def __init__(self, operands: Any, glu: Glu, memory: torch.Tensor, starts: Any, **options: Any) -> None:
        super().__init__(operands, glu, memory, starts, launch=self._run, **options)
        self._pairs = Pairs([], [])

    def read_from(self, memory: torch.Tensor, starts: Any) -> None:
        super().read_from(memory, starts)
        self._ends = [*list(starts)[1:], memory.numel()]

    def compute(self, pairs: Pairs, hidden: torch.Tensor) -> torch.Tensor:
        self._pairs = pairs
        return super().compute(pairs, hidden)

    def _run(self, kernel: Any, grid: tuple[int, int], given: tuple[Any, ...], sizes: Mapping[str, int]) -> None:
        memory, *rest = given
        starts = [int(self._starts[slot]) * PARAM_ALIGNMENT for slot in self._pairs.slots]
        slots = [memory[start : min(end for end in self._ends if end > start)] for start in starts]
        tensors = [value for value in rest if isinstance(value, torch.Tensor)]
        name = kernel.__name__
        out = {"gate_up_rows": 3, "down_rows": 2, "gate_up_blocks": 3, "down_blocks": 2}[name]
        writes = [rest[out]]
        reads = [*slots, *(tensor for tensor in tensors if tensor is not rest[out])]
        on_host = [extension.on_host(value) if isinstance(value, torch.Tensor) else value for value in given]
        work = KERNELS[name]
        extension.submit(memory.device, name, lambda: work(*on_host), reads, writes)


def _weight(memory: torch.Tensor, start: int, operand: Operand) -> tuple[torch.Tensor, torch.Tensor | float]:
    """A weight [rows, cols] and its bias, in float32."""
    assert operand.kind == "float", "only weights that are not quantized are computed here"
    typed = memory[start + operand.at :][: (memory.numel() - start - operand.at) // 4 * 4].view(DTYPES[operand.element])
    first = operand.first * operand.row_stride
    shape, strides = (operand.rows, operand.cols), (operand.step * operand.row_stride, operand.col_stride)
    weight = typed.as_strided(shape, strides, typed.storage_offset() + first).float()
    if not operand.bias:
        return weight, 0.0
    dtype = DTYPES[operand.bias]
    last = operand.first + (operand.rows - 1) * operand.step + 1
    bias = memory[start + operand.bias_at :][: last * dtype.itemsize].view(dtype)
    return weight, bias[operand.first :: operand.step].float()


def _times(x: torch.Tensor, memory: torch.Tensor, place: int, operand: Operand) -> torch.Tensor:
    weight, bias = _weight(memory, place * PARAM_ALIGNMENT, operand)
    return x.float() @ weight.T + bias


def _gate_up_rows(
    memory: torch.Tensor, places: torch.Tensor, order: torch.Tensor | None, x: torch.Tensor, h: torch.Tensor,
    sharing: int, gate: Operand, up: Operand, glu: Glu,
) -> None:  # fmt: skip
    for pair, place in enumerate(places.tolist()):
        row = x[0 if order is None else int(order[pair]) // sharing]
        h[pair] = glu(_times(row, memory, place, gate), _times(row, memory, place, up))


def _down_rows(memory: torch.Tensor, places: torch.Tensor, h: torch.Tensor, out: torch.Tensor, down: Operand) -> None:
    for pair, place in enumerate(places.tolist()):
        out[pair] = _times(h[pair], memory, place, down)


def _gate_up_blocks(
    memory: torch.Tensor, blocks: torch.Tensor, order: torch.Tensor, x: torch.Tensor, h: torch.Tensor,
    sharing: int, gate: Operand, up: Operand, down: Operand, glu: Glu,
) -> None:  # fmt: skip
    for place, first, end in blocks.tolist():  # as far as the expert goes: later blocks compute the same again
        rows = x[order[first:end] // sharing]
        h[first:end] = glu(_times(rows, memory, place, gate), _times(rows, memory, place, up)).to(h.dtype)


def _down_blocks(memory: torch.Tensor, blocks: torch.Tensor, h: torch.Tensor, out: torch.Tensor, down: Operand) -> None:
    for place, first, end in blocks.tolist():
        out[first:end] = _times(h[first:end], memory, place, down).to(out.dtype)


KERNELS: dict[str, Callable[..., None]] = {
    "gate_up_rows": _gate_up_rows,
    "down_rows": _down_rows,
    "gate_up_blocks": _gate_up_blocks,
    "down_blocks": _down_blocks,
}
"""By the names of Triton's."""
