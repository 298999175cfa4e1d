"""Machines by name, to plan for one that is not here: GPU, RAM and disk, with what their makers state.

A name joins parts with "+": `rtx-3060-12g+ddr4-3200-64g+nvme-gen4`. RAM and disk may be left out; the assumed ones are
then said. A name without a GPU is a machine that computes on its CPU. Bandwidths are not copied from tests: they follow
from the width of the bus and its data rate, which the data sheets state. No program reaches them, so `Machine.rates`
takes a share of each.

Sources: memory and bus of GPUs, NVIDIA's and AMD's product pages and data sheets; PCI Express Base Specification
(8, 16 and 32 GT/s per lane for generations 3 to 5, 128b/130b encoding); JEDEC JESD79-4 (DDR4) and JESD79-5 (DDR5), 64
data bits per channel; Serial ATA 3 (6 Gbit/s, 8b/10b encoding).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import NamedTuple

from offmoe.errors import ConfigError

GIB = 1 << 30
LANE_GB_S = {3: 8 * 128 / 130 / 8, 4: 16 * 128 / 130 / 8, 5: 32 * 128 / 130 / 8}
"""GB/s of one PCIe lane by generation."""


class Gpu(NamedTuple):
    """A graphics card: its memory in GiB, the memory's bus in bits and Gbit/s per pin, and its PCIe connection."""

    memory_gib: int
    bus_bits: int
    gbit_s: float
    generation: int
    lanes: int = 16

    @property
    def memory_gb_s(self) -> float:
        """Bandwidth of the memory by its data sheet, GB/s."""
        return self.bus_bits * self.gbit_s / 8

    @property
    def link_gb_s(self) -> float:
        """Bandwidth of the PCIe connection in one direction, GB/s."""
        return LANE_GB_S[self.generation] * self.lanes


GPUS: Mapping[str, Gpu] = {
    "rtx-2060-6g": Gpu(6, 192, 14, 3),
    "rtx-2060-12g": Gpu(12, 192, 14, 3),
    "rtx-2070-8g": Gpu(8, 256, 14, 3),
    "rtx-2080-8g": Gpu(8, 256, 14, 3),
    "rtx-2080-ti-11g": Gpu(11, 352, 14, 3),
    "rtx-3050-8g": Gpu(8, 128, 14, 4, 8),
    "rtx-3060-12g": Gpu(12, 192, 15, 4),
    "rtx-3060-ti-8g": Gpu(8, 256, 14, 4),
    "rtx-3070-8g": Gpu(8, 256, 14, 4),
    "rtx-3080-10g": Gpu(10, 320, 19, 4),
    "rtx-3080-12g": Gpu(12, 384, 19, 4),
    "rtx-3090-24g": Gpu(24, 384, 19.5, 4),
    "rtx-4060-8g": Gpu(8, 128, 17, 4, 8),
    "rtx-4060-ti-8g": Gpu(8, 128, 18, 4, 8),
    "rtx-4060-ti-16g": Gpu(16, 128, 18, 4, 8),
    "rtx-4070-12g": Gpu(12, 192, 21, 4),
    "rtx-4070-ti-12g": Gpu(12, 192, 21, 4),
    "rtx-4070-ti-super-16g": Gpu(16, 256, 21, 4),
    "rtx-4080-16g": Gpu(16, 256, 22.4, 4),
    "rtx-4090-24g": Gpu(24, 384, 21, 4),
    "rtx-5060-8g": Gpu(8, 128, 28, 5, 8),
    "rtx-5060-ti-8g": Gpu(8, 128, 28, 5, 8),
    "rtx-5060-ti-16g": Gpu(16, 128, 28, 5, 8),
    "rtx-5070-12g": Gpu(12, 192, 28, 5),
    "rtx-5070-ti-16g": Gpu(16, 256, 28, 5),
    "rtx-5080-16g": Gpu(16, 256, 30, 5),
    "rtx-5090-32g": Gpu(32, 512, 28, 5),
    "rtx-a4000-16g": Gpu(16, 256, 14, 4),
    "rtx-a5000-24g": Gpu(24, 384, 16, 4),
    "rtx-a6000-48g": Gpu(48, 384, 16, 4),
    "t4-16g": Gpu(16, 256, 10, 3),
    "a10-24g": Gpu(24, 384, 12.5, 4),
    "l4-24g": Gpu(24, 192, 12.5, 4),
    "l40s-48g": Gpu(48, 384, 18, 4),
    "a100-40g": Gpu(40, 5120, 2.43, 4),
    "a100-80g": Gpu(80, 5120, 3.02, 4),
    "h100-80g": Gpu(80, 5120, 5.23, 5),
    "h200-141g": Gpu(141, 6144, 6.25, 5),
    "rx-7800-xt-16g": Gpu(16, 256, 19.5, 4),
    "rx-7900-xtx-24g": Gpu(24, 384, 20, 4),
}
"""Graphics cards by name. Of the a100-80g this is the PCIe board, of h100 and h200 the SXM board."""

