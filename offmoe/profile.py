"""Profiles: tuned options and measured costs in one JSON file, so that a run needs no options.

{"cache": {cache options}, "costs": {measured costs}, "expected": {what the tuned cache did on its trace}}; every part
is optional. `offmoe tune` writes "cache" and `offmoe calibrate` writes "costs". An option that is given wins over a
profile, and a profile over a default; config.py applies that.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from offmoe.errors import ConfigError, OffmoeError
from offmoe.files import replacing

CACHE_OPTIONS = ("eviction", "scope", "slots_per_layer", "prefetch", "half_life", "popularity", "host_slots", "on_miss")
PARTS = ("cache", "costs", "expected")
RETIRED_COSTS = frozenset(
    {"expert_us_device_4", "expert_us_device_overlapped", "disk_gb_s_overlapped", "h2d_gb_s_overlapped"}
)
"""Figures that older profiles hold. No price was ever computed from them, so they are no longer measured."""


def _is_amount(value: object) -> bool:
    """Whether a value is a finite number, 0 or more."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


@dataclass(frozen=True)
class MissCosts:
    """Times to weigh fetching a missed expert against computing it on the host, for a device with memory of its own.

    All values are microseconds for one expert, the model's largest.

    Args:
        link_us: Copying it from RAM to the device.
        read_us: Reading it from disk into RAM.
        host_us: Computing it on the CPU for one token.
        host_shared_us: The same while the link uses its share of RAM's bandwidth.
        host_token_us: Computing it on the CPU for every further token.
        device_us: Computing it on the device.
        handoff_us: Copying activations to the host and results back, once per layer.

    Raises:
        ConfigError: A value is no number of microseconds.
    """

    link_us: float
    read_us: float
    host_us: float
    host_shared_us: float
    host_token_us: float
    device_us: float
    handoff_us: float = 50.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not _is_amount(value):
                raise ConfigError(f"miss_costs: {f.name}={value!r} must be a number of microseconds, 0 or more.")

    @classmethod
    def assumed(cls, expert_bytes: int) -> MissCosts:
        """Times to assume where nothing was measured.

        They stand for a link of 24 GB/s (PCIe 4 x16), a disk of 3 GB/s, a CPU that reads weights at 30 GB/s (20 GB/s
        while the link is busy) and computes 200 GFLOP/s on two-byte weights, and a device that reads 500 GB/s.
        """

        def us(gb_s: float) -> float:
            return expert_bytes / gb_s / 1e3

        return cls(us(24), us(3), us(30), us(20), us(200), us(500))

    def host_s(self, tokens: Iterable[int], link_busy_us: float, scale: float) -> float:
        """Seconds until the host has computed one expert per entry of `tokens`; the link is busy for link_busy_us."""
        alone = sum([self.host_us + (n - 1) * self.host_token_us for n in tokens]) * scale
        slowed = self.host_us / self.host_shared_us if self.host_shared_us else 1.0
        overlapped = min(alone, link_busy_us * slowed)
        return (self.handoff_us + (overlapped / slowed if slowed else 0.0) + alone - overlapped) * 1e-6


