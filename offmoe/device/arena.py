"""The memory that experts land in: fixed slots, and page-aligned buffers on the host.

Moves: nothing.
Bound: both are allocated once. Slots are the only device memory of experts, so their number is the cap, and nothing is
fragmented or freed in between. Host buffers are on pages of 2 MiB where the platform has them: an unbuffered read of
50 MB then pins 25 pages instead of 12,000, which gave two to three times the throughput on a virtual disk at an eighth
of the CPU time. Buffers are touched before the first read, not during it.
Must never: know which expert is where (policy/residency.py does), or unmap memory that a tensor still refers to.
"""

from __future__ import annotations

import itertools
import mmap
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from offmoe.device.backend import Backend
from offmoe.errors import CapacityError, OffmoeError
from offmoe.storage.layout import PARAM_ALIGNMENT, ExpertLayout, aligned

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 * 1024 * 1024


class SlotArena:
    """The slots of one model, in one allocation on the device; scratch slots in RAM may follow."""

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
        sizes = [aligned(layout.nbytes, PARAM_ALIGNMENT) for layout in layouts]
        self.nbytes = sum(sizes)
        """Bytes of device memory."""
        self.num_on_device = len(sizes)
        """Number of slots on the device; higher slot numbers are in RAM."""
        base = allocate(self.nbytes)
        assert base.dtype is torch.uint8
        assert base.shape == (self.nbytes,)
        assert base.data_ptr() % PARAM_ALIGNMENT == 0, "the backend must allocate slots aligned to PARAM_ALIGNMENT"
        self.memory = base
        """All device slots: uint8 [nbytes]."""
        self.starts = list(itertools.accumulate(sizes, initial=0))[:-1]
        """Per device slot, the offset in `memory` at which it begins."""
        self._slots: list[torch.Tensor] = list(base.split(sizes)) if sizes else []
        if in_ram:
            sizes = [aligned(layout.nbytes, PARAM_ALIGNMENT) for layout in in_ram]
            self._slots += torch.frombuffer(map_pages(sum(sizes)), dtype=torch.uint8).split(sizes)
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        """By (slot, id of the layout): a hash of the layout itself would walk all of its parameters."""
        self._layouts: dict[int, ExpertLayout] = {}
        """By id; keeps the layouts alive, so that no id is used twice."""
        self._views_lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._slots)

    def bytes(self, slot: int) -> torch.Tensor:
        """The memory of a slot: uint8 [aligned nbytes of its layout]."""
        return self._slots[slot]

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
            self.memory, self._slots = self.memory.new_empty(0), []
            self._views.clear()
            self._layouts.clear()

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


class HostBuffers:
    """Host buffers of equal size: page-aligned, touched, not inherited by forks, and pinned if possible."""

    def __init__(self, count: int, nbytes: int, *, pinning: Backend | None = None) -> None:
        """Map and pin the buffers.

        Args:
            count: Number of buffers.
            nbytes: Bytes of each; rounded up to whole pages.
            pinning: The device to pin them for; None leaves them pageable. After the first refusal the remaining
                buffers stay pageable, because a refusal is a limit of the machine and each further attempt costs time.

        Raises:
            CapacityError: The system does not give the memory.
        """
        assert count > 0
        assert nbytes > 0
        self.nbytes = aligned(nbytes, PAGE_BYTES)
        """Bytes of one buffer."""
        self._pinning = pinning
        self._pinned: list[int] = []
        """Addresses of the pinned buffers, which are the first ones."""
        pages = map_pages(count * self.nbytes)
        starts = range(0, count * self.nbytes, self.nbytes)
        self._memory = [pages[start : start + self.nbytes] for start in starts]
        # A storage per buffer: torch looks at the storage's address, not the view's, to see whether memory is pinned.
        self._tensors = [torch.frombuffer(memory, dtype=torch.uint8) for memory in self._memory]
        try:
            for tensor in self._tensors:
                if pinning is None or not pinning.pin(tensor.data_ptr(), self.nbytes):
                    break
                self._pinned.append(tensor.data_ptr())
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._tensors)

    def tensor(self, i: int) -> torch.Tensor:
        """Buffer i for copies: uint8 [nbytes], page-aligned, with a storage of its own."""
        return self._tensors[i]

    def memory(self, i: int) -> memoryview:
        """Buffer i for `ExpertStore.read_into`."""
        return self._memory[i]

    def pinned(self, i: int) -> bool:
        """Whether buffer i is pinned, so that copies from it are asynchronous."""
        return i < len(self._pinned)

    def close(self) -> None:
        """Unpin the buffers and release the memory; idempotent. No copy may be under way.

        The memory is unmapped with the last tensor that refers to it.
        """
        pinned, self._pinned = self._pinned, []
        for address in pinned:
            assert self._pinning is not None
            self._pinning.unpin(address)
        self._tensors, self._memory = [], []


def map_pages(nbytes: int) -> memoryview:
    """Map zeroed, touched memory of `nbytes` bytes, aligned to 2 MiB. It is unmapped when nothing refers to it.

    On Linux it is private, on huge pages if the kernel grants them, and not inherited by forks, because an unbuffered
    read into memory that a fork shares is undefined.

    Raises:
        CapacityError: The system does not give the memory.
    """
    size = nbytes + HUGE_PAGE_BYTES
    try:
        if hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS"):
            mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            mapping = mmap.mmap(-1, size)
    except (OSError, MemoryError, OverflowError, ValueError) as error:
        raise CapacityError(
            f"the system does not give {nbytes / 2**30:.2f} GiB of memory for staging ({error}); lower --host-memory"
        ) from error
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        value = getattr(mmap, advice, None)
        if value is not None and hasattr(mapping, "madvise"):
            with suppress(OSError):  # a kernel built without it; only speed, or forks, depend on it
                mapping.madvise(value)
    start = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % HUGE_PAGE_BYTES
    pages = memoryview(mapping)[start : start + nbytes]
    torch.frombuffer(pages, dtype=torch.uint8)[::PAGE_BYTES] = 0
    return pages
