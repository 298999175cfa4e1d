"""Options of a run: frozen, validated once, the same words in Python, on the command line and in files.

Nothing comes from environment variables. "auto" values are resolved where the facts are known (memory, model, device)
by `dataclasses.replace`, so that `model.offload.config` says what really happened. The part of it that decisions
depend on is written into every trace (`CacheOptions`), which is what makes replay exact."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from offmoe.errors import ConfigError
from offmoe.eviction_names import EVICTIONS as EVICTIONS
from offmoe.eviction_names import check_eviction
from offmoe.profile import CACHE_OPTIONS, MissCosts, Profile, read_profile
from offmoe.types import CacheShape

SCOPES = ("layer", "model")
ON_MISS = ("fetch", "cpu", "auto")
EXPERTS = ("native", "int8", "int4")
EXACTNESS = ("auto", "bitwise", "numeric")
ACTIVATIONS = ("float", "int8")
LARGEST = 2**63 - 1
"""Bytes or tokens; more is a slip of the finger, and no float could hold what is worked out from it."""

_UNITS = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def parse_size(value: int | str, option: str) -> int:
    """Bytes of 10737418240, "10GiB", "10 GB", "512M"; ConfigError naming `option` otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(value), re.IGNORECASE)
    size = float(match[1]) * _UNITS[match[2].upper()] if match and match[2].upper() in _UNITS else 0
    if not 1 <= size <= LARGEST:
        raise ConfigError(f"{option}={value!r} is not a size. Use bytes or a number with a unit, such as '10GiB'.")
    return int(size)


