"""Builds and loads the late device, once per environment; what it can do, as Python functions.

The extension registers a device type with torch, which cannot be undone. So it is loaded by the first test that asks
for it. It is built with the compiler of the machine and torch's headers, which takes one to two minutes, and kept by a
digest of its sources, of torch's version and of the compiler.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
import torch

from offmoe.device.accelerator import DeviceEvent, DeviceKind
from offmoe.device.backend import Capturer, Event, Graph

FOLDER = Path(__file__).parent
COUNTS = ("event_waits", "stream_waits", "blocking_d2h", "blocking_h2d", "async_copies", "scalars", "at_once")
T = TypeVar("T")
LATEST, EARLIEST, EARLY_COPIES = 0, 1, 2
"""When work runs: when somebody waits for it; at once; copies at once, computing when somebody waits for it."""


class Race(AssertionError):
    """Two accesses that nothing orders."""


class Counts(NamedTuple):
    """What the host has waited for, how many copies were asynchronous, and how many operators had to run at once."""

    event_waits: int
    stream_waits: int
    blocking_d2h: int
    blocking_h2d: int
    async_copies: int
    scalars: int
    at_once: int

    @property
    def host_waits(self) -> int:
        """Every wait of the host for the device."""
        return self.event_waits + self.stream_waits + self.blocking_d2h + self.blocking_h2d + self.scalars


def _cache() -> Path:
    """A folder for what was built: the environment's own, else the system's for temporary files."""
    if os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "offmoe-late-device"
    return Path(tempfile.gettempdir()) / f"offmoe-late-device-{os.getuid()}"


def build() -> Path:
    """The extension's file, compiled if need be; skips the test where there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the late device needs Linux and a C++ compiler: install g++")
    sources = sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")])
    about = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    digest = hashlib.sha256("\0".join([torch.__version__, about, *(s.read_text() for s in sources)]).encode())
    cache = _cache()
    cache.mkdir(parents=True, exist_ok=True)
    built = cache / f"late-{digest.hexdigest()[:16]}.so"
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes may ask at once
        if not built.exists():
            _compile(compiler, built)
    return built


