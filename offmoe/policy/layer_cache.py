"""What the planner keeps of each MoE layer: its keys and slots, its copies in RAM, and the policies that decide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from offmoe.config import CacheOptions
from offmoe.policy.admission import AdmissionPolicy, build_admission
from offmoe.policy.eviction.base import EvictionPolicy, Pool
from offmoe.policy.host_tier import HostTier
from offmoe.policy.residency import Residency
from offmoe.types import CacheShape, ExpertKey, Fetch, Wave

MakePolicy = Callable[[Pool], EvictionPolicy]


@dataclass
class LayerCache:
    """One MoE layer. With scope="model" all layers share `residency`, `policy` and `admission`.

    keys: those of the layer's experts; keys[expert] is an expert's. byte_scale: bytes of one of its experts relative to
    the model's largest.
    """

    keys: range
    residency: Residency
    policy: EvictionPolicy
    admission: AdmissionPolicy | None
    host_tier: HostTier | None
    byte_scale: float

    def best_first(self, keys: Iterable[int]) -> list[int]:
        """Keys by descending score, ties by ascending key."""
        score = self.policy.score
        return sorted(keys, key=lambda key: (-score(key), key))

    def is_resident(self, key: int) -> bool:
        return key in self.residency.slot_of

    def worth_keeping(self, missing: Sequence[int], count: int, *, evicts: bool = True) -> list[int]:
        """The `count` keys that should hold slots after a step that needs more experts than there are slots.

        They are those with the highest scores among the missing and the resident; ties go to the higher key, which such
        a step computes later. If `evicts` is False, residents stay whatever their scores.
        """
        residents, score = self.residency.slot_of, self.policy.score
        staying = [] if evicts else sorted(residents)
        candidates = {*missing, *residents}.difference(staying)
        return staying + sorted(candidates, key=lambda key: (-score(key), -key))[: count - len(staying)]

    def wave(self, resident: Sequence[int], fetches: tuple[Fetch, ...]) -> Wave:
        """A wave of resident keys, then of what is fetched."""
        first, slot_of = self.keys.start, self.residency.slot_of
        experts = [(key - first, slot_of[key]) for key in resident]
        if fetches:
            experts += [(fetch.key.expert, fetch.slot) for fetch in fetches]
        return Wave(tuple(experts), fetches)


def victims_first(waves: Sequence[Wave]) -> tuple[Wave, ...]:
    """The waves, the residents of the first in the order in which later waves take their slots: fetches wait less."""
    residents, later = waves[0], waves[1:]
    slots = [fetch.slot for wave in later for fetch in wave.fetches]
    turn = {slot: -i for i, slot in enumerate(reversed(slots))}
    return (Wave(tuple(sorted(residents.experts, key=lambda pair: turn.get(pair[1], 1))), ()), *later)


def residents(layers: Sequence[LayerCache]) -> tuple[list[ExpertKey], list[ExpertKey]]:
    """The experts of all MoE layers that have a slot, and those that have a RAM slot."""
    experts = [(ExpertKey(at, e), key, cache) for at, cache in enumerate(layers) for e, key in enumerate(cache.keys)]
    slots = [expert for expert, key, cache in experts if cache.is_resident(key)]
    return slots, [expert for expert, key, cache in experts if cache.host_tier and cache.host_tier.holds(key)]


def build_layers(shape: CacheShape, options: CacheOptions, make_policy: MakePolicy) -> list[LayerCache]:
    """The layers of a model, with empty slots. ConfigError if the options do not fit the model."""
    quotas, host_quotas = options.quotas(shape), options.host_quotas(shape)
    keys = [range(first, first + n) for first, n in zip(shape.first_key, shape.experts, strict=True)]
    if options.scope == "layer":
        slots = [range(end - n, end) for n, end in zip(quotas, accumulate(quotas), strict=True)]
        pools = [Pool(layer_keys, 1, options, shape) for layer_keys in keys]
    else:
        slots = [range(sum(quotas))]
        pools = [Pool(range(shape.num_keys), shape.layers, options, shape)]
    shared = []
    for pool, pool_slots in zip(pools, slots, strict=True):
        policy = make_policy(pool)
        shared.append((Residency(len(pool.keys), pool_slots, policy), policy, build_admission(options.on_miss)))
    if options.scope == "model":
        shared *= shape.layers
    layers, largest = [], max(shape.expert_bytes)
    for layer, ((residency, policy, admission), end) in enumerate(zip(shared, accumulate(host_quotas), strict=True)):
        host_slots = range(end - host_quotas[layer], end)
        host_tier = HostTier(keys[layer], host_slots, policy, residency.slot_of) if host_slots else None
        scale = shape.expert_bytes[layer] / largest
        layers.append(LayerCache(keys[layer], residency, policy, admission, host_tier, scale))
    return layers
