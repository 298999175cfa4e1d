"""The memory that experts land in: fixed slots.

Moves: nothing.
Bound: slots are allocated when the model is loaded or resized. They are the only device memory of experts, so their
number is the cap, and nothing is fragmented or freed in between.
Must never: know which expert is where (policy/residency.py does).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from offmoe.device.blocks import Place, rearrange
from offmoe.device.pages import map_pages
from offmoe.errors import OffmoeError
from offmoe.storage.layout import PARAM_ALIGNMENT, ExpertLayout, aligned


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
        self._blocks: list[tuple[torch.Tensor, ...]] = []
        """By block, its slots."""
        self._places: tuple[Place, ...] = ()
        """By device slot, where it is."""
        self._slots: list[torch.Tensor] = []
        self._in_ram: tuple[int, ...] = ()
        """Bytes of the scratch slots in RAM."""
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        """By (slot, id of the layout): a hash of the layout itself would walk all of its parameters."""
        self._layouts: dict[int, ExpertLayout] = {}
        """By id; keeps the layouts alive, so that no id is used twice."""
        self._views_lock = threading.Lock()
        self.prepare(layouts, {}, in_ram=in_ram)()

    def __len__(self) -> int:
        return len(self._slots)

    def bytes(self, slot: int) -> torch.Tensor:
        """The memory of a slot: uint8 [aligned nbytes of its layout]."""
        return self._slots[slot]

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
        sizes = [aligned(layout.nbytes, PARAM_ALIGNMENT) for layout in layouts]
        old = [[slot.numel() for slot in block] for block in self._blocks]
        change = rearrange(old, self._places, sizes, keep)
        blocks = [self._blocks[block] for block in change.kept] + [self._block(block) for block in change.new]
        ram_sizes = tuple(aligned(layout.nbytes, PARAM_ALIGNMENT) for layout in in_ram)
        scratch = self._slots[self.num_on_device :]
        if ram_sizes != self._in_ram:
            scratch = list(torch.frombuffer(map_pages(sum(ram_sizes)), dtype=torch.uint8).split(list(ram_sizes)))

        def commit() -> None:
            with self._views_lock:
                for before, after in change.moves:
                    blocks[after.block][after.position].copy_(self._blocks[before.block][before.position])
                self._blocks, self._places, self._in_ram = blocks, change.places, ram_sizes
                on_device = [blocks[place.block][place.position] for place in change.places]
                self._slots = [*on_device, *scratch]
                self.nbytes, self.num_on_device = sum(sizes), len(sizes)
                self._views.clear()
                self._layouts.clear()
                if on_device:
                    self.memory = _whole(min(blocks, key=lambda block: block[0].data_ptr()))
                    base = self.memory.data_ptr()
                    self.starts = [slot.data_ptr() - base for slot in on_device]

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
            self.memory, self._slots, self._blocks = self.memory.new_empty(0), [], []
            self._views.clear()
            self._layouts.clear()

    def _block(self, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Slots of these bytes in one allocation."""
        base = self._allocate(sum(sizes))
        assert base.dtype is torch.uint8
        assert base.shape == (sum(sizes),)
        assert base.data_ptr() % PARAM_ALIGNMENT == 0, "the backend must allocate slots aligned to PARAM_ALIGNMENT"
        return tuple(torch.split(base, list(sizes)))

    def _new_views(self, slot: int, layout: ExpertLayout) -> dict[str, torch.Tensor]:
        if not self._slots:
            raise OffmoeError("the model was closed; load it again with from_pretrained.")
        memory = self._slots[slot]
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


def _whole(block: Sequence[torch.Tensor]) -> torch.Tensor:
    """The memory of a block's slots: uint8 [bytes]."""
    first = block[0]
    return first.as_strided((sum(slot.numel() for slot in block),), (1,), first.storage_offset())


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