def _compile(compiler: str, target: Path) -> None:
    home = Path(torch.__file__).parent
    partial = target.with_suffix(".partial")
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    command += [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    command += [str(FOLDER / "late.cpp"), "-o", str(partial), f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-8000:]
    partial.rename(target)


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded extension; torch knows the device "late" afterwards."""
    loaded = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    loaded.late_real.restype = ctypes.c_size_t
    module = types.ModuleType("torch.late")
    numbers = [torch.zeros(16, dtype=torch.uint8) for _ in range(2)]  # nothing draws from them on the device
    vars(module).update(
        is_available=lambda: True,
        device_count=lambda: 2,
        current_device=torch.accelerator.current_device_index,
        set_device=torch.accelerator.set_device_index,
        synchronize=torch.accelerator.synchronize,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device: numbers[device.index].clone(),
        set_rng_state=lambda state, device: numbers[device.index].copy_(state),
        get_amp_supported_dtype=lambda: [torch.bfloat16],
        _is_in_bad_fork=lambda: False,
    )
    loaded.late_start()
    torch._register_device_module("late", module)
    return loaded


def size(value: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(value)


def counts() -> Counts:
    """All counts since the extension was loaded."""
    values = (ctypes.c_long * len(COUNTS))()
    library().late_counts(values)
    return Counts(*values)


def since(before: Counts) -> Counts:
    """The counts since an earlier look at them."""
    return Counts(*(now - then for now, then in zip(counts(), before, strict=True)))


def schedule(when: int) -> None:
    """LATEST, EARLIEST or EARLY_COPIES."""
    library().late_schedule(when)


def threads_apart(apart: bool) -> None:
    """Whether threads of the host are told apart: else what one has done is before what another does next.

    Whatever orders them must then be told by `acquired` and `releases`; threads.py does.
    """
    library().late_threads(int(apart))


def acquired(number: int) -> None:
    """The calling thread has acquired a lock: what those did that released it before is done."""
    library().late_acquired(size(number))


def releases(number: int) -> None:
    """The calling thread is about to release a lock."""
    library().late_releases(size(number))


def copies_leave_streams(leave: bool) -> None:
    """Whether copies from the host leave the order of their stream, as on a queue that keeps none: work that is queued
    behind them is behind them only if it waits for an event that was recorded after them."""
    library().late_loose(int(leave))


def limit(device: int, nbytes: int) -> None:
    """Bytes of memory that a device has."""
    library().late_limit(device, size(nbytes))


def _texts(which: int) -> list[str]:
    text = ctypes.create_string_buffer(1 << 20)
    library().late_texts(which, text, size(len(text)))
    return text.value.decode().splitlines()


def races() -> list[str]:
    """Every race since the last `forget`."""
    return _texts(0)


def at_once() -> list[str]:
    """Operators whose results' shapes follow from values, so that they could not be late."""
    return _texts(1)


def forget() -> None:
    """Forget the races that were found, and the errors of work that nobody waited for."""
    library().late_forget()


def host_touches(tensor: torch.Tensor, *, writes: bool, name: str) -> None:
    """Say that the host reads or writes pinned memory now; Race if copies of that memory are not ordered before."""
    region = size(tensor.data_ptr()), size(tensor.nbytes)
    if library().late_host_touches(*region, int(writes), name.encode()):
        raise Race(races()[-1])


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor of the device as a tensor of the host: for work that runs on the device only."""
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    address = library().late_real(size(tensor.data_ptr()))
    memory = (ctypes.c_char * (span * tensor.element_size())).from_address(address)
    with torch.inference_mode(False):  # the thread that works with it is not in it
        return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


_WORK = ctypes.CFUNCTYPE(None)
_submitted: list[object] = []
"""Work that may not have run yet: ctypes keeps no callback alive."""


def submit(
    device: torch.device,
    name: str,
    work: Callable[[], None],
    reads: Sequence[torch.Tensor],
    writes: Sequence[torch.Tensor],
) -> None:
    """Let the device call `work` in its current stream's turn, as a kernel that reads and writes these tensors."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
            raise

    callback = _WORK(run)
    _submitted.append((callback, reads, writes))
    regions = [
        (ctypes.c_size_t * (2 * len(tensors)))(*(n for t in tensors for n in (t.data_ptr(), t.nbytes)))
        for tensors in (reads, writes)
    ]
    index = device.index
    assert index is not None
    if library().late_submit(index, name.encode(), callback, regions[0], len(reads), regions[1], len(writes)):
        raise Race(races()[-1])


_READY = ctypes.CFUNCTYPE(ctypes.c_int)


def wait(device: torch.device, name: str, ready: Callable[[], bool]) -> None:
    """Let the device's current stream wait until `ready()`, which is asked again and again, by any thread."""
    callback = _READY(ready)
    _submitted.append((callback,))
    library().late_wait(device.index, name.encode(), callback)


def run() -> None:
    """Let the device do all that was queued; returns when it is done."""
    library().late_run()


@contextmanager
def running() -> Iterator[None]:
    """Let a thread drive the device, as a GPU drives itself; without it, work runs when the host waits for it."""
    ended = threading.Event()

    def drive() -> None:
        while not ended.wait(0.0003):
            run()

    thread = threading.Thread(target=drive, name="late-device", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def clear_submitted() -> None:
    """Let go of the work that `submit` keeps; all of it must have run."""
    _submitted.clear()


class LateGraph:
    """Work of the late device that was captured."""

    def __init__(self, device: torch.device, number: int) -> None:
        self._device, self._number = device, number

    def replay(self) -> None:
        if library().late_replay(self._device.index, self._number):
            raise Race(races()[-1])

    def __del__(self) -> None:
        library().late_drop(self._number)


class LateCapturer:
    """Captures the calling thread's work. Its memory is that of all graphs of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def capture(self, work: Callable[[], T]) -> tuple[Graph, T]:
        library().late_capture_begin()
        try:
            result = work()
        finally:
            graph = LateGraph(self._device, library().late_capture_end())  # it goes again if the work has failed
        return graph, result


class LateKind(DeviceKind):
    """The late device as offmoe sees it."""

    name = "late"
    has_kernels = False

    def __init__(self) -> None:
        self.registered_on: list[int] = []
        """Per registration, the current device."""
        self.held: set[int] = set()
        """Addresses of the regions that are registered. A test sees its own, whatever an earlier one has left."""
        self.refuses_after = 1 << 30
        """Registrations that succeed before the system refuses."""
        self.before_register: Callable[[], None] = lambda: None
        """Called before each registration, which takes as long as this does."""
        self.bfloat16 = True
        """Whether the device says that it computes bfloat16 itself."""

    def count(self) -> int:
        return 2

    def has_bfloat16(self, device: torch.device) -> bool:
        return self.bfloat16

    def blocking_event(self, device: torch.device) -> Event:
        return DeviceEvent(device)

    def capturer(self, device: torch.device) -> Capturer:
        return LateCapturer(device)

    def register(self, address: int, nbytes: int) -> bool:
        self.before_register()
        if len(self.registered_on) >= self.refuses_after:
            return False
        self.registered_on.append(torch.accelerator.current_device_index())
        library().late_pin(size(address), size(nbytes))
        self.held.add(address)
        return True

    def unregister(self, address: int) -> None:
        library().late_unpin(size(address))
        self.held.discard(address)
