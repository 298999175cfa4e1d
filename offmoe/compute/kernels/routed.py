"""One MoE layer of few tokens by kernels that need nothing of the host in between: state on the device, and its log.

The host leaves a list of named slots after each access of a layer (`Planner.next_places`). The kernels of
triton/routed.py give them to the next access's misses by the same rule, copy the missed experts from mapped RAM, and
compute all rows from the router's ids. The host reads what happened from a ring in RAM, one layer or more behind, and
plans the same accesses again for its own residency, the statistics and a recording. Misses that the rule cannot place
are placed by the host, while the stream waits (runtime/device_decode.py).

**None of it has run on a GPU.** It was checked in Triton's interpreter against the planner, on the late device of the
tests, and compiled for sm_80 to sm_120 (docs/measurements.md).

Moves: an entry of the log per layer to the host, and 2 top_k words per layer and step to the device, both by mapped
RAM, in which no copy is queued. Missed experts from mapped RAM into their slots.
Bound: see triton/routed.py.
Must never: leave a list that names a slot whose expert the last access demanded and the host has not seen yet. The
host's stores are to reach the device in 8 bytes at once, and sources before the words that follow them, as on x86.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch

from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.device import COMPILER, FULL_GRID, STEP, Launch, decode_blocks, launch_kernel
from offmoe.compute.kernels.operands import GatedOperands, Operand
from offmoe.compute.kernels.routing_log import RoutingLog
from offmoe.storage.layout import aligned

NOWHERE = -1
"""The place of an expert that has no slot, the holder of a free slot, and the place that ends a list."""
COPY_WORDS, COPY_PROGRAMS = 1024, 32
"""Words of 4 bytes that a program of `gather` copies at a time, and programs per expert. Derived, not measured."""
SPINS = 1 << 23
"""Looks at a word of the host before the device gives up: some 10 s, at 1 to 2 us for a read across the link. A read of
an expert from a slow disk takes less. Assumed, not measured."""
ROW = 4
"""The tables of each layer begin at a multiple of so many numbers of 4 bytes: Triton compiles a kernel for pointers at
multiples of 16 bytes, and another one for others."""
NUMBERS = 1 << 31
"""Accesses of a layer before their numbers begin again."""

Piece = tuple[int, int, int]
"""Part of an expert in mapped RAM: (address, offset in the slot, words of 4 bytes)."""


def named_word(place: int, holder: int, number: int) -> int:
    """A slot that access `number` of a layer may take. holder: an expert below 65,535, or NOWHERE."""
    return place << 32 | (holder + 1) << 16 | number & 0xFFFF


def settled_word(place: int, number: int) -> int:
    """Where an expert is from access `number` on."""
    return place << 32 | number


class LayerSizes(NamedTuple):
    """What the state of one layer takes room for.

    experts, top_k: of the layer. num_named: most slots of a list. pieces: parts of an expert in RAM.
    """

    experts: int
    top_k: int
    num_named: int
    pieces: int


class RoutedState:
    """The state of all layers of a model, which device and host share; for accesses of `rows` tokens."""

    def __init__(
        self,
        sizes: Sequence[LayerSizes],
        rows: int,
        device: torch.device,
        mapped: Callable[[int], torch.Tensor],
        entries: int,
    ) -> None:
        """Allocate it. `RoutedLayer.reset` makes it valid, layer by layer.

        Args:
            sizes: of each layer.
            rows: tokens of every access.
            mapped: mapped(nbytes) gives uint8 [nbytes] of RAM that the device maps, aligned to 8 bytes.
            entries: of the log, at least one per layer.
        """
        layers, pairs = len(sizes), rows * max(size.top_k for size in sizes)
        assert entries >= layers
        most_experts = max(size.experts for size in sizes)
        assert most_experts < 0xFFFF, "a word of a list has 16 bits for an expert"
        most_experts = aligned(most_experts, ROW)

        def in_ram(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            nbytes = dtype.itemsize * int(np.prod(shape))
            return mapped(nbytes).zero_()[:nbytes].view(dtype).view(shape)

        self.sizes, self.rows, self.device = sizes, rows, device
        self.places = torch.full((layers, most_experts), NOWHERE, dtype=torch.int32, device=device)
        """int32 [layers, experts]: where each expert's slot starts in the slots' memory, in units of 256 bytes."""
        self.turns = torch.zeros(layers, ROW, dtype=torch.int32, device=device)
        """int32 [layers, ROW]: first in its row, the accesses of each layer so far."""
        self.moves = torch.zeros(pairs, 2, dtype=torch.int32, device=device)
        self.count = torch.zeros(1, dtype=torch.int32, device=device)
        self.log = RoutingLog(in_ram(torch.int32, entries, 3 + pairs), in_ram(torch.int32, 2))
        self.named = in_ram(torch.int64, layers, max(_power(size.num_named) for size in sizes))
        self.settled = in_ram(torch.int64, layers, most_experts)
        self.sources = in_ram(torch.int64, layers, most_experts * max(3 * size.pieces for size in sizes))
        self.aborted = in_ram(torch.int32, 1)
        """int32 [1]: 1 if nobody waits any more, for whichever side gave up first."""


def _power(count: int) -> int:
    """The least power of two that is at least `count`, and 2."""
    return 1 << max(1, count - 1).bit_length()


class RoutedLayer:
    """The state of one layer, what the host writes of it, and the launches of one access."""

    def __init__(
        self,
        index: int,
        state: RoutedState,
        memory: torch.Tensor,
        operands: GatedOperands,
        glu: Glu,
        full_grid: int = FULL_GRID,
        launch: Launch = launch_kernel,
        spins: int = SPINS,
    ) -> None:
        """Prepare; nothing has a slot.

        Args:
            index: of the MoE layer.
            state: of the model.
            memory: uint8 on the device, in which places are counted.
            operands, glu: of the layer's experts.
            full_grid: the least number of programs that a launch of rows should have.
            spins: looks at a word of the host before the device gives up.
        """
        from offmoe.compute.kernels.triton import decode, routed  # imports Triton: where `device.available`, only

        size, self.rows = state.sizes[index], state.rows
        experts, self.top_k = size.experts, size.top_k
        self._experts, self._launch = experts, launch
        self._operands, self._glu, self._decode, self._kernels = operands, glu, decode, routed
        self._most_named = _power(size.num_named)
        self.memory, self.log, self.aborted = memory, state.log, state.aborted
        self.places, self.turn = state.places[index, :experts], state.turns[index, :1]
        self.named, self.settled = state.named[index, : self._most_named], state.settled[index, :experts]
        self._pairs = state.rows * size.top_k
        self.moves, self.count = state.moves[: self._pairs], state.count
        stride = 3 * size.pieces
        self.sources = state.sources[index, : experts * stride].view(experts, size.pieces, 3)
        self._named, self._settled = self.named.numpy().data, self.settled.numpy().data
        sizes = {"PAIRS": self._pairs, "EXPERTS": experts, "STRIDE": stride, "SPINS": spins}
        ring = {"ENTRIES": len(state.log.ring), "WIDTH": state.log.ring.shape[1]}
        self._assign_sizes = sizes | ring | {"E": _power(experts), "V": self._most_named} | COMPILER
        self._gather_sizes = {"PIECES": size.pieces, "BLOCK": COPY_WORDS} | COMPILER
        self._up_sizes = decode_blocks(operands.gate, self._pairs, full_grid)
        self._down_sizes = reduced_blocks(operands.down, self.rows, full_grid)
        order = torch.arange(self._pairs, device=memory.device)  # [T * k]
        self._order = None if self.rows == 1 else order
        self._h = torch.empty(self._pairs, operands.inner, dtype=torch.float32, device=memory.device)  # [T * k, I]
        self._of_layer = self.places, self.turn, self.named, self.settled, self.sources
        self._shared = self.moves, self.count, self.log.ring, self.log.progress, self.aborted, index
        self._words = self.named.numpy()
        self._list: Sequence[tuple[int, int]] = ()
        """What `leave` left last."""
        self.number = 0
        """The number of the layer's next access that the host has not seen."""

    def compile(self, dtype: torch.dtype) -> None:
        """Compile all kernels for inputs of this dtype, so that none is compiled in the middle of a generation.

        Layers of equal sizes and operands share what is compiled. Nothing happens if launches are not Triton's own.
        """
        if self._launch is not launch_kernel:
            return

        def warm_up(kernel: Any, grid: tuple[int, int], arguments: tuple[object, ...], options: Any) -> None:
            if hasattr(kernel, "warmup"):  # Triton's interpreter compiles nothing
                kernel.warmup(*arguments, grid=grid, **options)

        layer, device = copy(self), self.memory.device
        layer._launch = warm_up
        ids = torch.zeros(self.rows, self.top_k, dtype=torch.int64, device=device)
        with torch.accelerator.device_index(device.index):
            layer.assign(ids)
            layer.gather()
            for weights in dict.fromkeys((dtype, torch.float32)):  # routers may compute in float32
                hidden = torch.zeros(self.rows, self._operands.hidden, dtype=dtype, device=device)
                layer.compute(hidden, ids, torch.zeros(ids.shape, dtype=weights, device=device))

    def reset(self, places: Mapping[int, int]) -> None:
        """Begin at access 0. The device is idle.

        Args:
            places: by expert, where its slot starts, in units of 256 bytes.
        """
        self.number = 0
        table = np.full(self._experts, NOWHERE, dtype=np.int32)
        for expert, place in places.items():
            table[expert] = place
        self.places.copy_(torch.from_numpy(table))
        self.turn.zero_()
        self.named.fill_(named_word(NOWHERE, NOWHERE, 0xFFFF))
        self.settled.fill_(settled_word(NOWHERE, NUMBERS - 1))

    def leave(self, places: Sequence[tuple[int, int]]) -> None:
        """Leave the list that access `number` takes slots from.

        Args:
            places: (place of a slot, expert that holds it or NOWHERE), in order.
        """
        assert len(places) <= self._most_named
        named, number = self._named, self.number & 0xFFFF
        self._list = places
        for i, (place, expert) in enumerate(places):
            named[i] = place << 32 | (expert + 1) << 16 | number  # `named_word`
        for i in range(len(places), self._most_named):
            named[i] = named_word(NOWHERE, NOWHERE, number)

    def leave_again(self) -> None:
        """Leave the last list for access `number` too, which is the next one."""
        if self.number & 0xFFFF:
            self._words += 1  # `named_word` has the number in the lowest bits
        else:
            self.leave(self._list)

    def settle(self, places: Mapping[int, int]) -> None:
        """Answer access `number`, whose misses the device could not place; as `reset` takes places."""
        settled, number = self._settled, self.number
        for expert in range(self._experts):
            settled[expert] = settled_word(places.get(expert, NOWHERE), number)

    def hold(self, expert: int, pieces: Sequence[Piece]) -> None:
        """Say where an expert stands in mapped RAM; () for nowhere. The device does not read this meanwhile."""
        if pieces:
            self.sources[expert] = torch.tensor(pieces)
        else:
            self.sources[expert].zero_()

    def assign(self, ids: torch.Tensor) -> None:
        """Place the missed experts of an access. ids: int64 [rows, top_k] on the device, as routed."""
        assert ids.shape == (self.rows, self.top_k)
        assert ids.dtype == torch.int64
        arguments = ids.contiguous(), *self._of_layer, *self._shared
        self._launch(self._kernels.assign, (1, 1), arguments, self._assign_sizes)

    def gather(self) -> None:
        """Copy the experts that `assign` placed from RAM into their slots."""
        arguments = self.moves, self.count, self.sources, self.memory
        self._launch(self._kernels.gather, (self._pairs, COPY_PROGRAMS), arguments, self._gather_sizes)

    def compute(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's experts, in router order and float32.

        Args:
            hidden: [rows, H]. ids: int64 [rows, top_k], as routed. weights: [rows, top_k].

        Returns:
            [rows, H] of hidden's dtype. An id that is no expert's adds nothing; a token with an expert that has no slot
            is NaN.
        """
        o = self._operands
        assert hidden.shape == (self.rows, o.hidden)
        hidden, ids = hidden.contiguous(), ids.contiguous()
        out = torch.empty_like(hidden)  # [T, H]
        sizes: dict[str, Any] = self._up_sizes | {"ids": ids, "EXPERTS": self._experts}
        up = self.memory, self.places, self._order, hidden, self._h, self.top_k, o.gate, o.up, self._glu
        self._launch(self._decode.gate_up_rows, (self._pairs, -(-o.inner // sizes["BN"])), up, sizes)
        sizes = self._down_sizes
        down = self.memory, self.places, ids, weights.contiguous(), self._h, out, o.down, self.top_k, self._experts
        self._launch(self._kernels.down_reduced, (self.rows, -(-o.hidden // sizes["BN"])), down, sizes)
        return out


def reduced_blocks(weight: Operand, rows: int, full_grid: int = FULL_GRID) -> dict[str, int]:
    """Rows and elements that a `down_reduced` program takes at a time. A program reads all experts of its token, so
    fewer rows than in `decode` fill the grid."""
    block = next((n for n in (32, 16, 8) if weight.rows % n == 0 and rows * weight.rows >= n * full_grid), 4)
    return {"BN": block, "BW": STEP[weight.element], **COMPILER}
