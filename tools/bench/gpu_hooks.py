"""What a kind of device offers to the measurements of tools/gpu_check and torch.accelerator does not.

`CudaHooks` is the only code of the measurements that the dry run does not run: there, tests/late_device/dry_run.py has
the hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch


class Hooks(Protocol):
    """One kind of device."""

    def about(self, device: torch.device) -> dict[str, object]:
        """Facts about a device: its name at least. RuntimeError if it cannot be used."""

    def seconds(self, work: Callable[[], object]) -> float:
        """Device time of the work that `work` queues on the current stream."""

    def repeatable(self, work: Callable[[], object]) -> Callable[[], object]:
        """The launches of `work` as one call that takes no time on the host. `work` has run before."""

    def launch(self, kernel: Any, grid: tuple[int, int], given: tuple[Any, ...], sizes: Mapping[str, int]) -> None:
        """Start a Triton kernel."""


class CudaHooks:
    """CUDA devices: events with times, graphs."""

    def about(self, device: torch.device) -> dict[str, object]:
        about = torch.cuda.get_device_properties(device)
        return {
            "gpu": about.name,
            "compute_capability": f"{about.major}.{about.minor}",
            "gpu_bytes": int(about.total_memory),
            "multiprocessors": about.multi_processor_count,
        }

    def seconds(self, work: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def repeatable(self, work: Callable[[], object]) -> Callable[[], object]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def launch(self, kernel: Any, grid: tuple[int, int], given: tuple[Any, ...], sizes: Mapping[str, int]) -> None:
        kernel[grid](*given, **sizes)
