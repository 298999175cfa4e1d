"""One interface over a CPU and a CUDA device: memory, pinning, streams, events.

This is the only module outside of the kernels that names torch.cuda. Every fact that follows from the kind of device
stands here too, so that the rest of the package asks the backend and never the device.

Moves: bytes of experts from host buffers into device slots, on the copy stream.
Bound: the link to the device (CUDA), or memcpy (CPU).
Must never: decide what is copied, or wait unless its caller asks. The waits are listed in transfer/waits.py.

CudaBackend is written against torch's documented behavior; docs/measurements.md says on which devices it has run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import numpy as np
import psutil
import torch

from offmoe.device.cgroup import cgroup_free_bytes
from offmoe.errors import CapacityError, ConfigError
from offmoe.storage.layout import PARAM_ALIGNMENT

RAM_AUTO_SHARE = 0.7
"""Fraction of the available RAM that "auto" takes; other processes and the page cache need the rest."""


class Event(Protocol):
    """A mark in a stream's work. Other streams or the host can wait until the work before the mark is done."""

    def record(self, stream: Stream) -> None:
        """Mark the work that `stream` has been given so far."""

    def synchronize(self) -> None:
        """Block the calling thread until the marked work is done. Returns at once if nothing has been marked."""


class Stream(Protocol):
    """A queue of device work, done in order. Two streams are independent unless one waits for an event of the other."""

    def wait(self, event: Event) -> None:
        """Hold back later work of this stream until the work that `event` marks is done. The host does not wait."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy between host and device memory.

        `source` must not change before an event that is recorded after this call is done.
        """


class Backend(ABC):
    """One device: its memory, its streams, and the facts that follow from its kind."""

    device: torch.device
    copies: Stream
    """The stream on which experts are copied into slots."""
    auto_share: float
    """Fraction of the free memory that "auto" takes. The rest is left to allocations that cannot be foreseen."""
    unified_memory: bool
    """Whether the device's memory is the host's, as on a CPU.

    Then staging buffers count against device_memory, the CPU reads and writes slots directly, no host tier exists,
    and a copy has landed when `Stream.copy` returns.
    """
    has_device_kernels: bool
    """Whether the Triton kernels run on this device."""

    @property
    @abstractmethod
    def compute(self) -> Stream:
        """The stream on which torch computes in the calling thread."""

    @abstractmethod
    def event(self) -> Event:
        """A new event; nothing is marked yet."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Bytes of device memory that could be allocated now."""

    def host_free_bytes(self) -> int:
        """Bytes of RAM that "auto" may take for weights; 0 with unified memory, where `free_bytes` counts them."""
        return 0 if self.unified_memory else int(available_memory() * RAM_AUTO_SHARE)

    @abstractmethod
    def pin(self, address: int, nbytes: int) -> bool:
        """Pin host memory for asynchronous copies; False if the system refuses, or if copies need no pinning."""

    @abstractmethod
    def unpin(self, address: int) -> None:
        """Undo `pin` for the memory that begins at `address`."""

    def peak_bytes(self) -> int | None:
        """The most bytes that torch has held on the device so far; None with unified memory."""
        return None

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate device memory: uint8 [nbytes], aligned to PARAM_ALIGNMENT.

        Raises:
            CapacityError: The device has no room for it.
        """
        try:
            memory = torch.empty(nbytes + PARAM_ALIGNMENT, dtype=torch.uint8, device=self.device)
            return memory[-memory.data_ptr() % PARAM_ALIGNMENT :][:nbytes]
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise CapacityError(
                f"{self.device} cannot hold {nbytes} bytes of expert slots; {self.free_bytes()} are free. "
                "Lower slots_per_layer or device_memory."
            ) from error

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Copy small integer tensors [rows, n_i] to the host, all in one copy.

        The host waits for this copy. A layer whose experts are all resident waits for nothing else.
        """
        if len(tensors) == 1:
            return [tensors[0].cpu().numpy()]
        widths = np.cumsum([t.shape[1] for t in tensors])[:-1]
        return np.split(torch.cat(list(tensors), dim=1).cpu().numpy(), widths, axis=1)