@dataclass(frozen=True)
class CacheOptions:
    """What decisions depend on besides the accesses; written into traces, read back by replay.

    slots_per_layer: one int, or one per MoE layer (scope "layer"); scope "model" pools their sum.
    prefetch: 0 = off, n = at most n experts per layer, "auto" = as long as it pays.
    half_life: accesses of a layer after which a use counts half (aged-lfu); flat optimum 8-32 on real routing.
    popularity: one number per expert and MoE layer, higher stays (static); counted by `offmoe tune`.
    host_slots: experts that RAM holds between disk and device, of each MoE layer; one int, or one per layer.
    on_miss: "fetch": what is missed gets a slot. "cpu": while there are free ones; the rest is computed without.
    "auto": what is likelier to come back than what it would replace gets one.
    miss_costs: of a device with memory of its own, where the host computes what gets no slot; recorded, so that replay
    weighs the same. None: the device's memory is the host's, and so is what computes.
    """

    eviction: str = "aged-lfu"
    scope: str = "layer"
    slots_per_layer: int | tuple[int, ...] = 4
    prefetch: int | str = 0
    half_life: float = 16.0
    popularity: tuple[tuple[float, ...], ...] | None = None
    host_slots: int | tuple[int, ...] = 0
    on_miss: str = "fetch"
    miss_costs: MissCosts | None = None

    def __post_init__(self) -> None:
        check_eviction(self.eviction)
        _one_of("scope", self.scope, SCOPES)
        _one_of("on_miss", self.on_miss, ON_MISS)
        _check_prefetch(self.prefetch)
        _check_slots(self.slots_per_layer)
        _check_slots(self.host_slots, "host_slots", least=0)
        if isinstance(self.half_life, bool) or not isinstance(self.half_life, (int, float)) or not self.half_life > 0:
            raise ConfigError(f"half_life={self.half_life!r} must be a positive number of accesses.")
        if (self.eviction == "static") != (self.popularity is not None):
            raise ConfigError(
                "eviction='static' and a popularity of experts belong together: use a profile, which "
                "'offmoe tune TRACE --eviction static -o PROFILE' writes, or another eviction."
            )

    def popularity_of(self, shape: CacheShape) -> tuple[tuple[float, ...], ...]:
        """The popularity, which must be there; ConfigError when it is another model's."""
        assert self.popularity is not None
        if tuple(map(len, self.popularity)) != shape.experts:
            raise ConfigError(
                f"the popularity of eviction='static' is that of another model: {len(self.popularity)} layers of "
                f"{sorted(set(map(len, self.popularity)))} experts; here are {shape.layers} of "
                f"{sorted(set(shape.experts))}."
            )
        return self.popularity

    def quotas(self, shape: CacheShape) -> tuple[int, ...]:
        """Slots of each MoE layer, at most its experts; ConfigError when one is below its top_k."""
        slots = self.slots_per_layer
        wanted = (slots,) * shape.layers if isinstance(slots, int) else tuple(slots)
        if len(wanted) != shape.layers:
            raise ConfigError(f"slots_per_layer has {len(wanted)} values, but the model has {shape.layers} MoE layers.")
        for layer, (n, k) in enumerate(zip(wanted, shape.top_k, strict=True)):
            if n < k:
                raise ConfigError(
                    f"slots_per_layer={n} is below top_k={k} of MoE layer {layer}: one token needs {k} experts. "
                    f"Use at least {k}; {k + 1} or more are needed for a cache that can choose."
                )
        return tuple(min(n, e) for n, e in zip(wanted, shape.experts, strict=True))

    def host_quotas(self, shape: CacheShape) -> tuple[int, ...]:
        """Slots in RAM of each MoE layer, at most its experts."""
        slots = self.host_slots
        wanted = (slots,) * shape.layers if isinstance(slots, int) else tuple(slots)
        if len(wanted) != shape.layers:
            raise ConfigError(f"host_slots has {len(wanted)} values, but the model has {shape.layers} MoE layers.")
        return tuple(min(n, e) for n, e in zip(wanted, shape.experts, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what only some policies or machines have is left out where it is not set."""
        values = asdict(self)
        if self.popularity is None:
            del values["popularity"]
        if self.host_slots == 0:
            del values["host_slots"]
        if self.miss_costs is None:
            del values["miss_costs"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CacheOptions:
        """Of a trace's header or a profile; unknown names are a ConfigError."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ConfigError(
                f"unknown cache option {sorted(unknown)[0]!r}; known: {', '.join(cls.__dataclass_fields__)}."
            )
        slots, popularity = values.get("slots_per_layer"), values.get("popularity")
        if isinstance(slots, list):
            values = {**values, "slots_per_layer": tuple(slots)}
        if isinstance(values.get("host_slots"), list):
            values = {**values, "host_slots": tuple(values["host_slots"])}
        if isinstance(values.get("miss_costs"), dict):
            try:
                values = {**values, "miss_costs": MissCosts(**values["miss_costs"])}
            except TypeError as error:
                raise ConfigError(f"miss_costs: {error}.") from None
        if popularity is not None:
            try:
                popularity = tuple(tuple(map(float, layer)) for layer in popularity)
            except (TypeError, ValueError):
                raise ConfigError("popularity must be one list of numbers per MoE layer.") from None
            values = {**values, "popularity": popularity}
        return cls(**values)


class Default(str):
    """The default of an option: equal to its text, but known not to have been asked for, so that a profile may replace
    it."""

    __slots__ = ()


@dataclass(frozen=True)
class OffloadConfig:
    """All options of `from_pretrained` (see interface.md); after loading, every "auto" is resolved.

    profile: a file, or one that was read; its cache options stand in for those that are not given. half_life and
    popularity come from a profile as a rule. activations: "int8" rounds what quantized experts are given to 8 bits, in
    groups, where kernels compute them: faster, and about 1 % of an output's norm off. Raises ConfigError naming the
    option, its value and what would work.
    """

    device: str | None = None
    device_memory: int | str = "auto"
    host_memory: int | str = "auto"
    slots_per_layer: int | tuple[int, ...] | None = None
    experts: str = "native"
    eviction: str = Default("aged-lfu")
    scope: str = Default("layer")
    max_context: int | None = None
    on_miss: str = Default("auto")
    prefetch: int | str = Default("auto")
    exactness: str = "auto"
    activations: str = "float"
    profile: str | os.PathLike[str] | Profile | None = None
    half_life: float | None = None
    popularity: tuple[tuple[float, ...], ...] | None = None
    host_slots: int | tuple[int, ...] | None = None
    """At most so many of what host_memory gives; after loading, how many there are. A profile may say it."""
    miss_costs: MissCosts | None = None
    """Of a profile, or assumed; worked out, not asked for."""

    def __post_init__(self) -> None:
        self._apply_profile()
        _one_of("experts", self.experts, EXPERTS)
        check_eviction(self.eviction)
        _one_of("scope", self.scope, SCOPES)
        _one_of("on_miss", self.on_miss, ON_MISS)
        _one_of("exactness", self.exactness, EXACTNESS)
        _one_of("activations", self.activations, ACTIVATIONS)
        if self.experts != "native" and self.exactness == "bitwise":
            raise ConfigError(
                f"exactness='bitwise' with experts={self.experts!r}: quantized experts have other weights than the "
                "checkpoint's, so nothing could be equal to it. Leave exactness out, or use experts='native' (what "
                "'offmoe pack' wrote is native to its folder, and computed bitwise unless asked otherwise)."
            )
        if self.activations == "int8" and self.experts == "native" and self.exactness != "numeric":
            raise ConfigError(
                "activations='int8' rounds what experts are given, which is not bitwise: it takes exactness='numeric', "
                "or experts='int4' or 'int8'."
            )
        _check_prefetch(self.prefetch)
        if self.device_memory != "auto":
            object.__setattr__(self, "device_memory", parse_size(self.device_memory, "device_memory"))
        if self.host_memory not in ("auto", 0):
            object.__setattr__(self, "host_memory", parse_size(self.host_memory, "host_memory"))
        if self.slots_per_layer is not None:
            _check_slots(self.slots_per_layer)
            if not isinstance(self.slots_per_layer, int):
                object.__setattr__(self, "slots_per_layer", tuple(self.slots_per_layer))
        self._cache(1)
        if self.max_context is not None and (
            not isinstance(self.max_context, int) or not 1 <= self.max_context <= LARGEST
        ):
            raise ConfigError(f"max_context={self.max_context!r} must be a positive number of tokens.")

    def resolved(self, **values: Any) -> OffloadConfig:
        """This with some "auto"s replaced."""
        return replace(self, **values)

    @property
    def is_numeric(self) -> bool:
        """Whether results may differ from stock's by the order of sums; "auto": once experts are quantized."""
        return self.exactness == "numeric" or (self.exactness == "auto" and self.experts != "native")

    def most_in_ram(self, shape: CacheShape) -> tuple[int, ...]:
        """Experts of each MoE layer that may have a slot in RAM."""
        return shape.experts if self.host_slots is None else self._cache(1).host_quotas(shape)

    def cache(self) -> CacheOptions:
        """The part that decisions depend on; slots_per_layer must be resolved."""
        assert self.slots_per_layer is not None
        return self._cache(self.slots_per_layer)

    def _cache(self, slots: int | tuple[int, ...]) -> CacheOptions:
        values: dict[str, Any] = {
            "eviction": self.eviction,
            "scope": self.scope,
            "slots_per_layer": slots,
            "prefetch": self.prefetch,
            "host_slots": 0 if self.host_slots is None else self.host_slots,
            "on_miss": self.on_miss,
            "miss_costs": self.miss_costs,
        }
        if self.half_life is not None:
            values["half_life"] = self.half_life
        if self.eviction == "static":
            values["popularity"] = self.popularity
        return CacheOptions.from_dict(values)

    def _apply_profile(self) -> None:
        """Take from the profile what was not given, and forget what was given and what not."""
        profile = self.profile
        if profile is not None and not isinstance(profile, Profile):
            profile = read_profile(profile)
            object.__setattr__(self, "profile", profile)
        for name in CACHE_OPTIONS:
            value = getattr(self, name)
            if (value is None or isinstance(value, Default)) and profile is not None and name in profile.cache:
                object.__setattr__(self, name, profile.cache[name])
            elif isinstance(value, Default):
                object.__setattr__(self, name, str(value))


def _one_of(option: str, value: object, allowed: Sequence[str], to_come: Sequence[str] = ()) -> None:
    if value in allowed:
        return
    if value in to_come:
        raise ConfigError(f"{option}={value!r} is not built yet. Available now: {', '.join(allowed)}.")
    raise ConfigError(f"{option}={value!r} is unknown. Use one of: {', '.join(allowed)}.")


def _check_prefetch(value: int | str) -> None:
    if value != "auto" and (isinstance(value, (bool, str)) or not isinstance(value, int) or value < 0):
        raise ConfigError(f"prefetch={value!r} must be 'auto' or a number of experts per layer (0 = off).")


def _check_slots(slots: object, option: str = "slots_per_layer", least: int = 1) -> None:
    values = slots if isinstance(slots, (list, tuple)) and slots else (slots,)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in values):
        raise ConfigError(f"{option}={slots!r} must be an int or one int per MoE layer.")
    if not isinstance(slots, (list, tuple)) and values[0] < least:
        raise ConfigError(f"{option}={slots!r} must be a {'positive' if least else 'non-negative'} int.")
