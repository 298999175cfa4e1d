"""tools/gpu_check on the late device: what a GPU's hooks do there (tools/bench/gpu_hooks.py).

A process of its own prepares the device once. Kernels run in Triton's interpreter, on the device's memory, when the
device gets to them; TRITON_INTERPRET=1 has to be set before. Times are those of the host and mean nothing.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from offmoe.compute import gpu_compute
from offmoe.device import select
from tests.device_cases import interpret_quickly
from tests.late_device import extension
from tests.late_device.extension import LateKind
from tests.late_device.kernels import LateKernels, LateRoutedLayer


def prepare() -> LateHooks:
    """Make "late" a device of this process, whose numeric mode computes with `LateKernels`."""
    extension.library()
    kind = LateKind()
    kind.has_kernels = True
    select.KINDS["late"] = kind
    vars(gpu_compute)["DeviceKernels"] = LateKernels  # as tests replace it, for all of this process
    vars(gpu_compute)["RoutedLayer"] = LateRoutedLayer
    runs = ExitStack()
    runs.enter_context(extension.running())  # by itself, as the host waits for its log and not for it
    atexit.register(runs.close)
    interpret_quickly()
    return LateHooks()


class LateHooks:
    """The late device."""

    def about(self, device: torch.device) -> dict[str, object]:
        return {"gpu": "the late device of tests", "gpu_bytes": int(torch.accelerator.get_memory_info(device.index)[1])}

    def seconds(self, work: Callable[[], object]) -> float:
        torch.accelerator.synchronize()
        began = time.perf_counter()
        work()
        torch.accelerator.synchronize()
        return time.perf_counter() - began

    def repeatable(self, work: Callable[[], object]) -> Callable[[], object]:
        return work

    def launch(self, kernel: Any, grid: tuple[int, int], given: tuple[Any, ...], sizes: Mapping[str, int]) -> None:
        memory = given[0]
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        on_host = [extension.on_host(value) if isinstance(value, torch.Tensor) else value for value in given]
        # Which of them is written is the kernel's affair: as writes, all of them are ordered.
        extension.submit(memory.device, kernel.__name__, lambda: kernel[grid](*on_host, **sizes), [], tensors)


def races() -> list[str]:
    """Every race so far, after all work has run."""
    for device in range(2):
        torch.accelerator.synchronize(device)
    return extension.races()