class _Immediate:
    """Stream and event in one, for a device whose work is done when the call returns."""

    def wait(self, event: Event) -> None:
        pass

    def record(self, stream: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        copy_in_ram(destination, source)


def copy_in_ram(destination: torch.Tensor, source: torch.Tensor) -> None:
    """Copy between two host tensors of one shape. Contiguous bytes are copied by the calling thread alone.

    torch would start a team of threads for each reader that copies. Idle teams keep spinning on the cores that compute:
    on two cores the disk stood idle for 25 of 175 ms per token.
    """
    if destination.dtype == source.dtype == torch.uint8 and destination.is_contiguous():
        np.copyto(destination.numpy(), source.numpy())
    else:
        destination.copy_(source)


class CpuBackend(Backend):
    """The CPU as a device: slots are RAM, and only the reader threads are asynchronous."""

    auto_share = RAM_AUTO_SHARE
    unified_memory = True
    has_device_kernels = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.copies: Stream = _Immediate()

    @property
    def compute(self) -> Stream:
        return self.copies

    def event(self) -> Event:
        return _Immediate()

    def free_bytes(self) -> int:
        return available_memory()

    def pin(self, address: int, nbytes: int) -> bool:
        return False

    def unpin(self, address: int) -> None:
        pass

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        return [t.numpy() for t in tensors]


class _CudaStream:
    def __init__(self, stream: torch.cuda.Stream):
        self.stream = stream

    def wait(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        self.stream.wait_event(event.event)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self.stream):  # the current stream is per thread: set it here, not once
            destination.copy_(source, non_blocking=True)


class _CudaEvent:
    def __init__(self) -> None:
        self.event = torch.cuda.Event(blocking=True)  # a reader that waits must not spin on a core that computes

    def record(self, stream: Stream) -> None:
        assert isinstance(stream, _CudaStream)
        self.event.record(stream.stream)

    def synchronize(self) -> None:
        self.event.synchronize()


class CudaBackend(Backend):
    """An NVIDIA or ROCm device. Slots are never freed, so events order their reuse; record_stream is not needed."""

    auto_share = 0.9
    unified_memory = False
    has_device_kernels = True

    def __init__(self, device: torch.device):
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.copies: Stream = _CudaStream(torch.cuda.Stream(self.device))

    @property
    def compute(self) -> Stream:
        return _CudaStream(torch.cuda.current_stream(self.device))

    def event(self) -> Event:
        return _CudaEvent()

    def free_bytes(self) -> int:
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + cached

    def peak_bytes(self) -> int | None:
        return int(torch.cuda.max_memory_reserved(self.device))

    def pin(self, address: int, nbytes: int) -> bool:
        register = getattr(torch.cuda.cudart(), "cudaHostRegister", None)
        if register is None:  # a build of torch that does not offer it
            return False
        if int(register(address, nbytes, 0)) == 0:
            return True
        # A refused registration leaves an error behind, which torch would report at the next unrelated call.
        with suppress(RuntimeError):
            (torch.ones(1, device=self.device) + 1).item()
        return False

    def unpin(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)


def select_backend(device: str | None) -> Backend:
    """The backend for a device name.

    Args:
        device: "cpu", "cuda" or "cuda:N". None chooses CUDA if torch finds a device, else the CPU.

    Raises:
        ConfigError: The name is unknown, or torch finds no such device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device={device!r} is unknown. Use 'cpu', 'cuda' or 'cuda:N'.") from None
    if wanted.type == "cpu":
        return CpuBackend()
    if wanted.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device={device!r}: torch finds no CUDA device here. Use device='cpu' or install a CUDA build."
            )
        if wanted.index is not None and wanted.index >= torch.cuda.device_count():
            raise ConfigError(f"device={device!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0.")
        return CudaBackend(wanted)
    raise ConfigError(f"device={device!r} is not supported. Use 'cpu', 'cuda' or 'cuda:N'.")


def available_memory() -> int:
    """Bytes of host memory that can be had: the smaller of what psutil calls available and what the cgroup leaves."""
    return min(int(psutil.virtual_memory().available), cgroup_free_bytes())


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
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        devices.append(CudaDevice(about.name, f"{about.major}.{about.minor}", total, free))
    return devices
