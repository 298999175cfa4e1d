"""The GPU kernels on the late device: what each launch computes, by torch, when the device gets to it.

The host's side of offmoe's own code runs unchanged: grouping, tables, launches. The kernels themselves are tested in
Triton's interpreter (tests/compute/kernels).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import torch

from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.device import DeviceKernels, Launch, Pairs, launch_kernel
from offmoe.compute.kernels.operands import GatedOperands, Operand
from offmoe.compute.kernels.routed import RoutedLayer, RoutedState
from offmoe.compute.kernels.routing_log import Verdict
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


class LateRoutedLayer(RoutedLayer):
    """The kernels of a layer without the host, in plain Python.

    Reads and writes of slots are not known to the device, since only their values say which: what comes too late makes
    rows wrong, not a race.
    """

    def __init__(
        self, index: int, state: RoutedState, memory: torch.Tensor, operands: GatedOperands, glu: Glu, launch: Launch
    ) -> None:
        assert launch is launch_kernel
        super().__init__(index, state, memory, operands, glu, launch=self._run, spins=LOOKS)

    def _run(self, kernel: Any, grid: tuple[int, int], given: tuple[Any, ...], sizes: Mapping[str, Any]) -> None:
        device, name = self.memory.device, kernel.__name__
        if name == "assign":
            self._assign(device, *given)
            return
        on_host: list[Any] = [_slab(v) if v is self.memory else _on_host(v) for v in given]
        tensors = [v for v in given if _is_late(v) and v is not self.memory]
        if name == "gather":
            extension.submit(device, name, lambda: _gather(*on_host), tensors, [])
            return
        out = {"gate_up_rows": 4, "down_reduced": 5}[name]
        work: Callable[..., None] = _routed_gate_up_rows if name == "gate_up_rows" else _down_reduced
        if name == "gate_up_rows":
            on_host.append(_on_host(sizes["ids"]))
            tensors.append(sizes["ids"])
        extension.submit(
            device, name, lambda: work(*on_host), [t for t in tensors if t is not given[out]], [given[out]]
        )

    def _assign(
        self, device: torch.device, ids: Any, places: Any, turn: Any, named: Any, settled: Any, sources: Any,
        moves: Any, count: Any, ring: Any, progress: Any, aborted: Any, layer: int,
    ) -> None:  # fmt: skip
        on_host = {"ids": ids, "places": places, "turn": turn, "moves": moves, "count": count}
        mapped = {"named": named, "settled": settled, "sources": sources, "ring": ring, "progress": progress}
        state = {name: extension.on_host(value) for name, value in on_host.items()} | mapped
        routing = AssignedRouting(**state, aborted=aborted, layer=layer)
        extension.wait(device, "wait for the list", routing.may_begin)
        extension.submit(device, "assign", routing.assign, [ids], [places, turn, moves, count])
        extension.wait(device, "wait for the answer", routing.may_end)
        extension.submit(device, "settle", routing.settle, [], [places])


LOOKS = 200_000
"""Looks at a word of the host before the late device gives up, 50 us each."""


class AssignedRouting:
    """`routed.assign` in plain Python, cut where it waits for the host."""

    def __init__(
        self, *, ids: Any, places: Any, turn: Any, moves: Any, count: Any, named: Any, settled: Any, sources: Any,
        ring: Any, progress: Any, aborted: Any, layer: int,
    ) -> None:  # fmt: skip
        self.ids, self.places, self.turn, self.moves, self.count = ids, places, turn, moves, count
        self.named, self.settled, self.sources = named, settled, sources
        self.ring, self.progress, self.aborted, self.layer = ring, progress, aborted, layer
        self.verdict, self.looks = Verdict.ASSIGNED, 0

    def _look(self, holds: bool) -> bool:
        if holds:
            return True
        self.looks += 1
        if self.looks >= LOOKS:
            self.aborted[0] = 1
        return bool(self.aborted[0])

    @property
    def missing(self) -> list[int]:
        experts = len(self.places)
        return sorted({e for e in self.ids.flatten().tolist() if 0 <= e < experts and self.places[e] < 0})

    def _has_list(self) -> bool:
        return not self.missing or bool(((self.named & 0xFFFF) == int(self.turn) & 0xFFFF).all())

    def _has_room(self) -> bool:
        return int(self.progress[0] - self.progress[1]) < len(self.ring)

    def may_begin(self) -> bool:
        return self._look(self._has_room() and self._has_list())

    def assign(self) -> None:
        missing, routed = self.missing, set(self.ids.flatten().tolist())
        self.number = int(self.turn)
        words = [(word >> 32, (word >> 16 & 0xFFFF) - 1) for word in self.named.tolist()]
        left = [(place, holder) for place, holder in words if place >= 0 and holder not in routed]
        if not (self._has_room() and self._has_list()):
            self.verdict = Verdict.GIVEN_UP
        elif len(left) < len(missing):
            self.verdict = Verdict.TOO_FEW_VICTIMS
        elif any(not self.sources[expert, 0, 0] for expert in missing):
            self.verdict = Verdict.NOT_IN_RAM
        self.count[0] = len(missing) if self.verdict is Verdict.ASSIGNED else 0
        for i, expert in enumerate(missing if self.verdict is Verdict.ASSIGNED else ()):
            place, holder = left[i]
            if holder >= 0:
                self.places[holder] = -1
            self.places[expert] = place
            self.moves[i, 0], self.moves[i, 1] = expert, place
        self.turn[0] = self.number + 1
        if self.verdict is not Verdict.GIVEN_UP:
            entry = self.ring[int(self.progress[0]) % len(self.ring)]
            ids = [e if 0 <= e < len(self.places) else -1 for e in self.ids.flatten().tolist()]
            entry[:3] = torch.tensor([self.layer, self.verdict, len(missing)])
            entry[3 : 3 + len(ids)] = torch.tensor(ids)
            self.progress[0] += 1

    def _is_answered(self) -> bool:
        return bool(((self.settled & 0xFFFFFFFF) == self.number).all())

    @property
    def _asks(self) -> bool:
        return self.verdict in (Verdict.TOO_FEW_VICTIMS, Verdict.NOT_IN_RAM)

    def may_end(self) -> bool:
        return not self._asks or self._look(self._is_answered())

    def settle(self) -> None:
        if self._asks and self._is_answered():
            self.places.copy_(self.settled >> 32)
        self.verdict, self.looks = Verdict.ASSIGNED, 0  # a graph has the same launch again


def _is_late(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "late"


def _on_host(value: Any) -> Any:
    return extension.on_host(value) if _is_late(value) else value


def _slab(memory: torch.Tensor) -> torch.Tensor:
    """All device memory from `memory` on, as the kernels see it."""
    address = extension.library().late_real(extension.size(memory.data_ptr()))
    with torch.inference_mode(False):  # as in `extension.on_host`
        return torch.frombuffer((ctypes.c_char * SLAB_BYTES).from_address(address), dtype=torch.uint8)


SLAB_BYTES = 1 << 30


def _gather(moves: torch.Tensor, count: torch.Tensor, sources: torch.Tensor, slab: torch.Tensor) -> None:
    for expert, place in moves[: int(count)].tolist():
        for address, offset, words in sources[expert].tolist():
            ctypes.memmove(slab.data_ptr() + place * PARAM_ALIGNMENT + offset, address, 4 * words)


def _routed_gate_up_rows(
    slab: torch.Tensor, places: torch.Tensor, order: torch.Tensor | None, x: torch.Tensor, h: torch.Tensor,
    sharing: int, gate: Operand, up: Operand, glu: Glu, ids: torch.Tensor,
) -> None:  # fmt: skip
    of_pairs = [int(places[e]) if 0 <= e < len(places) else -2 for e in ids.flatten().tolist()]
    _gate_up_rows(slab, torch.tensor(of_pairs).clamp(min=0), order, x, h, sharing, gate, up, glu)


def _down_reduced(
    slab: torch.Tensor, places: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, h: torch.Tensor,
    out: torch.Tensor, down: Operand, top_k: int, experts: int,
) -> None:  # fmt: skip
    total = torch.zeros(out.shape, dtype=torch.float32)
    for pair, expert in enumerate(ids.flatten().tolist()):
        if 0 <= expert < experts:
            place = int(places[expert])
            row = _times(h[pair], slab, place, down) if place >= 0 else torch.full(out.shape[1:], float("nan"))
            total[pair // top_k] += weights.flatten()[pair].float() * row
    out.copy_(total)


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