@dataclass(frozen=True)
class CostModel:
    """What moving and computing costs on one machine with one model. GB are 10^9 bytes; None means not measured.

    Args:
        disk_gb_s: Reading experts from disk, GB/s.
        expert_us_device: Computing one expert for one token on the device, microseconds.
        dense_us_per_token: Computing everything but the experts, all layers together, microseconds per token.
        h2d_gb_s: Copying from the host to the device, GB/s. None: slots are in RAM and nothing is copied.
        read_latency_us: Time of one fetch that does not depend on its bytes.
        ram_gb_s: Copies within RAM, GB/s; slots in RAM are filled by them.
        expert_us_host: Computing one expert for one token on the CPU.
        expert_us_host_4: The same for four tokens.
        expert_us_host_overlapped: The same for one token while experts are read or copied.
        expert_us_landed: Part of expert_us_device that remains when all of a large expert has landed, if computing
            begins before; estimated from its size. None: all of it.
        fetch_us: Time that one fetch takes from the computing thread, besides waiting. 0 unless a profile names it.

    Raises:
        ConfigError: A value is no number of its unit.
    """

    disk_gb_s: float
    expert_us_device: float
    dense_us_per_token: float
    h2d_gb_s: float | None = None
    read_latency_us: float = 0.0
    ram_gb_s: float | None = None
    expert_us_host: float | None = None
    expert_us_host_4: float | None = None
    expert_us_host_overlapped: float | None = None
    expert_us_landed: float | None = None
    fetch_us: float = 0.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.default is None:
                continue
            if not _is_amount(value) or (value == 0 and "gb_s" in f.name):
                least = "a positive number" if "gb_s" in f.name else "a number of microseconds, 0 or more"
                raise ConfigError(f"costs: {f.name}={value!r} must be {least}.")

    def fetch_s(self, nbytes: int, *, read: bool = True) -> float:
        """Seconds that one expert occupies the slower of disk and link, which overlap. read=False: the link alone."""
        if not read:
            return 0.0 if self.h2d_gb_s is None else nbytes / (self.h2d_gb_s * 1e9)
        slowest = self.disk_gb_s if self.h2d_gb_s is None else min(self.disk_gb_s, self.h2d_gb_s)
        return nbytes / (slowest * 1e9) + self.read_latency_us * 1e-6

    def landing_s(self, nbytes: int) -> float:
        """Seconds to copy an expert from its buffer into a slot in RAM while the next one is read; 0 if unknown."""
        return 0.0 if self.h2d_gb_s is not None or self.ram_gb_s is None else nbytes / (self.ram_gb_s * 1e9)

    def miss_costs(self, nbytes: int) -> MissCosts:
        """The times for experts of `nbytes`. Times that were not measured follow from others or are assumed."""
        assumed = MissCosts.assumed(nbytes)
        link = assumed.link_us if self.h2d_gb_s is None else nbytes / self.h2d_gb_s / 1e3
        host = assumed.host_us if self.expert_us_host is None else self.expert_us_host
        shared = host * assumed.host_shared_us / assumed.host_us
        shared = shared if self.expert_us_host_overlapped is None else max(host, self.expert_us_host_overlapped)
        token = assumed.host_token_us if self.expert_us_host_4 is None else max(0.0, self.expert_us_host_4 - host) / 3
        read = nbytes / self.disk_gb_s / 1e3 + self.read_latency_us
        return MissCosts(link, read, host, shared, token, self.expert_us_device)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> CostModel:
        """Costs of a profile file. ConfigError for an unknown or a missing name; RETIRED_COSTS are ignored."""
        values = {name: value for name, value in values.items() if name not in RETIRED_COSTS}
        known = {f.name for f in fields(cls)}
        for name in sorted(set(values) - known):
            raise ConfigError(f"costs: {name!r} is unknown; known: {', '.join(sorted(known))}.")
        for name in ("disk_gb_s", "expert_us_device", "dense_us_per_token"):
            if name not in values:
                raise ConfigError(
                    f"costs: {name!r} is missing; needed: disk_gb_s, expert_us_device, dense_us_per_token."
                )
        return cls(**values)  # type: ignore[arg-type]  # checked in __post_init__

    def to_dict(self) -> dict[str, object]:
        """Values for JSON, without those that were not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Profile:
    """A profile in memory. `cache` holds cache options by name; their values are checked when they are used."""

    cache: Mapping[str, object] = field(default_factory=dict)
    costs: CostModel | None = None
    expected: Mapping[str, object] = field(default_factory=dict)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON, whole or not at all.

        Raises:
            ConfigError: The path cannot be written.
            OffmoeError: The disk is full.
        """
        parts = {
            "cache": dict(self.cache),
            "costs": None if self.costs is None else self.costs.to_dict(),
            "expected": dict(self.expected),
        }
        lines = [f' "{name}": {_lines(part)}' for name, part in parts.items() if part]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        try:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            full = error.errno == errno.ENOSPC
            advice = "free space or choose another path" if full else "choose another path"
            raise (OffmoeError if full else ConfigError)(
                f"profile {os.fspath(path)!r}: cannot be written ({error.strerror}); {advice}."
            ) from error


def _lines(part: Mapping[str, object]) -> str:
    """A JSON object with one line per value, lists included."""
    return "{\n" + ",\n".join(f'  "{name}": {json.dumps(value)}' for name, value in part.items()) + "\n }"


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Read and check a profile file; ConfigError with the reason if it is none."""
    name = f"profile={os.fspath(path)!r}"
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{name}: cannot be read ({error.strerror}); write one with 'offmoe tune' or 'offmoe calibrate'."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not JSON ({error}).") from error
    if not isinstance(values, dict) or not set(values) & {"cache", "costs"}:
        raise ConfigError(f"{name}: no profile: an object with 'cache' or 'costs' is expected.")
    for part in values:
        if part not in PARTS:
            raise ConfigError(f"{name}: {part!r} is unknown; known: {', '.join(PARTS)}.")
        if not isinstance(values[part], dict):
            raise ConfigError(f"{name}: {part!r} must be an object.")
    cache = values.get("cache", {})
    for option in cache:
        if option not in CACHE_OPTIONS:
            raise ConfigError(f"{name}: cache option {option!r} is unknown; known: {', '.join(CACHE_OPTIONS)}.")
    try:
        costs = CostModel.from_dict(values["costs"]) if values.get("costs") else None
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return Profile(cache, costs, values.get("expected", {}))
