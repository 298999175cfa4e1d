"""The options of a run: frozen, checked when made, the same words in Python, on the command line and in files.

Options come from arguments and profiles, never from environment variables. Values of "auto" are replaced
(`OffloadConfig.resolved`) once memory, model and device are known, so `model.offload.config` says what happened.
`CacheOptions` is the part that decisions depend on. Every trace records it, which makes replay exact.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from offmoe.checks import LAG_ONE, check_counts, check_forms, check_graphs, check_lag, check_slots, one_of, per_layer
from offmoe.errors import ConfigError
from offmoe.eviction_names import EVICTIONS as EVICTIONS
from offmoe.eviction_names import check_eviction
from offmoe.profile import CACHE_OPTIONS, MissCosts, Profile, read_profile
from offmoe.text import LARGEST, parse_size, plain
from offmoe.types import CacheShape

SCOPES = ("layer", "model")
MIN_SLOTS = 2
"""Fewest slots of the whole model: one expert is computed while the next one lands."""
ON_MISS = ("fetch", "cpu", "auto")
CHOICES = {
    "experts": ("native", "int8", "int4"),
    "dense": ("native", "int8", "int4"),
    "exactness": ("auto", "bitwise", "numeric"),
    "activations": ("float", "int8"),
}
"""Options of `OffloadConfig` with a fixed set of values, besides those of `CacheOptions`."""


@dataclass(frozen=True)
class CacheOptions:
    """The options that cache decisions depend on, besides the accesses. Traces record them and replay reads them back.

    Their meaning is that of `OffloadConfig`, with every default filled in. With scope="model" slots_per_layer adds up
    to the size of the pool, so single layers may have 0. miss_costs is None where the device computes every expert.
    warm_counts is None without the state of an earlier run.

    Raises:
        ConfigError: A value cannot be used; the message names the option.
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
    warm_counts: tuple[tuple[float, ...], ...] | None = None
    lag: int = 0

    def __post_init__(self) -> None:
        check_eviction(self.eviction)
        one_of("scope", self.scope, SCOPES)
        one_of("on_miss", self.on_miss, ON_MISS)
        if self.prefetch != "auto" and (type(self.prefetch) is not int or self.prefetch < 0):
            raise ConfigError(f"prefetch={self.prefetch!r} must be 'auto' or a number of experts per layer (0 = off).")
        check_slots(self.slots_per_layer)
        check_slots(self.host_slots, "host_slots", least=0)
        if isinstance(self.half_life, bool) or not isinstance(self.half_life, (int, float)) or not self.half_life > 0:
            raise ConfigError(f"half_life={self.half_life!r} must be a positive number of accesses.")
        check_lag(self.lag, prefetch=self.prefetch, on_miss=self.on_miss)
        if (self.eviction == "static") != (self.popularity is not None):
            raise ConfigError(
                "eviction='static' and a popularity of experts belong together: use a profile, which "
                "'offmoe tune TRACE --eviction static -o PROFILE' writes, or another eviction."
            )

    def popularity_of(self, shape: CacheShape) -> tuple[tuple[float, ...], ...]:
        """The popularity, which must have been set; ConfigError if it was counted on another model."""
        assert self.popularity is not None
        check_counts("the popularity for eviction='static' was", self.popularity, shape)
        return self.popularity

    def warm_counts_of(self, shape: CacheShape) -> tuple[tuple[float, ...], ...] | None:
        """The counts of an earlier run, None without one; ConfigError if they are of another model."""
        if self.warm_counts is not None:
            check_counts("the warm_counts were", self.warm_counts, shape)
        return self.warm_counts

    def quotas(self, shape: CacheShape) -> tuple[int, ...]:
        """Slots of each MoE layer, at most as many as it has experts. In one pool only their sum counts.

        Raises:
            ConfigError: a layer has no slot of its own, or the pool has fewer than `MIN_SLOTS`.
        """
        quotas = per_layer("slots_per_layer", self.slots_per_layer, shape)
        if self.scope == "layer" and 0 in quotas:
            raise ConfigError(
                f"slots_per_layer=0 for MoE layer {quotas.index(0)}: with scope='layer' every layer needs a slot of "
                "its own. Use 1 or more, or scope='model' for one pool of all layers."
            )
        least = min(MIN_SLOTS, shape.num_keys)
        if sum(quotas) < least:
            raise ConfigError(
                f"slots_per_layer={plain(quotas)} gives {sum(quotas)} slots in all: at least {least} are needed, one "
                "to compute with while the next expert lands."
            )
        return quotas

    def host_quotas(self, shape: CacheShape) -> tuple[int, ...]:
        """Slots in RAM of each MoE layer, at most as many as it has experts."""
        return per_layer("host_slots", self.host_slots, shape)

    def check(self, shape: CacheShape) -> None:
        """ConfigError if these options do not fit a model of this shape."""
        self.quotas(shape)
        self.host_quotas(shape)
        if self.popularity is not None:
            self.popularity_of(shape)
        self.warm_counts_of(shape)

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, without the options that only some policies or machines set."""
        unset = {"popularity": None, "host_slots": 0, "miss_costs": None, "warm_counts": None, "lag": 0}
        return {name: value for name, value in asdict(self).items() if name not in unset or value != unset[name]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CacheOptions:
        """Options from a trace's header or a profile; ConfigError for unknown names."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ConfigError(
                f"unknown cache option {sorted(unknown)[0]!r}; known: {', '.join(cls.__dataclass_fields__)}."
            )
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        if isinstance(values.get("miss_costs"), dict):
            try:
                values["miss_costs"] = MissCosts(**values["miss_costs"])
            except TypeError as error:
                raise ConfigError(f"miss_costs: {error}.") from None
        for name in ("popularity", "warm_counts"):
            if values.get(name) is not None:
                try:
                    values[name] = tuple(tuple(map(float, layer)) for layer in values[name])
                except (TypeError, ValueError):
                    raise ConfigError(f"{name} must be one list of numbers per MoE layer.") from None
        return cls(**values)


