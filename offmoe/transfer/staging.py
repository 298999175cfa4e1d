"""The host memory that experts pass through: staging buffers, and the RAM slots of the host tier.

Moves: nothing.
Bound: memory that is pinned and, on a CPU, is missing for slots.
Must never: give out fewer staging buffers than experts are read at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

from offmoe.device.backend import Backend, Event
from offmoe.device.host_buffers import HostBuffers
from offmoe.device.pinning import PinProgress
from offmoe.io_limits import READERS

logger = logging.getLogger(__name__)

FEW_BYTES = 64 << 20
"""Experts above this size get as few staging buffers as possible."""
MOST_READ_AHEADS = 8
WINDOW_BYTES = 8 << 20
"""Bytes of a window of the background fill: small experts that are near each other on the disk are read at once."""
WINDOW_EXPERTS = 16
"""Most experts of a window. It keeps the windows of a model with tiny experts tiny."""


class StagingPlan(NamedTuple):
    """How many experts are under way at once, and the buffers that they need."""

    at_once: int
    """Experts that are read at once."""
    buffers: int
    """Staging buffers."""
    read_aheads: int
    """Buffers that read-aheads may hold."""


def staging_plan(buffer_bytes: int) -> StagingPlan:
    """Number of buffers for experts of this size.

    Experts above 64 MB are read two at once, each by several readers: while one is read, the other is copied. Two
    buffers then suffice, which is 0.7 GB for experts of 352 MB. Smaller experts have one buffer per reader, so that no
    read waits for the copy before it, and read-aheads may fill up to 64 MB.

    Args:
        buffer_bytes: Bytes of the buffer that any expert can be read into (`ExpertStore.buffer_bytes`).
    """
    if buffer_bytes > FEW_BYTES:
        return StagingPlan(READERS // 2, READERS // 2, 1)
    read_aheads = min(MOST_READ_AHEADS, max(2, FEW_BYTES // max(1, buffer_bytes)))
    return StagingPlan(READERS, READERS - 1 + read_aheads, read_aheads)


def window_bytes(buffer_bytes: int) -> int:
    """Bytes of a window of the background fill; 0 if experts are large enough to be read one by one.

    Args:
        buffer_bytes: Bytes of the buffer that any expert can be read into.
    """
    return 0 if buffer_bytes > WINDOW_BYTES // 2 else min(WINDOW_BYTES, WINDOW_EXPERTS * buffer_bytes)


class HostMemory:
    """Staging buffers and RAM slots of one model, each with an event that marks the last copy out of it.

    While a background fill reads small experts, there is also one window per reader, at most 32 MB in all.
    """

    def __init__(self, backend: Backend, buffer_bytes: int, num_slots: int) -> None:
        """Allocate everything, pin staging, and begin to pin RAM slots in the background.

        Args:
            backend: The device that pins the memory.
            buffer_bytes: Bytes of each buffer and slot.
            num_slots: RAM slots of the host tier.

        Raises:
            CapacityError: The system does not give the memory.
        """
        self._backend, self._buffer_bytes = backend, buffer_bytes
        self._is_said = False
        """Whether it was said that RAM slots could not be pinned."""
        self.windows: HostBuffers | None = None
        """The windows of the background fill; None while they are closed."""
        self.windows_copied: list[Event] = []
        """Per window: marks the last copy out of it."""
        self.plan = staging_plan(buffer_bytes)
        self.staging = HostBuffers(self.plan.buffers, buffer_bytes, pinning=backend)
        self.staging_copied = [backend.event(blocking=True) for _ in range(self.plan.buffers)]
        """Per staging buffer: marks the last copy out of it."""
        self.slots: HostBuffers | None = None
        """The RAM slots; None without a host tier."""
        try:  # staging comes first: where little can be pinned, everything passes through that little
            if num_slots:
                self.slots = self._new_slots(num_slots, num_slots)
        except BaseException:
            self.staging.close()
            raise
        self.slots_copied = [backend.event(blocking=True) for _ in range(num_slots)]
        """Per RAM slot: marks the last copy out of it."""

    def _new_slots(self, count: int, wanted: int) -> HostBuffers:
        """RAM slots where there were none; they are pinned in the background, unless the system refused staging.

        wanted: how many there will be.
        """
        if self.staging.pin_progress.refused:
            if wanted:
                self._say_pinned(0, wanted)
            return HostBuffers(count, self._buffer_bytes)
        return HostBuffers(count, self._buffer_bytes, pinning=self._backend, later=True, on_refusal=self._say_pinned)

    def _say_pinned(self, pinned: int, count: int) -> None:
        """Say, once, that the system pins no more RAM slots."""
        if not self._is_said:
            self._is_said = True
            logger.warning(
                "only %d of %d expert slots in RAM could be pinned for %s: experts in the other slots are copied once "
                "more on their way to it, and more slowly. A lower host_memory, or a higher limit of the system, "
                "avoids it.",
                pinned,
                count,
                self._backend.device,
            )

    @property
    def pin_progress(self) -> PinProgress:
        """How many RAM slots are pinned. Any thread may ask."""
        return PinProgress() if (slots := self.slots) is None else slots.pin_progress

    @property
    def untouched_bytes(self) -> int:
        """Bytes of RAM slots that still count as free memory, because nothing has been written there."""
        return 0 if self.slots is None else self.slots.untouched_bytes

    def prepare(self, num_slots: int, keep: Mapping[int, int]) -> Callable[[], None]:
        """Allocate what another number of RAM slots needs, and change nothing yet.

        Args:
            num_slots: new number of RAM slots.
            keep: by new RAM slot, the one whose bytes it is to hold.
        Returns:
            A function that changes to the new slots. No reader may be at work.
        Raises:
            CapacityError: The system does not give the memory.
        """
        slots = self._new_slots(0, num_slots) if self.slots is None else self.slots
        change = slots.prepare(num_slots, keep)

        def commit() -> None:
            for event in self.slots_copied:
                event.synchronize()
            change()
            if not num_slots:
                slots.close()
            self.slots = slots if num_slots else None
            self.slots_copied = [self._backend.event(blocking=True) for _ in range(num_slots)]

        return commit

    def needs_staging(self, host_slot: int | None) -> bool:
        """Whether an expert passes through a staging buffer on its way to the device.

        It does unless it has a RAM slot, and also from a RAM slot that is not pinned: a copy from pageable memory would
        hold up the copy stream.
        """
        if host_slot is None or self.slots is None:
            return True
        return self.staging.pinned(0) and not self.slots.pinned(host_slot)

    def filled(self, host_slot: int) -> None:
        """Note that a RAM slot holds an expert: it is pinned before empty ones."""
        assert self.slots is not None
        self.slots.filled(host_slot)

    def open_windows(self) -> int:
        """Allocate the windows of the background fill, if they are not; returns how many there are.

        Raises:
            CapacityError: The system does not give the memory.
        """
        if self.windows is None:
            self.windows = HostBuffers(READERS, window_bytes(self._buffer_bytes), pinning=self._backend)
            self.windows_copied = [self._backend.event(blocking=True) for _ in range(READERS)]
        return len(self.windows)

    def close_windows(self) -> None:
        """Wait for the last copies out of the windows and release them; idempotent. No batch may use one."""
        windows, self.windows = self.windows, None
        if windows is not None:
            for event in self.windows_copied:
                event.synchronize()
            windows.close()

    def close(self) -> None:
        """Wait for the last copies and release the memory; idempotent. No reader may be running."""
        self.close_windows()
        for event in (*self.staging_copied, *self.slots_copied):
            event.synchronize()
        self.staging.close()
        if self.slots is not None:
            self.slots.close()
