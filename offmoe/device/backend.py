"""Devices behind one interface: memory, pinning, streams, events. The only file that names torch.cuda (rule R4).

What moves: bytes of experts from staging buffers into device slots, on the copy stream. Bound: the link (CUDA) or
memcpy (CPU). A backend orders; it never decides, and it never waits on its own: every wait stands in transfer.py. A
CPU is a backend whose copies are done when `copy` returns, so its events have nothing to wait for.

CudaBackend has been written against torch's documented behavior and has not yet run on a GPU (docs/measurements.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import numpy as np
import psutil
import torch

from offmoe.device.cgroup import memory_left
from offmoe.errors import CapacityError, ConfigError
from offmoe.storage.layout import PARAM_ALIGNMENT


class Event(Protocol):
    """A point in a stream's work; waited for by other streams or by the host."""

    def record(self, stream: Stream) -> None:
        """Mark the work given to `stream` so far."""

    def synchronize(self) -> None:
        """Make the host wait until the marked work is done; at once if nothing was marked."""


class Stream(Protocol):
    """Work in order. Streams are independent of each other unless one waits for another's event."""

    def wait(self, event: Event) -> None:
        """Later work of this stream comes after what `event` marks."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy into device memory; `source` must stay as it is until an event recorded after this is done."""


class Backend(ABC):
    """One device. `compute` is the stream that torch computes on, `copies` the one that experts arrive on."""

    device: torch.device
    copies: Stream
    auto_share: float
    """Share of the free memory that "auto" takes; the rest is for what nobody can foresee."""
    staging_counts: bool
    """Whether host staging buffers live in the device's own memory."""
    slots_in_ram: bool
    """Whether the CPU's own kernels can read slots."""
    has_device_kernels: bool
    """Whether Triton's kernels run here."""
    lands_at_once: bool
    """Whether what was copied is there when `copy` returns."""

    @property
    @abstractmethod
    def compute(self) -> Stream: ...

    @abstractmethod
    def event(self) -> Event: ...

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory of the device that could be allocated now."""

    def host_free_bytes(self) -> int:
        """Memory beside the device's own that weights may be kept in; 0 where the host's is the device's."""
        return 0

    @abstractmethod
    def pin(self, address: int, nbytes: int) -> bool:
        """Make host memory reachable for asynchronous copies; False when refused or needless."""

    @abstractmethod
    def unpin(self, address: int) -> None: ...

    def peak_bytes(self) -> int | None:
        """The most that torch has held on the device so far; None where that is the process's own memory."""
        return None

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] on the device, aligned to PARAM_ALIGNMENT; CapacityError when there is no room."""
        try:
            memory = torch.empty(nbytes + PARAM_ALIGNMENT, dtype=torch.uint8, device=self.device)
            return memory[-memory.data_ptr() % PARAM_ALIGNMENT :][:nbytes]
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise CapacityError(
                f"{self.device} cannot hold {nbytes} bytes of expert slots; {self.free_bytes()} are free. "
                "Lower slots_per_layer or device_memory."
            ) from error

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Small integer tensors [rows, n_i] as arrays, in one copy: the only wait of a layer that holds hits alone."""
        if len(tensors) == 1:
            return [tensors[0].cpu().numpy()]
        widths = np.cumsum([t.shape[1] for t in tensors])[:-1]
        return np.split(torch.cat(list(tensors), dim=1).cpu().numpy(), widths, axis=1)


class _Immediate:
    """Stream and event of a device whose work is done when the call returns."""

    def wait(self, event: Event) -> None:
        pass

    def record(self, stream: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        copy_in_ram(destination, source)


def copy_in_ram(destination: torch.Tensor, source: torch.Tensor) -> None:
    """Of one shape, both in host memory; by the calling thread alone where it is bytes.

    torch would give every reader that copies a team of threads of its own, which go on spinning on the cores that
    compute (25 of 175 ms per token in which the disk stood idle, on two cores).
    """
    if destination.dtype == source.dtype == torch.uint8 and destination.is_contiguous():
        np.copyto(destination.numpy(), source.numpy())
    else:
        destination.copy_(source)


class CpuBackend(Backend):
    """Slots are RAM. Nothing is asynchronous here except the threads that read shards."""

    auto_share = 0.7  # io.md section 7: other processes and the page cache want some too
    staging_counts = True
    slots_in_ram = True
    has_device_kernels = False
    lands_at_once = True

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
    """An NVIDIA (or ROCm) device. Slots are preallocated, so events order reuse and record_stream is not needed."""

    auto_share = 0.9
    staging_counts = False
    slots_in_ram = False
    has_device_kernels = True
    lands_at_once = False

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

    def host_free_bytes(self) -> int:
        return int(available_memory() * CpuBackend.auto_share)

    def peak_bytes(self) -> int | None:
        return int(torch.cuda.max_memory_reserved(self.device))

    def pin(self, address: int, nbytes: int) -> bool:
        register = getattr(torch.cuda.cudart(), "cudaHostRegister", None)
        if register is None:  # a build of torch that does not offer it
            return False
        if int(register(address, nbytes, 0)) == 0:
            return True
        # A refused registration leaves a sticky error that torch would report at the next unrelated call (io.md
        # section 5).
        with suppress(RuntimeError):
            (torch.ones(1, device=self.device) + 1).item()
        return False

    def unpin(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)


def select_backend(device: str | None) -> Backend:
    """The backend of "cpu", "cuda", "cuda:1"; None: cuda if there is one. ConfigError for anything else."""
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
    """Bytes of host memory: what psutil calls available, or what the memory cgroup leaves if that is less."""
    return min(int(psutil.virtual_memory().available), memory_left())


class CudaDevice(NamedTuple):
    """One device that torch can use. capability: of computing, "9.0". total, free: bytes."""

    name: str
    capability: str
    total: int
    free: int


def cuda_devices() -> list[CudaDevice]:
    """Every CUDA device that torch can use, in its order."""
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        found.append(CudaDevice(about.name, f"{about.major}.{about.minor}", total, free))
    return found
