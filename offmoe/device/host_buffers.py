"""Page-aligned buffers on the host: experts are read into them and copied out of them.

Moves: nothing.
Bound: buffers are mapped when the model is loaded or resized. They are on pages of 2 MiB where the platform has them:
an unbuffered read of 50 MB then pins 25 pages instead of 12,000, which gave two to three times the throughput on a
virtual disk at an eighth of the CPU time. A few buffers are touched and pinned at once, so that no read has to; the
many of a RAM tier are pinned in the background (pinning.py), because that takes a second for some GiB.
Must never: unmap memory that a tensor still refers to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from offmoe.device.backend import Backend
from offmoe.device.blocks import Place, rearrange
from offmoe.device.pages import PAGE_BYTES, map_pages
from offmoe.device.pinning import OnRefusal, PinProgress, Pins
from offmoe.storage.layout import aligned


class Buffer(NamedTuple):
    """One host buffer: as memory to read into, as a tensor uint8 [nbytes], and its address."""

    memory: memoryview
    tensor: torch.Tensor
    address: int


class HostBuffers:
    """Host buffers of equal size: page-aligned, not inherited by forks, and pinned if possible."""

    def __init__(
        self,
        count: int,
        nbytes: int,
        *,
        pinning: Backend | None = None,
        later: bool = False,
        on_refusal: OnRefusal = lambda pinned, total: None,
    ) -> None:
        """Map the buffers, and touch and pin them, now or later.

        Args:
            count: Number of buffers. With 0, `prepare` maps the first ones.
            nbytes: Bytes of each; rounded up to whole pages.
            pinning: The device to pin them for; None leaves them pageable.
            later: Whether a thread pins them in the background, those that were `filled` first. Pinning touches them.
            on_refusal: As `Pins` takes it. The remaining buffers stay pageable.

        Raises:
            CapacityError: The system does not give the memory.
        """
        assert nbytes > 0
        self.nbytes = aligned(nbytes, PAGE_BYTES)
        """Bytes of one buffer."""
        self._pins = None if pinning is None else Pins(pinning, self.nbytes, on_refusal)
        self._later = later and pinning is not None
        self._filled: set[int] = set()
        """Addresses of the buffers that were said to be filled."""
        self._blocks: list[list[Buffer]] = []
        """By block, its buffers."""
        self._places: tuple[Place, ...] = ()
        """By buffer, where it is."""
        self._buffers: list[Buffer] = []
        self.prepare(count, {})()

    def prepare(self, count: int, keep: Mapping[int, int]) -> Callable[[], None]:
        """Map what another number of buffers needs, and change nothing yet.

        Args:
            count: New number of buffers.
            keep: By new buffer, the buffer whose bytes it is to hold.

        Returns:
            A function that changes to the new buffers and gives back what they do not need. No copy may be under way.

        Raises:
            CapacityError: The system does not give the memory.
        """
        change = rearrange([[self.nbytes] * len(b) for b in self._blocks], self._places, [self.nbytes] * count, keep)
        new = [self._map_block(len(block)) for block in change.new]
        blocks = [self._blocks[block] for block in change.kept] + new

        def commit() -> None:
            for before, after in change.moves:
                blocks[after.block][after.position].tensor.copy_(self._blocks[before.block][before.position].tensor)
            gone = [buffer.address for i, b in enumerate(self._blocks) if i not in change.kept for buffer in b]
            if self._pins is not None:
                self._pins.remove(gone)
            self._filled.difference_update(gone)
            self._blocks, self._places = blocks, change.places
            self._buffers = [blocks[place.block][place.position] for place in change.places]
            self._pin([buffer.address for block in new for buffer in block])
            for i in keep:
                self.filled(i)

        return commit

    def __len__(self) -> int:
        return len(self._buffers)

    def tensor(self, i: int) -> torch.Tensor:
        """Buffer i for copies: uint8 [nbytes], page-aligned, with a storage of its own."""
        return self._buffers[i].tensor

    def memory(self, i: int) -> memoryview:
        """Buffer i for `ExpertStore.read_into`."""
        return self._buffers[i].memory

    def pinned(self, i: int) -> bool:
        """Whether buffer i is pinned, so that copies from it are asynchronous. It stays so while it is in use."""
        return self._pins is not None and self._buffers[i].address in self._pins

    def filled(self, i: int) -> None:
        """Note that buffer i holds bytes that will be copied: it is pinned before buffers that do not."""
        address = self._buffers[i].address
        if self._later and address not in self._filled:
            assert self._pins is not None
            self._filled.add(address)
            self._pins.hurry(address)

    @property
    def pin_progress(self) -> PinProgress:
        """How many buffers are pinned. Any thread may ask."""
        if self._pins is None:
            return PinProgress()
        return PinProgress(sum(b.address in self._pins for b in self._buffers), len(self), self._pins.refused)

    @property
    def untouched_bytes(self) -> int:
        """Bytes that are promised, and that the system has not taken from free memory yet."""
        if self._pins is None or not self._later:
            return 0
        addresses = [buffer.address for buffer in self._buffers]
        return self.nbytes * sum(not (address in self._filled or address in self._pins) for address in addresses)

    def close(self) -> None:
        """Unpin the buffers and release the memory; idempotent. No copy may be under way.

        The memory is unmapped with the last tensor that refers to it.
        """
        if self._pins is not None:
            self._pins.close()
        self._buffers, self._blocks = [], []

    def _map_block(self, count: int) -> list[Buffer]:
        pages = map_pages(count * self.nbytes, touch=not self._later)
        memory = [pages[start : start + self.nbytes] for start in range(0, count * self.nbytes, self.nbytes)]
        # A storage per buffer: torch looks at the storage's address, not the view's, to see whether memory is pinned.
        tensors = [torch.frombuffer(part, dtype=torch.uint8) for part in memory]
        return [Buffer(part, tensor, tensor.data_ptr()) for part, tensor in zip(memory, tensors, strict=True)]

    def _pin(self, addresses: Sequence[int]) -> None:
        if self._pins is not None:
            (self._pins.add_later if self._later else self._pins.add)(addresses)