RAM_SPEEDS: Mapping[str, tuple[int, ...]] = {
    "ddr3": (1333, 1600, 1866),
    "ddr4": (2133, 2400, 2666, 2933, 3200, 3600),
    "ddr5": (4800, 5200, 5600, 6000, 6400, 8000),
}
"""MT/s that modules are sold with, by kind of RAM."""
CHANNEL_BYTES = 8
DEFAULT_CHANNELS = 2
"""A desktop's or a notebook's. Servers have 8 or 12: `ddr5-4800x8`."""
DEFAULT_RAM, DEFAULT_RAM_GIB, DEFAULT_DISK = "ddr4-3200", 32, "nvme-gen3"

DISKS: Mapping[str, float] = {
    "hdd": 0.2,
    "sata-ssd": 0.6,
    "nvme-gen3": 4 * LANE_GB_S[3],
    "nvme-gen4": 4 * LANE_GB_S[4],
    "nvme-gen5": 4 * LANE_GB_S[5],
}
"""GB/s of the disk's connection, four lanes for NVMe; for "hdd", of the platters' outer tracks."""

CONNECTION_SHARE = 0.76
"""Share of a PCIe or SATA connection that large transfers reach: 24 of the 31.5 GB/s of PCIe 4.0 x16, which
`MissCosts.assumed` takes too."""
RAM_SHARE = 0.6
"""Share of RAM's bandwidth at which a CPU computes with weights: 30 of the 51.2 GB/s of two channels of DDR4-3200,
which `MissCosts.assumed` takes too."""
DEVICE_SHARE = 0.75
"""Share of a GPU's bandwidth at which a product of a matrix and one row reads the matrix. Assumed, not measured."""
DRIVER_BYTES = GIB // 2
"""Device memory that the driver's context takes before anything is loaded."""
DEVICE_AUTO_SHARE = 0.9
"""Fraction of a device's free memory that "auto" takes."""
RAM_AUTO_SHARE = 0.7
"""Fraction of the available RAM that "auto" takes beside a device. It is pinned there: nothing else can have it."""
RESERVE_SHARE = 0.1
"""Fraction of the available RAM that "auto" leaves where a CPU computes. With 0.3 of 20 GiB left, Mixtral 8x7B in int4
decoded 0.85 tokens/s, and 1.3 with 0.1 (docs/log.md)."""
LEAST_RESERVE_BYTES = GIB
"""It leaves as much at least: a process takes up to 0.6 GiB besides its plan (tools/bench/any_memory.py)."""
MOST_RESERVE_SHARE = 0.3
"""Or this fraction, if that is less."""
SYSTEM_BYTES = 2 * GIB
"""RAM that a system takes for itself."""

_RAM = re.compile(r"(?P<kind>ddr\d)-(?P<speed>\d+)(?:x(?P<channels>\d{1,2}))?(?:-(?P<gib>\d{1,4})g)?")


@dataclass(frozen=True)
class Ram:
    """The RAM of a machine. gib: its size; None if the name does not say it."""

    name: str
    mt_s: int
    channels: int = DEFAULT_CHANNELS
    gib: int | None = None

    @property
    def gb_s(self) -> float:
        """Bandwidth by the standard, GB/s."""
        return self.channels * CHANNEL_BYTES * self.mt_s / 1000

    @property
    def nbytes(self) -> int:
        """Its bytes, `DEFAULT_RAM_GIB` if the name does not say them."""
        return (self.gib or DEFAULT_RAM_GIB) * GIB


@dataclass(frozen=True)
class Machine:
    """A machine by name. gpu_name is None if it has no GPU; `assumed` lists the parts that the name left out."""

    gpu_name: str | None
    ram: Ram
    disk_name: str
    assumed: tuple[str, ...] = ()

    def with_ram_for(self, nbytes: int) -> Machine:
        """The same machine with RAM of which "auto" would take at least `nbytes`, for a name that says no size."""
        free = ram_for_auto(nbytes) if self.gpu_name is None else nbytes / RAM_AUTO_SHARE
        gib = math.ceil(free / GIB) + SYSTEM_BYTES // GIB
        name = self.ram.name
        assumed = tuple(text for text in self.assumed if "GiB" not in text)
        return replace(self, ram=replace(self.ram, name=f"{name}-{gib}g", gib=gib), assumed=assumed)

    @property
    def gpu(self) -> Gpu | None:
        return None if self.gpu_name is None else GPUS[self.gpu_name]

    @property
    def name(self) -> str:
        """All parts, the assumed ones too."""
        ram = self.ram.name if self.ram.gib else f"{self.ram.name}-{DEFAULT_RAM_GIB}g"
        return "+".join(part for part in (self.gpu_name, ram, self.disk_name) if part)

    @property
    def disk_gb_s(self) -> float:
        """GB/s that reading experts is assumed to reach."""
        peak = DISKS[self.disk_name]
        return peak if self.disk_name == "hdd" else peak * CONNECTION_SHARE

    @property
    def link_gb_s(self) -> float | None:
        """GB/s that copies to the GPU are assumed to reach; None without a GPU."""
        return None if self.gpu is None else self.gpu.link_gb_s * CONNECTION_SHARE

    @property
    def ram_gb_s(self) -> float:
        """GB/s at which the CPU is assumed to compute with weights."""
        return self.ram.gb_s * RAM_SHARE

    @property
    def device_gb_s(self) -> float:
        """GB/s at which the device, the GPU if there is one, is assumed to compute with weights."""
        return self.ram_gb_s if self.gpu is None else self.gpu.memory_gb_s * DEVICE_SHARE

    @property
    def device_free_bytes(self) -> int:
        """Bytes of the device's memory that are free before a model is loaded."""
        if self.gpu is None:
            return self.ram_free_bytes
        return self.gpu.memory_gib * GIB - DRIVER_BYTES

    @property
    def ram_free_bytes(self) -> int:
        """Bytes of RAM that are free before a model is loaded."""
        return max(0, self.ram.nbytes - SYSTEM_BYTES)


