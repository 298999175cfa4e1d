"""Profiles: what was tuned and what was measured, in one JSON file, so that a run needs no options.

{"cache": {cache options}, "costs": {measured costs}, "expected": {what the tuned cache did on its trace}}, every part
optional. `offmoe tune` writes "cache", `offmoe calibrate` "costs". Nothing moves and nothing decides here: an explicit
option wins over a profile, a profile over a default, and config.py applies that."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from offmoe.errors import ConfigError
from offmoe.files import replacing

CACHE_OPTIONS = ("eviction", "scope", "slots_per_layer", "prefetch", "half_life", "popularity", "host_slots", "on_miss")
PARTS = ("cache", "costs", "expected")
RETIRED_COSTS = frozenset(
    {"expert_us_device_4", "expert_us_device_overlapped", "disk_gb_s_overlapped", "h2d_gb_s_overlapped"}
)
"""Figures that older profiles hold. No price was ever computed from them, so they are no longer measured."""

DEFAULT_HANDOFF_US = 50.0


@dataclass(frozen=True)
class MissCosts:
    """What decides between fetching a missed expert and computing it on the host, microseconds; of a device with memory
    of its own. ConfigError naming a value that cannot be.

    link_us: one expert (the model's largest) to the device. read_us: from disk into RAM. host_us: computed on the CPU
    for one token; host_shared_us: the same while the link takes its share of RAM's bandwidth; host_token_us: every
    further token. device_us: computed on the device. handoff_us: activations to the host and results back, once per
    layer.
    """

    link_us: float
    read_us: float
    host_us: float
    host_shared_us: float
    host_token_us: float
    device_us: float
    handoff_us: float = DEFAULT_HANDOFF_US

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"miss_costs: {f.name}={value!r} must be a number of microseconds, 0 or more.")

    @classmethod
    def assumed(cls, expert_bytes: int) -> MissCosts:
        """Where nothing was measured: a link of 24 GB/s (PCIe 4 x16), a disk of 3, a CPU that takes in 30 GB/s alone
        and 20 beside the link and computes 200 GFLOP/s on two-byte weights, a device of 500 GB/s.
        """

        def us(gb_s: float) -> float:
            return expert_bytes / gb_s / 1e3

        return cls(us(24), us(3), us(30), us(20), us(200), us(500))

    def host_s(self, tokens: Iterable[int], link_busy_us: float, scale: float) -> float:
        """Seconds until the host has computed experts with so many tokens each, the link being busy at first."""
        alone = sum([self.host_us + (n - 1) * self.host_token_us for n in tokens]) * scale
        slowed = self.host_us / self.host_shared_us if self.host_shared_us else 1.0
        beside = min(alone, link_busy_us * slowed)
        return (self.handoff_us + (beside / slowed if slowed else 0.0) + alone - beside) * 1e-6


@dataclass(frozen=True)
class CostModel:
    """What moving and computing costs on one machine with one model; ConfigError naming a value that cannot be.

    disk_gb_s: reading experts, GB/s (10^9). h2d_gb_s: host to device; None: slots are in RAM, nothing is copied.
    read_latency_us: of one fetch, beside its bytes. expert_us_device: one expert on one token. dense_us_per_token:
    everything but the experts, all layers together. expert_us_host: one expert on one token on the CPU.
    expert_us_host_4: on four tokens. expert_us_host_overlapped: on one token while experts are copied or read.
    ram_gb_s: copies within RAM, which slots in RAM are filled by. expert_us_landed: the part of expert_us_device that
    is left when all of a large expert has landed, estimated from its size, where computing begins before; None: all of
    it. fetch_us: the time that one fetch takes from the computing thread beyond waiting; 0 unless a profile names it.
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
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and "gb_s" in f.name):
                least = "a positive number" if "gb_s" in f.name else "a number of microseconds, 0 or more"
                raise ConfigError(f"costs: {f.name}={value!r} must be {least}.")

    def fetch_s(self, nbytes: int, *, read: bool = True) -> float:
        """Seconds that one expert of `nbytes` occupies the slower of disk and link, which overlap; not `read`: the
        link alone."""
        if not read:
            return 0.0 if self.h2d_gb_s is None else nbytes / (self.h2d_gb_s * 1e9)
        slowest = self.disk_gb_s if self.h2d_gb_s is None else min(self.disk_gb_s, self.h2d_gb_s)
        return nbytes / (slowest * 1e9) + self.read_latency_us * 1e-6

    def landing_s(self, nbytes: int) -> float:
        """Seconds that an expert needs from its buffer into a slot in RAM, while the next is read; 0 if unknown."""
        return 0.0 if self.h2d_gb_s is not None or self.ram_gb_s is None else nbytes / (self.ram_gb_s * 1e9)

    def miss_costs(self, nbytes: int) -> MissCosts:
        """Of experts of `nbytes`; what was not measured follows from what was, or is assumed."""
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
        """For JSON; what was not measured is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Profile:
    """A profile in memory. `cache` holds cache options by name, unchecked beyond their names."""

    cache: Mapping[str, object] = field(default_factory=dict)
    costs: CostModel | None = None
    expected: Mapping[str, object] = field(default_factory=dict)

    def write(self, path: str | os.PathLike[str]) -> None:
        """As JSON, atomically; ConfigError when the path cannot be written."""
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
            raise ConfigError(f"profile {os.fspath(path)!r}: cannot be written ({error.strerror}).") from error


def _lines(part: Mapping[str, object]) -> str:
    """An object with a line for every value, lists included."""
    return "{\n" + ",\n".join(f'  "{name}": {json.dumps(value)}' for name, value in part.items()) + "\n }"


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """A profile file, checked; ConfigError with the reason for anything that is not one."""
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
