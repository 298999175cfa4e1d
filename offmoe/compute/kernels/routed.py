"""One MoE layer of few tokens by kernels that need nothing of the host in between: state on the device, and its log.

The host leaves a list of named slots on the device after each access of a layer (`Planner.next_places`). The kernels of
triton/routed.py give them to the next access's misses by the same rule, copy the missed experts from mapped RAM, and
compute all rows from the router's ids. The host reads what happened from a ring in RAM, one layer or more behind, and
plans the same accesses again for its own residency, the statistics and a recording.

**The executor does not use this yet, and none of it has run on a GPU.** It was checked in Triton's interpreter against
the planner, and compiled for sm_75 to sm_120 (docs/measurements.md).

Moves: a list of 2 top_k places per layer to the device, an entry of the log per layer to the host.
Bound: see triton/routed.py.
Must never: leave a list that names a slot whose expert the last access demanded and the host has not seen yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch

from offmoe.compute.kernels.cpu import Glu
from offmoe.compute.kernels.device import COMPILER, FULL_GRID, STEP, Launch, decode_blocks, launch_kernel
from offmoe.compute.kernels.operands import GatedOperands, Operand
from offmoe.errors import OffmoeError
from offmoe.storage.layout import PARAM_ALIGNMENT

NOWHERE = -1
"""The place of an expert that has no slot, the holder of a free slot, and the place that ends a list."""
COPY_WORDS, COPY_PROGRAMS = 1024, 32
"""Words of 4 bytes that a program of `gather` copies at a time, and programs per expert. Derived, not measured."""


class Verdict(IntEnum):
    """What `assign` made of an access. Unless it is ASSIGNED, slots are as before and the host has to place."""

    ASSIGNED = 0
    TOO_FEW_VICTIMS = 1
    NOT_IN_RAM = 2
    LOG_FULL = 3
    """Never in an entry, for which there was no room: the log falls behind by one access."""


class Entry(NamedTuple):
    """An access as the device logged it. ids: int32 [pairs], as routed; -1 for one that is no expert's."""

    layer: int
    verdict: Verdict
    misses: int
    ids: np.ndarray


class RoutingLog:
    """The ring through which the device tells the host what was routed; one per model, for accesses of equal size.

    Entries and progress stand in RAM that the device maps. One thread reads.
    """

    def __init__(self, ring: torch.Tensor, progress: torch.Tensor) -> None:
        """ring: int32 [entries, 3 + pairs] of zeros. progress: int32 [2] of zeros."""
        assert ring.dtype == progress.dtype == torch.int32
        self.ring, self.progress = ring, progress
        self._entries, self._progress = ring.numpy(), progress.numpy()

    def read(self) -> Iterator[Entry]:
        """The entries that were written since, oldest first; each makes room for another one when it is taken.

        Raises:
            OffmoeError: an entry cannot be one: the memory was overwritten.
        """
        while self._progress[0] != self._progress[1]:
            layer, verdict, misses, *ids = self._entries[self._progress[1] % len(self._entries)].tolist()
            if verdict not in (Verdict.ASSIGNED, Verdict.TOO_FEW_VICTIMS, Verdict.NOT_IN_RAM) or misses > len(ids):
                raise OffmoeError(f"the device's log is damaged: verdict {verdict}, {misses} misses of {len(ids)} ids.")
            self._progress[1] += 1
            yield Entry(layer, Verdict(verdict), misses, np.array(ids, dtype=np.int32))