def parse_machine(text: str) -> Machine:
    """The machine that a name describes.

    Args:
        text: parts joined by "+", in any order; upper case, blanks and "GB" are accepted: "RTX 3060 12GB + DDR4-3200".

    Raises:
        ConfigError: a part is unknown (the message has the names that are close, or all of them), or stands twice.
    """
    parts: dict[str, str | Ram] = {}
    for raw in text.split("+"):
        word = re.sub(r"(\d)gi?b\b", r"\1g", re.sub(r"[\s_]+", "-", raw.strip().lower()))
        kind, value = _part(word, text)
        if kind in parts:
            raise ConfigError(f"--machine {text!r}: names two parts of one kind, {kind}. Give one of each.")
        parts[kind] = value
    ram, gpu = parts.get("RAM"), parts.get("GPU")
    assumed = []
    if not isinstance(ram, Ram):
        ram = Ram(DEFAULT_RAM, int(DEFAULT_RAM.rpartition("-")[2]))
        assumed.append(f"{DEFAULT_RAM} RAM")
    if ram.gib is None:
        assumed.append(f"{DEFAULT_RAM_GIB} GiB of RAM")
    if "disk" not in parts:
        assumed.append(f"a disk of kind {DEFAULT_DISK}")
    return Machine(None if gpu is None else str(gpu), ram, str(parts.get("disk", DEFAULT_DISK)), tuple(assumed))


def _part(word: str, text: str) -> tuple[str, str | Ram]:
    """(kind, value) of one part of a machine's name."""
    if word in DISKS:
        return "disk", word
    if match := _RAM.fullmatch(word):
        speeds = RAM_SPEEDS.get(match["kind"], ())
        channels, gib = int(match["channels"] or DEFAULT_CHANNELS), match["gib"]
        if int(match["speed"]) in speeds and channels and gib != "0":
            return "RAM", Ram(word, int(match["speed"]), channels, None if gib is None else int(gib))
    sizes = [name for name in GPUS if name == word or name.rpartition("-")[0] == word]
    if len(sizes) == 1:
        return "GPU", sizes[0]
    if sizes:
        raise ConfigError(f"--machine {text!r}: {word!r} exists with several memories. Use {' or '.join(sizes)}.")
    known = machine_parts()
    close = get_close_matches(word, known, n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise ConfigError(
        f"--machine {text!r}: {word!r} is no known part. {hint}Known: {', '.join(known)}. RAM may have channels and a "
        "size: ddr5-4800x8-256g."
    )


def machine_parts() -> list[str]:
    """The names of all parts: GPUs, then RAM, then disks."""
    return [*GPUS, *ram_names(), *DISKS]


def ram_names() -> Iterable[str]:
    """The names of all kinds of RAM, without channels and sizes."""
    return (f"{kind}-{speed}" for kind, speeds in RAM_SPEEDS.items() for speed in speeds)


def device_auto_bytes(free: int) -> int:
    """What "auto" takes of a device's memory of which `free` bytes are free."""
    return int(DEVICE_AUTO_SHARE * free)


def ram_auto_bytes(free: int) -> int:
    """What "auto" takes of RAM of which `free` bytes are available, where a CPU computes."""
    return free - int(min(MOST_RESERVE_SHARE * free, max(RESERVE_SHARE * free, LEAST_RESERVE_BYTES)))


def ram_for_auto(nbytes: int) -> int:
    """Available bytes of RAM of which "auto" takes `nbytes` or a few more, where a CPU computes."""
    more = max(nbytes / (1 - RESERVE_SHARE), nbytes + LEAST_RESERVE_BYTES)
    return math.ceil(min(nbytes / (1 - MOST_RESERVE_SHARE), more)) + 1
