"""What RAM beside a device with memory of its own holds: slots of experts, and the buffers that experts pass through.

What moves: nothing. Slots take what the cap leaves beside staging, shared out equally among the layers that are not
whole on the device. Must never promise more than there is, in the machine or in the cgroups around the process."""

from __future__ import annotations

from dataclasses import dataclass

from offmoe.config import OffloadConfig
from offmoe.errors import CapacityError, ConfigError
from offmoe.storage.layout import aligned
from offmoe.storage.read_plan import ALIGNMENT
from offmoe.text import format_size
from offmoe.transfer.staging import staging_plan
from offmoe.types import CacheShape


@dataclass(frozen=True)
class HostPlan:
    """RAM beside a device with memory of its own, bytes: `budget` is the cap of staging buffers and experts' slots."""

    budget: int
    staging: int
    slots: int
    slots_per_layer: tuple[int, ...]
    scratch: int = 0
    """For experts that the host computes."""

    def describe(self) -> str:
        """One line for people."""
        experts = f"slots of {sum(self.slots_per_layer)} experts {format_size(self.slots)}"
        return f"{format_size(self.budget)} of RAM: {experts}, staging {format_size(self.staging)}" + (
            f", scratch {format_size(self.scratch)}" if self.scratch else ""
        )


def refuse_host_memory(config: OffloadConfig) -> None:
    """Raise ConfigError if `host_memory` is set for a device whose memory is the host's: it would mean nothing."""
    if config.host_memory not in ("auto", 0):
        raise ConfigError(
            f"host_memory={config.host_memory!r}: this device's memory is the RAM. Leave it at 'auto', and set "
            "device_memory to cap what experts take of it."
        )


def plan_host(
    config: OffloadConfig,
    shape: CacheShape,
    device_slots: tuple[int, ...],
    *,
    read_bytes: int,
    free: int,
    taken: int,
    scratch: int = 0,
) -> HostPlan:
    """Slots in RAM for as many experts as fit, for a device with memory of its own.

    read_bytes: of the buffer that any expert is read into. scratch: bytes for experts that the host computes. free: of
    what "auto" takes; taken: of these, what something else has been given. A layer that is whole on the device needs
    none, and none gets more than config.host_slots. CapacityError with the smallest host_memory that works.
    """
    slot = aligned(read_bytes, ALIGNMENT)
    staging = staging_plan(read_bytes).buffers * slot
    needed = staging + scratch
    budget = max(0, free - taken)
    if config.host_memory != "auto":
        budget = min(int(config.host_memory), budget) or needed  # 0: no experts, but they still pass through
    if budget < needed:
        raise CapacityError(
            f"host_memory, {format_size(budget)}, is too small: experts pass through {format_size(needed)} of staging "
            f"buffers ({needed} bytes), the smallest host_memory that works. {format_size(free)} of RAM can be had."
        )
    wanted = [
        0 if n >= e else m for n, e, m in zip(device_slots, shape.experts, config.most_in_ram(shape), strict=True)
    ]
    slots = share_out((budget - needed) // slot, wanted)
    return HostPlan(budget, staging, sum(slots) * slot, slots, scratch)


def share_out(slots: int, wanted: list[int]) -> tuple[int, ...]:
    """Equal shares, none above what is wanted; what is left over goes to the first layers."""
    shares = [0] * len(wanted)
    while slots and (hungry := [i for i, n in enumerate(wanted) if shares[i] < n]):
        each = max(1, min(slots // len(hungry), *(wanted[i] - shares[i] for i in hungry)))
        for i in hungry[: slots // each]:
            shares[i] += each
            slots -= each
    return tuple(shares)