class RoutedLayer:
    """The state of one layer on the device, and the launches of one access."""

    def __init__(
        self,
        index: int,
        experts: int,
        top_k: int,
        num_named: int,
        rows: int,
        memory: torch.Tensor,
        log: RoutingLog,
        full_grid: int = FULL_GRID,
        launch: Launch = launch_kernel,
    ) -> None:
        """Prepare; nothing has a slot.

        Args:
            index: of the MoE layer.
            experts, top_k: of the layer.
            num_named: most places of a list.
            rows: tokens of every access.
            memory: uint8 on the device, in which places are counted.
            full_grid: the least number of programs that a launch of rows should have.
        """
        from offmoe.compute.kernels.triton import routed  # imports Triton: where `device.available`, only

        device, pairs = memory.device, rows * top_k
        assert log.ring.shape[1] == 3 + pairs
        self._index, self._experts, self._top_k, self._rows, self._full_grid = index, experts, top_k, rows, full_grid
        self._memory, self._log, self._launch, self._kernels = memory, log, launch, routed
        self._most_experts, self._most_named = (1 << max(1, n - 1).bit_length() for n in (experts, num_named))
        self.places = torch.full((experts,), NOWHERE, dtype=torch.int32, device=device)
        """int32 [experts]: where each expert's slot starts in `memory`, in units of 256 bytes."""
        self.named = torch.full((self._most_named, 2), NOWHERE, dtype=torch.int32, device=device)
        """int32 [named, 2]: (place, expert that holds it), in the order in which misses take them."""
        self.sources = torch.zeros(experts, dtype=torch.int64, device=device)
        """int64 [experts]: the address of each expert in mapped RAM; 0: it is not there."""
        self.moves = torch.zeros(pairs, 2, dtype=torch.int32, device=device)
        self.count = torch.zeros(1, dtype=torch.int32, device=device)

    def leave(self, places: Sequence[tuple[int, int]]) -> None:
        """Leave the list that the next access takes slots from.

        Args:
            places: (first byte of a slot from `memory` on, expert that holds it or NOWHERE), in order.
        """
        assert len(places) <= self._most_named
        table = np.full((self._most_named, 2), NOWHERE, dtype=np.int32)
        for i, (start, expert) in enumerate(places):
            assert start % PARAM_ALIGNMENT == 0
            table[i] = start // PARAM_ALIGNMENT, expert
        self.named.copy_(torch.from_numpy(table))

    def assign(self, ids: torch.Tensor) -> None:
        """Place the missed experts of an access. ids: int64 [rows, top_k] on the device, as routed."""
        assert ids.shape == (self._rows, self._top_k)
        assert ids.dtype == torch.int64
        log, pairs = self._log, ids.numel()
        state = self.places, self.named, self.sources, self.moves, self.count, log.ring, log.progress, self._index
        sizes = {"PAIRS": pairs, "EXPERTS": self._experts, "ENTRIES": len(log.ring)}
        powers = {"E": self._most_experts, "V": self._most_named}
        self._launch(self._kernels.assign, (1, 1), (ids.contiguous(), *state), sizes | powers | COMPILER)

    def gather(self, pieces: torch.Tensor) -> None:
        """Copy the experts that `assign` placed from RAM into their slots.

        Args:
            pieces: int64 [n, 3] on the device: (offset in RAM, offset in the slot, words of 4 bytes) of an expert's
                parts, all offsets multiples of 4.
        """
        arguments = self.moves, self.count, self.sources, self._memory, pieces
        sizes = {"PIECES": len(pieces), "BLOCK": COPY_WORDS}
        self._launch(self._kernels.gather, (len(self.moves), COPY_PROGRAMS), arguments, sizes | COMPILER)

    def compute(
        self, operands: GatedOperands, glu: Glu, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, in router order and float32.

        Args:
            hidden: [rows, H]. ids: int64 [rows, top_k], as routed. weights: [rows, top_k].

        Returns:
            [rows, H] of hidden's dtype. An id that is no expert's adds nothing; a token with an expert that has no slot
            is NaN.
        """
        from offmoe.compute.kernels.triton import decode

        o, pairs = operands, ids.numel()
        assert hidden.shape == (self._rows, o.hidden)
        hidden, ids = hidden.contiguous(), ids.contiguous()
        h = torch.empty(pairs, o.inner, dtype=torch.float32, device=hidden.device)  # [T * k, I]
        out = torch.empty_like(hidden)  # [T, H]
        order = None if self._rows == 1 else torch.arange(pairs, device=hidden.device)  # [T * k]
        sizes = decode_blocks(o.gate, pairs, self._full_grid)
        up = self._memory, self.places, order, hidden, h, self._top_k, o.gate, o.up, glu
        routed = {"ids": ids, "EXPERTS": self._experts}
        self._launch(decode.gate_up_rows, (pairs, -(-o.inner // sizes["BN"])), up, sizes | routed)
        sizes = reduced_blocks(o.down, self._rows, self._full_grid)
        down = self._memory, self.places, ids, weights.contiguous(), h, out, o.down, self._top_k, self._experts
        self._launch(self._kernels.down_reduced, (self._rows, -(-o.hidden // sizes["BN"])), down, sizes)
        return out


def reduced_blocks(weight: Operand, rows: int, full_grid: int = FULL_GRID) -> dict[str, int]:
    """Rows and elements that a `down_reduced` program takes at a time. A program reads all experts of its token, so
    fewer rows than in `decode` fill the grid."""
    block = next((n for n in (32, 16, 8) if weight.rows % n == 0 and rows * weight.rows >= n * full_grid), 4)
    return {"BN": block, "BW": STEP[weight.element], **COMPILER}
