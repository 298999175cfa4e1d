"""Checks what this machine can do for offmoe. Each check has a verdict and, unless it is "ok", advice what to change.

No model is loaded. The disk check writes 128 MiB to a file and reads it back; on CUDA, 64 MiB are copied over the link.
All checks together take a second or so. Checks that need torch come last, so that a machine where torch does not start
still gets the others. A check that fails in an unforeseen way reports that and does not stop the others.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from offmoe.device.cgroup import cgroup_free_bytes, memory_limit
from offmoe.device.cores import usable_cpus
from offmoe.text import format_size

Verdict = Literal["ok", "warn", "fail"]

PYTHON = (3, 10)
LIBRARIES = {
    "torch": (">= 2.10", "2.13"),
    "transformers": (">= 5.17, < 5.24", "5.23"),
    "accelerate": (">= 1.10", None),
    "safetensors": (">= 0.5", None),
    "numpy": (">= 1.26", None),
    "packaging": (">= 23", None),
    "psutil": (">= 5.9", None),
    "rich": (">= 13.7", None),
    "greenlet": (">= 3.1", None),
}
"""The versions that work, and the highest minor version that was tested if that matters."""
PROBE_BYTES = 128 << 20
REQUEST_BYTES = 16 << 20
SLOW_DISK_GB_S = 0.5
"""A slower disk means seconds per token of a large model, which misses about 1 GB of experts per token."""
LITTLE_DISK, LITTLE_MEMORY = 5 * 10**9, 2 * 10**9
"""Bytes. Less disk cannot hold a model; less memory cannot hold Python, torch and a small model's dense part."""
CPU_FEATURES = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm", "sve")
PIN_CHUNK_BYTES, PIN_PROBE_BYTES = 256 << 20, 2 << 30


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: of the check.
        verdict: "ok", "warn" or "fail"; offmoe cannot run after "fail".
        finding: one sentence. Its JSON key is "found".
        advice: what to change; "" if nothing.
        values: the figures, for programs.
    """

    name: str
    verdict: Verdict
    finding: str
    advice: str
    values: dict[str, object]

    def to_dict(self) -> dict[str, object]:
        return {"found" if name == "finding" else name: value for name, value in asdict(self).items()}


def examine(folder: Path) -> Iterator[Check]:
    """Run all checks, one at a time. folder: an existing folder on the disk that holds models."""
    probes: list[Callable[..., Check]] = [system, libraries, processor, memory, huge_pages, open_files, disk]
    probes += [compiler, device, kernels, pinning, link]
    for probe in probes:
        try:
            yield probe(folder) if probe is disk else probe()
        except Exception as error:  # a machine can refuse anything; the other checks are still useful
            name = probe.__name__.replace("_", " ")
            yield _check(name, "warn", f"could not be checked ({type(error).__name__}: {error})", "")


def _check(name: str, verdict: Verdict, finding: str, advice: str, **values: object) -> Check:
    return Check(name, verdict, finding, "" if verdict == "ok" else advice, values)


def system() -> Check:
    """Check the operating system and the version of Python."""
    values = {"system": platform.system(), "release": platform.release(), "machine": platform.machine()}
    python = platform.python_version()
    finding = f"Python {python} on {values['system']} {values['release']}, {values['machine']}"
    if sys.version_info < PYTHON:
        return _check("system", "fail", finding, "Install Python 3.10 or newer.", python=python, **values)
    untried = values["system"] != "Linux"
    advice = "offmoe was tested on Linux only; on this system reads go through the page cache, which is slower."
    return _check("system", "warn" if untried else "ok", finding, advice, python=python, **values)


def libraries() -> Check:
    """Compare installed versions with those that offmoe needs and was tested with. Imports none of them."""
    versions: dict[str, str | None] = {}
    verdict: Verdict = "ok"
    advice: list[str] = []
    for name, (working, tested) in LIBRARIES.items():
        try:
            versions[name] = installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
            verdict = "fail"
            advice.append(f"Install {name} {working}.")
            continue
        if not SpecifierSet(working).contains(Version(installed).base_version):
            verdict = "fail"
            advice.append(f"Install {name} {working}: {installed} is outside the range that offmoe runs with.")
        elif tested is not None and Version(installed).release[:2] > Version(tested).release:
            verdict = "warn" if verdict == "ok" else verdict
            advice.append(f"{name} {installed} is newer than {tested}, the newest that was tested.")
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    return _check("libraries", verdict, text, " ".join(advice), **versions)


def processor() -> Check:
    """Report the cores that this process may use, and the instruction sets that matrix products use."""
    cores = usable_cpus()
    facts: dict[str, str] = {}
    with suppress(OSError), open("/proc/cpuinfo") as file:
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in file)}
    model = facts.get("model name", platform.processor())
    flags = facts.get("flags", facts.get("Features", "")).split()
    features = [name for name in CPU_FEATURES if name in flags]
    text = f"{model or platform.machine()}, {cores} cores, {' '.join(features) or 'features unknown'}"
    old = bool(flags) and platform.machine() in ("x86_64", "AMD64") and "avx2" not in flags
    advice = "Without AVX2 experts compute several times slower on this CPU; use a GPU or a newer machine."
    return _check("processor", "warn" if old else "ok", text, advice, model=model, cores=cores, features=features)


def memory() -> Check:
    """Check RAM, and what a memory cgroup allows of it. A cgroup counts experts in RAM and the page cache."""
    import psutil

    ram = psutil.virtual_memory()
    limit, allowed = memory_limit(), cgroup_free_bytes()
    available = min(int(ram.available), allowed)
    text = f"{format_size(ram.total)} of RAM, {format_size(available)} available"
    if limit is not None:
        text += f"; a cgroup (v{limit[1]}) allows {format_size(limit[0])}"
    text += "; slots in RAM fill as experts are used, so the first tokens read from disk"
    little = available < LITTLE_MEMORY
    where = "Raise the container's memory limit" if allowed < ram.available else "Close other programs"
    return _check(
        "memory",
        "warn" if little else "ok",
        text,
        f"{where}: torch and transformers alone take about 0.5 GB, and experts in RAM need the rest.",
        total=int(ram.total),
        available=available,
        cgroup_limit=None if limit is None else limit[0],
        cgroup_version=None if limit is None else limit[1],
    )


def huge_pages() -> Check:
    """Check whether reads can use 2 MiB pages, which halves their time on virtual disks."""
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", file.read_text()) if file.exists() else None
    if chosen is None:
        return _check("huge pages", "ok", "no transparent huge pages on this system", "", enabled=None)
    never = chosen[1] == "never"
    advice = f"Allow programs to request them: echo madvise | sudo tee {file}"
    finding = f"transparent huge pages: {chosen[1]}"
    return _check("huge pages", "warn" if never else "ok", finding, advice, enabled=chosen[1])


def open_files() -> Check:
    """Check how many files a process may open. offmoe keeps a few shards open, however many a model has."""
    from offmoe.storage.open_shards import MOST_OPEN, file_limit, most_open

    limit = file_limit()
    if limit is None:
        return _check("open files", "ok", "no such limit on this system", "", limit=None, shards_open=most_open())
    soft, hard = limit
    finding = f"{soft} allowed; of a model's shards, however many, at most {most_open()} are open at a time"
    advice = f"Files that are closed have to be opened again, so allow more: ulimit -n {min(hard, 4096)}"
    verdict: Verdict = "warn" if most_open() < MOST_OPEN else "ok"
    return _check("open files", verdict, finding, advice, limit=soft, hard_limit=hard, shards_open=most_open())


def disk(folder: Path) -> Check:
    """Check free space, whether reads can bypass the page cache, and how fast a short read is."""
    free = shutil.disk_usage(folder).free
    values: dict[str, object] = {"folder": str(folder), "free": free}
    text = f"{folder}: {format_size(free)} free"
    if not os.access(folder, os.W_OK) or free < 4 * PROBE_BYTES:
        why = "it cannot be written" if free >= 4 * PROBE_BYTES else "it is full"
        return _check("disk", "warn", text, f"Reading was not measured, because {why}; give another folder.", **values)
    direct, rate = read_probe(folder)
    values |= {"direct": direct, "read_gb_s": round(rate, 3)}
    text += f", unbuffered reads {'work' if direct else 'are refused'}, {rate:.2f} GB/s in a short test"
    if not direct:
        advice = (
            "Keep models on a local ext4, xfs or btrfs disk: reading through the page cache takes three times as long."
        )
    elif rate < SLOW_DISK_GB_S:
        advice = "Use an NVMe disk, which reads ten times as fast, or give experts as many slots as memory allows."
    else:
        advice = "Free some space: models take tens of GB."
    poor = not direct or rate < SLOW_DISK_GB_S or free < LITTLE_DISK
    return _check("disk", "warn" if poor else "ok", text, advice, **values)


def read_probe(folder: Path) -> tuple[bool, float]:
    """Write a file, read it and remove it. Returns whether O_DIRECT works, and the median GB/s of 16 MiB requests."""
    buffer = mmap.mmap(-1, REQUEST_BYTES)  # anonymous memory begins on a page, as unbuffered reads want it
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
    buffer.write(os.urandom(1 << 20) * (REQUEST_BYTES >> 20))  # random, so that a disk that compresses gains nothing
    with tempfile.NamedTemporaryFile(dir=folder, prefix="offmoe-doctor-") as file:
        for _ in range(PROBE_BYTES // REQUEST_BYTES):
            file.write(buffer)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
        if hasattr(os, "O_DIRECT") and hasattr(os, "preadv"):
            with suppress(OSError):
                return True, _read_rate(file.name, flags | os.O_DIRECT, buffer)
        return False, _read_rate(file.name, flags, buffer)


def _read_rate(path: str, flags: int, buffer: mmap.mmap) -> float:
    """Median GB/s. Raises OSError if opening or reading refuses the flags."""
    rates = []
    with open(path, "rb", buffering=0, opener=lambda name, _: os.open(name, flags)) as file:
        for _ in range(PROBE_BYTES // REQUEST_BYTES):
            began = time.perf_counter()
            read = file.readinto(buffer)
            rates.append(read / 1e9 / max(time.perf_counter() - began, 1e-9))
    return statistics.median(rates)


def compiler() -> Check:
    """List the compilers that could build the kernels. Whether one is needed is the check "kernels"."""
    paths = {name: shutil.which(name) for name in ("cc", "clang", "nvcc")}
    have = ", ".join(f"{name} ({path})" for name, path in paths.items() if path)
    return _check("compiler", "ok", have or "none", "", **paths)


def device() -> Check:
    """List the devices that torch can compute on."""
    from offmoe.device.cuda import cuda_devices

    devices = cuda_devices()
    if devices:
        text = "; ".join(
            f"cuda:{i} {d.name}, {format_size(d.free)} of {format_size(d.total)} free, compute {d.capability}"
            for i, d in enumerate(devices)
        )
        return _check("device", "ok", text, "", cuda=[d._asdict() for d in devices])
    unused = shutil.which("nvidia-smi") is not None
    advice = "This torch cannot use the NVIDIA driver of this machine: install a CUDA build of torch from pytorch.org."
    text = f"the CPU; torch {metadata.version('torch')} finds no GPU"
    return _check("device", "warn" if unused else "ok", text, advice, cuda=[])


def kernels() -> Check:
    """Check for the C kernels that compute experts on the CPU."""
    from offmoe.compute.kernels.library import status

    kernel_status = status()
    if kernel_status.library is not None:
        return _check("kernels", "ok", kernel_status.message, "", variant=kernel_status.variant)
    fact, _, remedy = kernel_status.message.partition(": ")
    return _check("kernels", "warn", fact, remedy, variant=None)


def pinning() -> Check:
    """Check how much memory the driver pins, up to 2 GiB. Copies to a GPU are fastest from pinned memory."""
    from offmoe.device.cuda import cuda_devices
    from offmoe.device.host_buffers import HostBuffers
    from offmoe.device.select import select_backend

    if not cuda_devices():
        return _check("pinning", "ok", "not needed without a GPU", "", pinned=None)
    cuda = select_backend("cuda")
    wanted = min(PIN_PROBE_BYTES, cgroup_free_bytes() // 4) // PIN_CHUNK_BYTES
    began = time.perf_counter()
    with closing(HostBuffers(max(1, wanted), PIN_CHUNK_BYTES, pinning=cuda)) as buffers:
        pinned = sum(buffers.pinned(i) for i in range(len(buffers))) * PIN_CHUNK_BYTES
    took = time.perf_counter() - began
    refused = pinned < len(buffers) * PIN_CHUNK_BYTES
    text = f"{format_size(pinned)} could be pinned ({took:.1f} s{', then the driver refused' if refused else ''})"
    advice = "Copies from unpinned memory are slower: on WSL2 and in containers raise the memory limit (ulimit -l)."
    return _check("pinning", "warn" if refused else "ok", text, advice, pinned=pinned, refused=refused)


def link() -> Check:
    """Measure copies from pinned host memory to the device."""
    from offmoe.device.cuda import cuda_devices
    from offmoe.device.select import select_backend
    from offmoe.measure.probes import copy_gb_s

    if not cuda_devices():
        return _check("link", "ok", "not needed without a GPU", "", gb_s=None)
    rate = copy_gb_s(select_backend("cuda"), 64 << 20)
    slow = rate < 5
    advice = "The link has few lanes or is an old generation: check that the card is in a slot with 16 lanes."
    return _check("link", "warn" if slow else "ok", f"{rate:.1f} GB/s to the device", advice, gb_s=round(rate, 2))
