"""What NVIDIA and ROCm devices have and torch.accelerator does not offer.

This is the only module outside of the kernels that names torch.cuda.

Moves: nothing.
Bound: registering touches every page: about 1 s for some GiB.
Must never: leave an error of the driver behind for an unrelated call to report.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch

from offmoe.device.accelerator import DeviceEvent, DeviceKind, DeviceStream
from offmoe.device.backend import Capturer, Event, Graph, Stream

T = TypeVar("T")


class CudaKind(DeviceKind):
    """Devices that torch calls "cuda"."""

    name = "cuda"
    has_kernels = True

    def count(self) -> int:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def has_bfloat16(self, device: torch.device) -> bool:
        """From compute capability 8.0 on (CUDA C++ Programming Guide, "Arithmetic Instructions"); on every ROCm."""
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)

    def blocking_event(self, device: torch.device) -> Event:
        return _BlockingEvent(device)

    def capturer(self, device: torch.device) -> Capturer:
        return _CudaCapturer(device)

    def register(self, address: int, nbytes: int) -> bool:
        register = getattr(torch.cuda.cudart(), "cudaHostRegister", None)
        if register is None:  # a build of torch that does not offer it
            return False
        if int(register(address, nbytes, 0)) == 0:
            return True
        # A refused registration leaves an error behind, which torch would report at the next unrelated call.
        with suppress(RuntimeError):
            (torch.ones(1, device="cuda") + 1).item()
        return False

    def unregister(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)


class _BlockingEvent(DeviceEvent):
    """torch.Event has no blocking kind, so this is CUDA's own. It takes streams of CUDA's own type."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._blocking = torch.cuda.Event(blocking=True)

    def record(self, stream: Stream) -> None:
        assert isinstance(stream, DeviceStream)
        self._blocking.record(_of_cuda(stream.stream))

    def synchronize(self) -> None:
        with torch.accelerator.device_index(self.device.index):
            self._blocking.synchronize()

    def is_done(self) -> bool:
        return bool(self._blocking.query())

    def hold_back(self, stream: torch.Stream) -> None:
        self._blocking.wait(_of_cuda(stream))


class _CudaCapturer:
    """CUDA's graphs. **It has not run on a GPU.**"""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # the default stream cannot be captured
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def capture(self, work: Callable[[], T]) -> tuple[Graph, T]:
        if not self._graphs:  # torch lets go of a pool with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            # Readers and the thread that watches the log go on: what they call must not end this thread's capture.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with suppress(RuntimeError):  # the capture may have ended already, with the error
                    graph.capture_end()
                raise
            graph.capture_end()
        self._graphs.add(graph)
        return graph, result


def _of_cuda(stream: torch.Stream) -> torch.cuda.Stream:
    return torch.cuda.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )


class CudaDevice(NamedTuple):
    """One CUDA device that torch can use."""

    name: str
    capability: str
    """Compute capability, such as "9.0"."""
    total: int
    """Bytes of memory."""
    free: int
    """Bytes of memory that nothing has allocated."""


def cuda_devices() -> list[CudaDevice]:
    """Every CUDA device that torch can use, in torch's order."""
    devices = []
    for i in range(CudaKind().count()):
        about, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        devices.append(CudaDevice(about.name, f"{about.major}.{about.minor}", total, free))
    return devices
