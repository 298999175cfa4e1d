"""Memory that experts land in: fixed slots on the device, and page-aligned staging buffers on the host.

Both are allocated once. Slots are the only device memory of experts, so their number is the cap; there is nothing to
fragment and nothing to free in between. Staging buffers stand on 2 MiB pages where the platform has them: an unbuffered
read of 50 MB then pins 25 pages instead of 12,000 (two to three times the throughput on a virtual disk, an eighth of
the CPU), and they are touched before the first read, not inside it.

What it must never do: know which expert is where (that is Residency's), or unmap memory that a tensor still shows.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from offmoe.errors import CapacityError, OffmoeError
from offmoe.storage.layout import PARAM_ALIGNMENT, ExpertLayout, aligned

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 * 1024 * 1024

Register = Callable[[int, int], bool]
"""register(address, nbytes) -> whether the pages are now pinned for the device."""


class SlotArena:
    """Slots of one device in one allocation: slot i is bytes of `layouts[i]`, aligned, one after the other.

    Scratch slots in RAM, where the host computes, may follow."""

    def __init__(
        self,
        allocate: Callable[[int], torch.Tensor],
        layouts: Sequence[ExpertLayout],
        *,
        in_ram: Sequence[ExpertLayout] = (),
    ) -> None:
        """Allocate every slot at once.

        allocate(nbytes) -> uint8 [nbytes] on the device, aligned to PARAM_ALIGNMENT. layouts: one per slot; a slot
        takes any layout that is no larger, so a pool shared by layers gives each slot the largest. in_ram: of slots on
        the host. CapacityError if the system does not give the memory.
        """
        sizes = [aligned(layout.nbytes, PARAM_ALIGNMENT) for layout in layouts]
        self.nbytes = sum(sizes)
        """Bytes of device memory, all of it."""
        self.on_device = len(sizes)
        """The first so many slots are on the device."""
        base = allocate(self.nbytes)
        assert base.dtype is torch.uint8
        assert base.shape == (self.nbytes,)
        assert base.data_ptr() % PARAM_ALIGNMENT == 0, "the backend must allocate slots aligned to PARAM_ALIGNMENT"
        self.memory = base
        """All slots: uint8 [nbytes]."""
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        """Where in it each begins."""
        self._slots: list[torch.Tensor] = list(base.split(sizes)) if sizes else []
        if in_ram:
            sizes = [aligned(layout.nbytes, PARAM_ALIGNMENT) for layout in in_ram]
            self._slots += torch.frombuffer(map_pages(sum(sizes)), dtype=torch.uint8).split(sizes)
        # Keyed by the layout's id, because hashing a layout walks all of its parameters; _layouts keeps the ids alive.
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self._layouts: dict[int, ExpertLayout] = {}
        self._making = threading.Lock()

    def __len__(self) -> int:
        return len(self._slots)

    def bytes(self, slot: int) -> torch.Tensor:
        """The slot's memory: uint8 [aligned nbytes of its layout]."""
        return self._slots[slot]

    def views(self, slot: int, layout: ExpertLayout) -> dict[str, torch.Tensor]:
        """The slot as the parameters of an expert of `layout`; made once per slot and layout, then one look-up."""
        found = self._views.get((slot, id(layout)))
        if found is not None:
            return found
        with self._making:  # readers and compute both come here
            return self._new_views(slot, layout)

    def close(self) -> None:
        """Let go of the memory, which is free once nothing computes with it any more; idempotent. What a model leaves
        behind waits for the garbage collector, and should not hold its slots until then.
        """
        with self._making:
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
    """The layout that sizes each slot: its layer's, or with scope "model" the largest, since any layer may use it."""
    if scope == "model":
        return [max(layouts, key=lambda layout: layout.nbytes)] * sum(slots_per_layer)
    return [layout for layout, quota in zip(layouts, slots_per_layer, strict=True) for _ in range(quota)]


class HostBuffers:
    """`count` staging buffers of equal size: page-aligned, touched, not inherited by forks, pinned if a backend can."""

    def __init__(
        self,
        count: int,
        nbytes: int,
        *,
        register: Register | None = None,
        unregister: Callable[[int], object] | None = None,
    ) -> None:
        """Map the buffers, each of `nbytes` rounded up to whole pages.

        register: pins one buffer; after the first refusal the remaining buffers stay pageable (a refusal is a limit of
        the machine, and asking again costs). unregister(address) undoes it in `close`. Raises CapacityError if the
        system does not give the memory.
        """
        assert count > 0
        assert nbytes > 0
        self.nbytes = aligned(nbytes, PAGE_BYTES)
        """Bytes of one buffer."""
        self._unregister = unregister
        self._registered: list[int] = []
        pages = map_pages(count * self.nbytes)
        starts = range(0, count * self.nbytes, self.nbytes)
        self._memory = [pages[start : start + self.nbytes] for start in starts]
        # A storage per buffer: torch asks the storage's address, not the view's, whether memory is pinned.
        self._tensors = [torch.frombuffer(memory, dtype=torch.uint8) for memory in self._memory]
        self._pinned = [False] * count
        try:
            for i, tensor in enumerate(self._tensors):
                if register is None or not register(tensor.data_ptr(), self.nbytes):
                    break
                self._registered.append(tensor.data_ptr())
                self._pinned[i] = True
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._tensors)

    def tensor(self, i: int) -> torch.Tensor:
        """Buffer i for copies: uint8 [nbytes], page-aligned, a storage of its own."""
        return self._tensors[i]

    def memory(self, i: int) -> memoryview:
        """Buffer i for `ExpertStore.read_into`."""
        return self._memory[i]

    def pinned(self, i: int) -> bool:
        """Whether copies from buffer i can be asynchronous."""
        return self._pinned[i]

    def close(self) -> None:
        """Unpin and let go of the memory, which is unmapped with the last tensor on it. No copy may be under way."""
        registered, self._registered = self._registered, []
        for address in registered:
            if self._unregister is not None:
                self._unregister(address)
        self._pinned = [False] * len(self._pinned)
        self._tensors, self._memory = [], []


def map_pages(nbytes: int) -> memoryview:
    """Zeroed, touched memory of `nbytes` bytes, aligned to 2 MiB; unmapped when nothing refers to it any more.

    On Linux it is private, on huge pages if the kernel grants them, and not inherited by forks (an unbuffered read into
    memory that a fork shares is undefined). Raises CapacityError if the system does not give the memory.
    """
    size = nbytes + HUGE_PAGE_BYTES
    try:
        if hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS"):
            mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            mapping = mmap.mmap(-1, size)
    except (OSError, MemoryError, OverflowError, ValueError) as error:
        raise CapacityError(
            f"the system does not give {nbytes / 2**30:.2f} GiB of memory for staging ({error}); lower host_memory"
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
