"""Plans the RAM of a machine whose device has its own memory: staging buffers, and slots for experts.

Slots get what staging leaves, in equal shares for all layers that have experts without a device slot. A plan never
exceeds what is free in the machine and in the cgroups around the process.
"""

from __future__ import annotations

from dataclasses import dataclass

from offmoe.config import OffloadConfig
from offmoe.errors import CapacityError
from offmoe.storage.layout import aligned
from offmoe.storage.read_plan import ALIGNMENT
from offmoe.text import format_size, size_option
from offmoe.transfer.staging import staging_plan
from offmoe.types import CacheShape


@dataclass(frozen=True)
class HostPlan:
    """The division of RAM, in bytes.

    Args:
        budget: the most that all of it may take.
        staging: the buffers that experts are read into.
        slots: all slots.
        slots_per_layer: number of slots of each MoE layer.
        scratch: the buffers of experts that the host computes.
    """

    budget: int
    staging: int
    slots: int
    slots_per_layer: tuple[int, ...]
    scratch: int = 0

    def describe(self) -> str:
        """The plan in one line."""
        experts = f"slots of {sum(self.slots_per_layer)} experts {format_size(self.slots)}"
        return f"{format_size(self.budget)} of RAM: {experts}, staging {format_size(self.staging)}" + (
            f", scratch {format_size(self.scratch)}" if self.scratch else ""
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
    """Divide the RAM of a machine whose device has its own memory.

    A layer whose experts all have device slots gets no slot in RAM. No layer gets more than `config.host_slots`.

    Args:
        config: the options.
        shape: experts of each MoE layer.
        device_slots: number of device slots of each MoE layer.
        read_bytes: bytes of a buffer that any expert can be read into.
        free: bytes of RAM that are free.
        taken: bytes of these that are planned for something else.
        scratch: bytes for experts that the host computes.

    Raises:
        CapacityError: host_memory is too small; the message names the smallest that works.
    """
    slot = aligned(read_bytes, ALIGNMENT)
    staging = staging_plan(read_bytes).buffers * slot
    needed = staging + scratch
    budget = max(0, free - taken)
    if config.host_memory != "auto":
        budget = min(int(config.host_memory), budget) or needed  # 0: no slots, but experts still pass through staging
    if budget < needed:
        remedy = f": --host-memory {size_option(needed)}"
        if needed > free - taken:  # the option cannot take what is not free
            remedy = f"; {format_size(needed - max(0, free - taken))} more RAM must be free for it"
        raise CapacityError(
            f"host_memory, {format_size(budget)}, is too small: experts pass through {format_size(needed)} of staging "
            f"buffers ({needed} bytes), the smallest host_memory that works{remedy}. {format_size(free)} of RAM can be "
            "had."
        )
    wanted = [
        0 if n >= e else m for n, e, m in zip(device_slots, shape.experts, config.most_in_ram(shape), strict=True)
    ]
    slots = share_out((budget - needed) // slot, wanted)
    return HostPlan(budget, staging, sum(slots) * slot, slots, scratch)


def share_out(slots: int, wanted: list[int]) -> tuple[int, ...]:
    """Divide `slots` into equal shares, none above what the layer wants; the remainder goes to the first layers."""
    shares = [0] * len(wanted)
    while slots and (open_layers := [i for i, n in enumerate(wanted) if shares[i] < n]):
        each = max(1, min(slots // len(open_layers), *(wanted[i] - shares[i] for i in open_layers)))
        for i in open_layers[: slots // each]:
            shares[i] += each
            slots -= each
    return tuple(shares)
