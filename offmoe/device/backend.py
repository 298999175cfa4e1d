"""One interface over the CPU and accelerators: memory, pinning, streams, events; and the CPU as a device.

Every fact that follows from the kind of device is here or in accelerator.py, so that the rest of the package asks the
backend and never the device.

Moves: bytes of experts from host buffers into device slots, on the copy stream.
Bound: the link to the device, or memcpy (CPU).
Must never: decide what is copied, or wait unless its caller asks. The waits are listed in transfer/waits.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import psutil
import torch

from offmoe.device.cgroup import cgroup_free_bytes
from offmoe.device.machines import RAM_AUTO_SHARE, ram_auto_bytes
from offmoe.device.pages import map_pages
from offmoe.errors import CapacityError
from offmoe.storage.layout import PARAM_ALIGNMENT

T = TypeVar("T")


class Event(Protocol):
    """A mark in a stream's work. Other streams or the host can wait until the work before the mark is done."""

    def record(self, stream: Stream) -> None:
        """Mark the work that `stream` has been given so far."""

    def synchronize(self) -> None:
        """Block the calling thread until the marked work is done. Returns at once if nothing has been marked."""

    def is_done(self) -> bool:
        """Whether the marked work is done. Raises the device's error where the work has failed."""


class Stream(Protocol):
    """A queue of device work, done in order. Two streams are independent unless one waits for an event of the other."""

    def wait(self, event: Event) -> None:
        """Hold back later work of this stream until the work that `event` marks is done. The host does not wait."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy between host and device memory.

        `source` must not change before an event that is recorded after this call is done.
        """


class Graph(Protocol):
    """Work that was captured. Its memory and that of its results belong to it, from one replay to the next."""

    def replay(self) -> None:
        """Queue the work on the compute stream, on the same addresses and with the same sizes."""


class Capturer(Protocol):
    """Captures what the calling thread queues on the compute stream, in place of queueing it."""

    def capture(self, work: Callable[[], T]) -> tuple[Graph, T]:
        """The work that `work` queues, and what it returns; its tensors have values after a replay.

        Raises:
            RuntimeError: the work has what cannot be captured, such as a wait of the host. The device is as before.
        """


class Backend(ABC):
    """One device: its memory, its streams, and the facts that follow from its kind."""

    device: torch.device
    copies: Stream
    """The stream on which experts are copied into slots."""
    unified_memory: bool
    """Whether the device's memory is the host's, as on a CPU.

    Then staging buffers count against device_memory, the CPU reads and writes slots directly, no host tier exists,
    and a copy has landed when `Stream.copy` returns.
    """
    has_device_kernels: bool
    """Whether the Triton kernels run on this device."""
    emulates_bfloat16: bool = False
    """Whether the device has no bfloat16 of its own, so that torch computes it in float32 with conversions."""

    @property
    @abstractmethod
    def compute(self) -> Stream:
        """The stream on which torch computes in the calling thread."""

    @abstractmethod
    def event(self, *, blocking: bool = False) -> Event:
        """A new event; nothing is marked yet.

        Args:
            blocking: Whether the host sleeps while it waits for the event. A reader that waits must not spin on a core
                that computes. Waking up takes longer than spinning, so events of the computing thread do not sleep.
        """

    def capturer(self) -> Capturer | None:
        """A new capturer, whose graphs share memory and are replayed one after the other; None: the device has none."""
        return None

    def enter_thread(self) -> None:  # noqa: B027 - the CPU needs nothing
        """Prepare the calling thread for work on this device, once per thread."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Bytes of device memory that could be allocated now."""

    @abstractmethod
    def auto_bytes(self, free: int) -> int:
        """What "auto" takes of `free` bytes of device memory. The rest is left to what cannot be foreseen."""

    def host_free_bytes(self) -> int:
        """Bytes of RAM that "auto" may take for weights; 0 with unified memory, where `free_bytes` counts them."""
        return 0 if self.unified_memory else int(available_memory() * RAM_AUTO_SHARE)

    @abstractmethod
    def pin(self, address: int, nbytes: int) -> bool:
        """Pin host memory for asynchronous copies; False if the system refuses, or if copies need no pinning."""

    @abstractmethod
    def unpin(self, address: int) -> None:
        """Undo `pin` for the memory that begins at `address`."""

    def trim(self) -> None:
        """Give device memory that torch has freed back to the system, where torch keeps such memory."""
        return

    def peak_bytes(self) -> int | None:
        """The most bytes that torch has held on the device so far; None with unified memory."""
        return None

    def random_state(self) -> list[torch.Tensor]:
        """The state of every default generator of torch that computing draws from: the CPU's, then the device's."""
        return [torch.get_rng_state()]

    def set_random_state(self, states: Sequence[torch.Tensor]) -> None:
        """Go on from a state that `random_state` gave."""
        torch.set_rng_state(states[0])

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate device memory: uint8 [nbytes], aligned to PARAM_ALIGNMENT.

        Raises:
            CapacityError: The device has no room for it.
        """
        try:
            memory = torch.empty(nbytes + PARAM_ALIGNMENT, dtype=torch.uint8, device=self.device)
            return memory[-memory.data_ptr() % PARAM_ALIGNMENT :][:nbytes]
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise self._no_room(nbytes) from error

    def _no_room(self, nbytes: int) -> CapacityError:
        return CapacityError(
            f"{self.device} cannot hold {nbytes} bytes of expert slots; {self.free_bytes()} are free. "
            "Lower --slots-per-layer or --device-memory."
        )

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

    def is_done(self) -> bool:
        return True

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

    unified_memory = True
    has_device_kernels = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._immediate = _Immediate()
        self.copies: Stream = self._immediate

    @property
    def compute(self) -> Stream:
        return self.copies

    def event(self, *, blocking: bool = False) -> Event:
        return self._immediate

    def free_bytes(self) -> int:
        return available_memory()

    def auto_bytes(self, free: int) -> int:
        return ram_auto_bytes(free)

    def allocate(self, nbytes: int) -> torch.Tensor:
        try:
            pages = map_pages(max(1, nbytes), touch=False)  # experts may be read into slots unbuffered
        except CapacityError as error:
            raise self._no_room(nbytes) from error
        return torch.frombuffer(pages, dtype=torch.uint8, count=nbytes) if nbytes else torch.empty(0, dtype=torch.uint8)

    def pin(self, address: int, nbytes: int) -> bool:
        return False

    def unpin(self, address: int) -> None:
        pass

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        return [t.numpy() for t in tensors]


def available_memory() -> int:
    """Bytes of host memory that can be had: the smaller of what psutil calls available and what the cgroup leaves."""
    return min(int(psutil.virtual_memory().available), cgroup_free_bytes())
