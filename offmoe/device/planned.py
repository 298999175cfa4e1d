"""A device that is not here: enough of a backend to plan the memory of another machine, and nothing to run with.

Moves: nothing.
Bound: nothing; its figures come from a table.
Must never: be loaded onto. Whatever a run would ask of it is an assertion.
"""

from __future__ import annotations

import torch

from offmoe.device.accelerator import AcceleratorBackend
from offmoe.device.backend import Backend, CpuBackend, Event, Stream
from offmoe.device.cuda import CudaKind
from offmoe.device.machines import RAM_AUTO_SHARE, Machine, device_auto_bytes, ram_auto_bytes


class PlannedBackend(Backend):
    """The device of a machine that is known by name: its GPU, or its CPU if it has none."""

    def __init__(self, machine: Machine):
        self.machine = machine
        kind: type[Backend] = CpuBackend if machine.gpu is None else AcceleratorBackend
        self.device = torch.device("cpu" if machine.gpu is None else CudaKind.name)
        self.unified_memory = kind.unified_memory
        self.has_device_kernels = machine.gpu is not None and CudaKind.has_kernels

    @property
    def compute(self) -> Stream:
        raise AssertionError("a planned device computes nothing")

    def event(self, *, blocking: bool = False) -> Event:
        raise AssertionError("a planned device has no events")

    def free_bytes(self) -> int:
        return self.machine.device_free_bytes

    def auto_bytes(self, free: int) -> int:
        return ram_auto_bytes(free) if self.unified_memory else device_auto_bytes(free)

    def host_free_bytes(self) -> int:
        return 0 if self.unified_memory else int(self.machine.ram_free_bytes * RAM_AUTO_SHARE)

    def pin(self, address: int, nbytes: int) -> bool:
        raise AssertionError("a planned device pins nothing")

    def unpin(self, address: int) -> None:
        raise AssertionError("a planned device pins nothing")