def _profiled(default: str | None = None) -> Any:
    """A field that is None while it is not given; a profile's value replaces None, else `default` does."""
    return field(default=None, metadata={"default": default})


@dataclass(frozen=True)
class OffloadConfig:
    """The options of `from_pretrained` and of the command line. After loading, every "auto" is resolved.

    An option that is given wins over the profile, and the profile over the default.

    Args:
        device: Device for the dense weights and the expert slots: "cpu", "cuda" or "cuda:N". Default: "cuda" if there
            is one, else "cpu". Errors: a device that this machine does not have.
        device_memory: Most memory to use on the device, for dense weights, expert slots and KV cache together: bytes,
            or a size such as "8GiB". Default: "auto", what is free there less a tenth; on a CPU less 1 GiB if that is
            more, and less 30 % at most. Errors: less than the smallest that works for the model; the message names that
            number (CapacityError).
        host_memory: Most RAM to use for experts between disk and device: bytes, a size such as "32GiB", or 0 for none.
            Default: "auto", what the machine can spare. Errors: a size on a CPU, where device_memory caps RAM; less
            than the buffers that reading needs (CapacityError).
        slots_per_layer: Experts resident on the device per MoE layer: one number, or one per layer, whose sum is the
            size of the pool with scope="model". Default: as many as fit in device_memory. Errors: a layer without a
            slot, unless there is one pool; fewer than 2 in all.
        experts: Form of the expert weights: "native" as stored in the checkpoint; "int8" or "int4" to quantize them
            into temporary files while loading. Default: "native". Errors: "int8" or "int4" for experts that are
            quantized already, or together with exactness="bitwise".
        dense: Form of the dense weights (attention, shared experts, head) on a CPU: "native" as stored, "int8" or
            "int4" to quantize them while loading (with "int4" the head to int8). Default: "native". Errors: "int8" or
            "int4" on a GPU, without the C kernels, or with exactness="bitwise".
        eviction: Policy that chooses which expert gives up its slot: aged-lfu, lru, lru-2, s3-fifo, sieve, static, or
            a policy of your own (in Python by `register_eviction`, on the command line by MODULE:CLASS). Default: the
            profile's, else "aged-lfu". Errors: an unknown policy; "static" without the popularity that `offmoe tune`
            writes into a profile.
        scope: What shares slots: "layer" for slots of each layer's own, "model" for one pool of all layers, which also
            works where there are fewer slots than layers, "auto" for whichever is expected to move fewer bytes per
            token. Default: the profile's, else "auto".
        max_context: Tokens of KV cache to reserve memory for, all sequences of a batch together. Default: up to eight
            full-length sequences, in at most a quarter of the memory that dense weights and the smallest set of slots
            leave. Errors: a forward pass beyond it (CapacityError).
        prefill_chunk: Most tokens of a prompt that pass through the model at once, per sequence. A longer prompt is
            prefilled in chunks: bit for bit what transformers' generate(prefill_chunk_size=...) gives, whose last bits
            differ from those of the prompt in one piece. Where attention to a long context leaves less memory, chunks
            are smaller, and the log says so. A prefill_chunk_size given to `generate` wins. Default: the longest prompt
            whose activations fit in the workspace and the KV reserve that it leaves. Errors: a forward pass that does
            not fit and that transformers cannot divide (CapacityError).
        on_miss: What to do on a miss: "fetch" = always load into a slot; "cpu" = only into free slots, compute the rest
            without one; "auto" = decide per expert, but "fetch" where that gains nothing: with slots of each layer's
            own or a pool of more than a sixth of all experts, unless the CPU may compute beside a GPU. Default: the
            profile's, else "auto". Errors: "cpu" on a GPU without exactness="numeric".
        prefetch: Experts to fetch into slots before the next layer asks for them: at most this many per layer, 0 for
            none, or "auto" while it pays. Default: the profile's, else "auto".
        exactness: How equal results are to stock transformers: "bitwise" = equal bit for bit; "numeric" = same routing
            and weights, sums in another order, faster; "auto" = "numeric" if weights are quantized while loading, and
            for experts that are quantized already if kernels compute with them as they are stored; else "bitwise".
            Default: "auto".
        activations: Form of the inputs of quantized experts: "float", or "int8" to round them to 8 bits in groups,
            which is faster and changes an output by about 1 % of its norm. Default: "float". Errors: "int8" for native
            experts, unless exactness="numeric".
        profile: File written by `offmoe tune` (tuned cache options) or `offmoe calibrate` (measured costs); in Python
            also a `Profile` object. Default: none. Errors: a file that cannot be read or is no profile.
        half_life: Accesses of a layer after which a past use counts half, for eviction="aged-lfu". Values from 8 to 32
            do equally well on recorded routing. Default: the profile's, else 16.
        popularity: One number per expert and MoE layer, for eviction="static"; the higher stays. Default: the
            profile's. Errors: numbers of another model.
        host_slots: Most experts to hold in RAM between disk and device, per MoE layer: one number, or one per layer.
            After loading, how many are held. Default: the profile's, else as many as fit in host_memory.
        state: File of routing counts and residents that `model.offload.save_state` wrote in an earlier run. Experts are
            read into free slots and RAM in the background, the most popular first, and the evictions aged-lfu, lru and
            lru-2 begin with the counts. A file that does not exist yet, is damaged, or is of another model is ignored,
            which is logged. Default: none; the verbs generate, chat and serve keep one per model in the user's cache
            folder.
        fill: Whether experts are read into free slots and RAM in the background after loading: in the order of the
            state, else of popularity, else of the files. Reading pauses while a miss waits for the disk. Default: True
            with a state, else False; the verbs generate, chat and serve always fill.
        lag: When victims are chosen: 0 = when experts are missed, 1 = one step before, as a device needs it to go on
            without the host (steps of up to 8 tokens, layers with 2 top_k slots of their own or more). Default: 0; 1
            sets prefetch=0 and on_miss="fetch". Errors: 1 with another prefetch or on_miss.
        cuda_graphs: Whether a GPU launches each decoder layer as one graph in steps of one token on a StaticCache,
            where lag=1 takes the host out of their way: False, or "auto" where a graph gives the layer's own bits.
            Default: False. Errors: "auto" without lag=1.
        miss_costs: Times to weigh a fetch against computing on the host. Not an option for users: loading sets it from
            the profile's costs or from assumed ones.
        warm_counts: Share of the tokens that each expert of each MoE layer served in an earlier run. Not an option for
            users: loading sets it from the state.

    Raises:
        ConfigError: A value cannot be used. The message names the option, the value and what would work.
    """

    device: str | None = None
    device_memory: int | str = "auto"
    host_memory: int | str = "auto"
    slots_per_layer: int | tuple[int, ...] | None = None
    experts: str = "native"
    dense: str = "native"
    eviction: str = _profiled("aged-lfu")
    scope: str = _profiled("auto")
    max_context: int | None = None
    prefill_chunk: int | None = None
    on_miss: str = _profiled("auto")
    prefetch: int | str = _profiled("auto")
    exactness: str = "auto"
    activations: str = "float"
    profile: str | os.PathLike[str] | Profile | None = None
    half_life: float | None = None
    popularity: tuple[tuple[float, ...], ...] | None = None
    host_slots: int | tuple[int, ...] | None = None
    state: str | os.PathLike[str] | None = None
    fill: bool | None = None
    lag: int = 0
    cuda_graphs: bool | str = False
    miss_costs: MissCosts | None = None
    warm_counts: tuple[tuple[float, ...], ...] | None = None
    explicit: frozenset[str] = field(init=False, repr=False, compare=False)
    """Names of the options that were given, so that a later profile does not replace them."""

    def __post_init__(self) -> None:
        self._fill_in()
        for name, allowed in CHOICES.items():
            one_of(name, getattr(self, name), allowed)
        one_of("scope", self.scope, (*SCOPES, "auto"))
        check_graphs(self.cuda_graphs, self.lag)
        check_forms({"experts": self.experts, "dense": self.dense}, self.exactness, self.activations)
        for name in ("device_memory", "host_memory"):
            value = getattr(self, name)
            if value != "auto" and (name, value) != ("host_memory", 0):
                object.__setattr__(self, name, parse_size(value, name))
        if isinstance(self.slots_per_layer, list):
            object.__setattr__(self, "slots_per_layer", tuple(self.slots_per_layer))
        self._cache(1 if self.slots_per_layer is None else self.slots_per_layer)  # checks the options of decisions
        for name in ("max_context", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= LARGEST):
                raise ConfigError(f"{name}={value!r} must be a positive number of tokens.")
        if not isinstance(self.state, str | os.PathLike | None) or (self.state is not None and not str(self.state)):
            raise ConfigError(f"state={self.state!r} must be the path of a file; model.offload.save_state writes one.")
        if self.fill is not None and not isinstance(self.fill, bool):
            raise ConfigError(f"fill={self.fill!r} must be True or False.")

    def resolved(self, **values: Any) -> OffloadConfig:
        """A copy with "auto" values replaced.

        `prefill_chunk` and `exactness` are explicit in it only if they were before: what follows from a plan or from a
        checkpoint asks nothing of another one.
        """
        copy = replace(self, **values)
        object.__setattr__(copy, "explicit", copy.explicit - ({"prefill_chunk", "exactness"} - self.explicit))
        return copy

    def overridden(self, **options: Any) -> OffloadConfig:
        """A copy in which these options win. None means "not given", as does an option that this config was not given,
        so that a profile among `options` still decides it.
        """
        given = {name: value for name, value in options.items() if value is not None}
        return OffloadConfig(**{name: getattr(self, name) for name in self.explicit} | given)

    @property
    def is_numeric(self) -> bool:
        """Whether results may differ from stock transformers by the order of sums."""
        is_native = self.experts == self.dense == "native"
        return self.exactness == "numeric" or (self.exactness == "auto" and not is_native)

    @property
    def fills(self) -> bool:
        """Whether experts are read into free slots and RAM in the background."""
        return self.state is not None if self.fill is None else self.fill

    def most_in_ram(self, shape: CacheShape) -> tuple[int, ...]:
        """Most experts of each MoE layer that may have a slot in RAM."""
        return shape.experts if self.host_slots is None else self._cache(1).host_quotas(shape)

    def cache(self) -> CacheOptions:
        """The options that decisions depend on; slots_per_layer must be resolved, and scope unless slots were given."""
        assert self.slots_per_layer is not None
        return self._cache(self.slots_per_layer)

    def _cache(self, slots: int | tuple[int, ...]) -> CacheOptions:
        values = {name: getattr(self, name) for name in CacheOptions.__dataclass_fields__}
        values["slots_per_layer"] = slots
        if self.scope == "auto":  # slots that were given are each layer's own, unless a layer has none
            values["scope"] = "model" if isinstance(slots, tuple) and 0 in slots else "layer"
        if self.eviction != "static":
            values["popularity"] = None
        return CacheOptions.from_dict({name: value for name, value in values.items() if value is not None})

    def _fill_in(self) -> None:
        """Record which options were given; take the others from the profile, else from the defaults."""
        options = [f for f in fields(self) if f.init]
        values = {f: getattr(self, f.name) for f in options}
        # An array is never compared: options that accept one have no default, and `==` would compare its elements.
        explicit = (f.name for f, v in values.items() if v is not None and (f.default is None or v != f.default))
        object.__setattr__(self, "explicit", frozenset(explicit))
        profile = self.profile
        if profile is not None and not isinstance(profile, Profile):
            profile = read_profile(profile)
            object.__setattr__(self, "profile", profile)
        tuned = {} if profile is None else profile.cache
        for f in options:
            if getattr(self, f.name) is None:
                value = tuned.get(f.name) if f.name in CACHE_OPTIONS else None
                value = LAG_ONE.get(f.name, value) if self.lag == 1 else value
                object.__setattr__(self, f.name, f.metadata.get("default") if value is None else value)
