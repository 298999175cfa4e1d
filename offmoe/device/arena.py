"""The memory that experts land in: fixed slots.

Moves: nothing.
Bound: slots are allocated when the model is loaded or resized. They are the only device memory of experts, so their
number is the cap, and nothing is fragmented or freed in between.
Must never: know which expert is where (policy/residency.py does).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from offmoe.device.blocks import Place, rearrange
from offmoe.device.pages import map_pages
from offmoe.errors import CLOSED, OffmoeError
from offmoe.storage.layout import PARAM_ALIGNMENT, ExpertLayout, aligned


class Block(NamedTuple):
    """Slots in one allocation.

    memory: uint8 [bytes of all]. sizes: bytes of each slot. starts: its first byte.
    """

    memory: torch.Tensor
    sizes: Sequence[int]
    starts: Sequence[int]


class SlotArena:
    """The slots of one model, in a few allocations on the device; scratch slots in RAM may follow."""

    def __init__(
        self,
        allocate: Callable[[int], torch.Tensor],
        layouts: Sequence[ExpertLayout],
        *,
        in_ram: Sequence[ExpertLayout] = (),
    ) -> None:
        """Allocate all slots.

        Args:
            allocate: allocate(nbytes) -> uint8 [nbytes] on the device, aligned to PARAM_ALIGNMENT.
            layouts: One per device slot. A slot takes experts of any layout that is no larger, so a pool that layers
                share gives each slot the largest.
            in_ram: One per scratch slot in RAM, for experts that the host computes. They are numbered after the others.

        Raises:
            CapacityError: The system does not give the memory.
        """
        self._allocate = allocate
        self.nbytes = 0
        """Bytes of device memory."""
        self.num_on_device = 0
        """Number of slots on the device; higher slot numbers are in RAM."""
        self.memory = torch.empty(0, dtype=torch.uint8)
        """Device memory at whose address `starts` begin: uint8, the block of slots at the lowest address."""
        self.starts: list[int] = []
        """Per device slot, the bytes from the address of `memory` to its own."""
        self._blocks: list[Block] = []
        self._places: tuple[Place, ...] = ()
        """By device slot, where it is."""
        self._slots: dict[int, torch.Tensor] = {}
        """By slot, its memory, once something has asked for it: 24,576 tensors took 0.1 s."""
        self._scratch: list[torch.Tensor] = []
        """The scratch slots in RAM."""
        self._in_ram: tuple[int, ...] = ()
        """Bytes of the scratch slots in RAM."""
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        """By (slot, id of the layout): a hash of the layout itself would walk all of its parameters."""
        self._layouts: dict[int, ExpertLayout] = {}
        """By id; keeps the layouts alive, so that no id is used twice."""
        self._views_lock = threading.Lock()
        self.prepare(layouts, {}, in_ram=in_ram)()

    def __len__(self) -> int:
        return self.num_on_device + len(self._scratch)

    def bytes(self, slot: int) -> torch.Tensor:
        """The memory of a slot: uint8 [aligned nbytes of its layout].

        Raises:
            OffmoeError: The arena is closed.
        """
        memory = self._slots.get(slot)
        if memory is None:
            if not len(self):
                raise OffmoeError(CLOSED)
            if slot < self.num_on_device:
                memory = self._at(self._blocks, self._places[slot])
            else:
                memory = self._scratch[slot - self.num_on_device]
            self._slots[slot] = memory
        return memory

    def prepare(
        self, layouts: Sequence[ExpertLayout], keep: Mapping[int, int], *, in_ram: Sequence[ExpertLayout] = ()
    ) -> Callable[[], None]:
        """Allocate what another division into slots needs, and change nothing yet.

        Args:
            layouts: One per new device slot.
            keep: By new device slot, the device slot whose bytes it is to hold.
            in_ram: One per new scratch slot in RAM. Scratch slots keep no bytes.

        Returns:
            A function that changes to the new division and gives back what it does not need. No copy may be under way.

        Raises:
            CapacityError: The system does not give the memory.
        """
        different = {id(layout): layout for layout in layouts}
        of_layout = {i: aligned(layout.nbytes, PARAM_ALIGNMENT) for i, layout in different.items()}
        sizes = [of_layout[id(layout)] for layout in layouts]
        change = rearrange([block.sizes for block in self._blocks], self._places, sizes, keep)
        blocks = [self._blocks[block] for block in change.kept] + [self._block(block) for block in change.new]
        ram_sizes = tuple(aligned(layout.nbytes, PARAM_ALIGNMENT) for layout in in_ram)
        scratch = self._scratch
        if ram_sizes != self._in_ram:
            scratch = list(torch.frombuffer(map_pages(sum(ram_sizes)), dtype=torch.uint8).split(list(ram_sizes)))

        def commit() -> None:
            with self._views_lock:
                for before, after in change.moves:
                    self._at(blocks, after).copy_(self._at(self._blocks, before))
                self._blocks, self._places, self._in_ram = blocks, change.places, ram_sizes
                self.nbytes, self.num_on_device, self._scratch = sum(sizes), len(sizes), scratch
                self._slots.clear()
                self._views.clear()
                self._layouts.clear()
                if blocks:
                    self.memory = min([block.memory for block in blocks], key=torch.Tensor.data_ptr)
                    base = self.memory.data_ptr()
                    firsts = [block.memory.data_ptr() - base for block in blocks]
                    self.starts = [firsts[block] + blocks[block].starts[i] for block, i in change.places]

        return commit

    def views(self, slot: int, layout: ExpertLayout) -> dict[str, torch.Tensor]:
        """The slot as the parameters of an expert of `layout`; after the first call one look-up.

        Raises:
            OffmoeError: The arena is closed.
        """
        views = self._views.get((slot, id(layout)))
        if views is not None:
            return views
        with self._views_lock:  # readers and the computing thread may both be first
            return self._new_views(slot, layout)

    def close(self) -> None:
        """Release the memory as soon as nothing computes with it; idempotent.

        A closed model may wait long for the garbage collector, and should not hold its slots until then.
        """
        with self._views_lock:
            self.memory, self._blocks, self._places = self.memory.new_empty(0), [], ()
            self.num_on_device, self._scratch = 0, []
            self._slots.clear()
            self._views.clear()
            self._layouts.clear()

    @staticmethod
    def _at(blocks: Sequence[Block], place: Place) -> torch.Tensor:
        """The memory of a slot that is there."""
        block = blocks[place.block]
        start = block.starts[place.position]
        return block.memory[start : start + block.sizes[place.position]]

    def _block(self, sizes: Sequence[int]) -> Block:
        """Slots of these bytes in one allocation."""
        base = self._allocate(sum(sizes))
        assert base.dtype is torch.uint8
        assert base.shape == (sum(sizes),)
        assert base.data_ptr() % PARAM_ALIGNMENT == 0, "the backend must allocate slots aligned to PARAM_ALIGNMENT"
        return Block(base, sizes, [0, *accumulate(sizes[:-1])])

    def _new_views(self, slot: int, layout: ExpertLayout) -> dict[str, torch.Tensor]:
        memory = self.bytes(slot)
        assert layout.nbytes <= memory.numel()
        # Layers with equal layouts share one set of views: a pool would otherwise hold slots x layers of them.
        same = next((known for known in self._layouts.values() if known == layout), layout)
        self._layouts[id(layout)] = layout
        views = self._views.get((slot, id(same)))
        if views is None:
            self._layouts[id(same)] = same
            views = self._views[slot, id(same)] = same.views(memory)
        self._views[slot, id(layout)] = views
        return views


def slot_layouts(layouts: Sequence[ExpertLayout], slots_per_layer: Sequence[int], scope: str) -> list[ExpertLayout]:
    """The layout that each slot is sized for.

    Args:
        layouts: One per MoE layer.
        slots_per_layer: One per MoE layer.
        scope: "layer": each layer has slots of its own, of its layout. "model": layers share the slots, which then all
            have the largest layout.
    """
    if scope == "model":
        return [max(layouts, key=lambda layout: layout.nbytes)] * sum(slots_per_layer)
    return [layout for layout, quota in zip(layouts, slots_per_layer, strict=True) for _ in range(quota)]
