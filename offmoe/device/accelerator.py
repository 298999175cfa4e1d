"""A device with memory and streams of its own, by what torch offers for every kind of accelerator.

Everything is written against torch.accelerator, torch.Stream and torch.Event. What these lack comes from one
`DeviceKind` per kind of device: registering host memory, and events for which the host waits asleep. So the code that
runs on a GPU is the code that tests run on a device of their own (tests/late_device).

Moves: bytes of experts from host buffers into device slots, on the copy stream.
Bound: the link to the device.
Must never: run under another current device than its own. The current device belongs to each thread.

**None of this has run on a GPU yet**; docs/measurements.md says on which devices it has.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from offmoe.device.backend import Backend, Capturer, Event, Stream
from offmoe.device.machines import device_auto_bytes

STRIDED_BYTES = 1 << 20
"""Most bytes of one copy into memory that is not contiguous. torch copies into temporary device memory of the same size
first, which no plan counts. Requests of up to 1 MiB come from torch's segments of 2 MiB, larger ones from 20 MiB
(kSmallSize, kSmallBuffer and kLargeBuffer of its caching allocator). 1 MiB takes 40 us on a link of 25 GB/s."""


class DeviceKind(ABC):
    """What one kind of device has and torch.accelerator does not offer."""

    name: str
    """torch's name of the kind, such as "cuda"."""
    has_kernels: bool
    """Whether the Triton kernels run on it."""

    @abstractmethod
    def count(self) -> int:
        """Number of devices of this kind that torch can use."""

    def has_bfloat16(self, device: torch.device) -> bool:
        """Whether a device computes bfloat16 itself."""
        return True

    @abstractmethod
    def blocking_event(self, device: torch.device) -> Event:
        """A new event; a host thread that waits for it sleeps."""

    def capturer(self, device: torch.device) -> Capturer | None:
        """As `Backend.capturer`."""
        return None

    @abstractmethod
    def register(self, address: int, nbytes: int) -> bool:
        """Pin host memory that exists, for the current device; False if the system refuses."""

    @abstractmethod
    def unregister(self, address: int) -> None:
        """Undo `register` for the memory that begins at `address`."""


class DeviceStream:
    """A stream of the device."""

    def __init__(self, stream: torch.Stream) -> None:
        self.stream = stream
        self._own = threading.local()
        """Per thread, another object of the same stream."""

    def wait(self, event: Event) -> None:
        assert isinstance(event, DeviceEvent)
        event.hold_back(self.stream)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        # The current stream is per thread: it is set here, not once. torch.Stream keeps what its `with` restores in the
        # object, so two threads in one object would restore each other's device and stream.
        own: torch.Stream | None = getattr(self._own, "stream", None)
        if own is None:
            of = self.stream
            own = torch.Stream(stream_id=of.stream_id, device_index=of.device_index, device_type=of.device_type)
            self._own.stream = own
        with own:
            _copy(destination, source)


class CurrentStream(DeviceStream):
    """The stream on which torch computes in this thread now: copies need not change to it. For use at once."""

    def __init__(self, stream: torch.Stream) -> None:
        self.stream = stream

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        _copy(destination, source)


def _copy(destination: torch.Tensor, source: torch.Tensor) -> None:
    """Queue a copy on the current stream."""
    for into, data in _pieces(destination, source):
        into.copy_(data, non_blocking=True)


def _pieces(destination: torch.Tensor, source: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The two tensors in one piece, or row by row as many as `STRIDED_BYTES` hold if the destination has gaps."""
    if destination.is_contiguous() or destination.nbytes <= STRIDED_BYTES:
        yield destination, source
        return
    rows = max(1, STRIDED_BYTES * len(destination) // destination.nbytes)
    yield from zip(destination.split(rows), source.split(rows), strict=True)


class DeviceEvent:
    """A mark in a stream's work. The host spins while it waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._event = torch.Event(device)

    def record(self, stream: Stream) -> None:
        assert isinstance(stream, DeviceStream)
        self._event.record(stream.stream)

    def synchronize(self) -> None:
        with torch.accelerator.device_index(self.device.index):
            self._event.synchronize()

    def is_done(self) -> bool:
        return bool(self._event.query())

    def hold_back(self, stream: torch.Stream) -> None:
        """Let later work of `stream` wait for the marked work."""
        stream.wait_event(self._event)


class AcceleratorBackend(Backend):
    """One accelerator. Slots are never freed, so events order their reuse; record_stream is not needed."""

    unified_memory = False

    def __init__(self, kind: DeviceKind, device: torch.device) -> None:
        """device: of this kind; without an index, the current one."""
        index = torch.accelerator.current_device_index() if device.index is None else device.index
        self.device = torch.device(kind.name, index)
        self.has_device_kernels = kind.has_kernels
        self.emulates_bfloat16 = not kind.has_bfloat16(self.device)
        self._kind = kind
        self.copies: Stream = DeviceStream(torch.Stream(self.device))

    @property
    def compute(self) -> Stream:
        return CurrentStream(torch.accelerator.current_stream(self.device))

    def event(self, *, blocking: bool = False) -> Event:
        return self._kind.blocking_event(self.device) if blocking else DeviceEvent(self.device)

    def capturer(self) -> Capturer | None:
        return self._kind.capturer(self.device)

    def enter_thread(self) -> None:
        torch.accelerator.set_device_index(self.device.index)

    def auto_bytes(self, free: int) -> int:
        return device_auto_bytes(free)

    def free_bytes(self) -> int:
        index = self.device.index
        cached = torch.accelerator.memory_reserved(index) - torch.accelerator.memory_allocated(index)
        return int(torch.accelerator.get_memory_info(index)[0]) + cached

    def trim(self) -> None:
        torch.accelerator.empty_cache()

    def peak_bytes(self) -> int | None:
        return int(torch.accelerator.max_memory_reserved(self.device.index))

    def random_state(self) -> list[torch.Tensor]:
        return [*super().random_state(), torch.get_device_module(self.device).get_rng_state(self.device)]

    def set_random_state(self, states: Sequence[torch.Tensor]) -> None:
        super().set_random_state(states)
        torch.get_device_module(self.device).set_rng_state(states[1], self.device)

    def pin(self, address: int, nbytes: int) -> bool:
        with torch.accelerator.device_index(self.device.index):
            return self._kind.register(address, nbytes)

    def unpin(self, address: int) -> None:
        with torch.accelerator.device_index(self.device.index):
            self._kind.unregister(address)
