"""One access becomes one plan. The runtime executes the plans of this object, the simulator counts them.

Planning is on the critical path of every layer: at most 50 us in steady state (tools/bench/overhead.py). Plans depend
on the sequence of accesses alone. Every expert that an access needs is protected before the first victim is chosen.

A layer that demands more experts than it has slots runs in waves: residents first, then the missing ones in ascending
id; those that the policy would rather keep come last, so that they and the best residents are what stays.

With on_miss="cpu" or "auto" some missed experts get no slot. They pass through scratch slots, which belong to no layer,
are numbered after the slots and hold nothing from one access to the next. With miss_costs, which only a device with
memory of its own has, the scratch slots are in RAM and the host computes what stands in them; the likeliest of these
experts to be demanded again is prefetched afterwards, while the link is idle.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import zip_longest
from typing import NamedTuple

from offmoe.config import CacheOptions
from offmoe.policy.admission import AdmissionPolicy
from offmoe.policy.eviction.registry import build_eviction
from offmoe.policy.host_split import best_refill, split_misses
from offmoe.policy.layer_cache import LayerCache, MakePolicy, build_layers, victims_first
from offmoe.policy.prefetch import ALL_RANKS, Candidate, PrefetchPolicy, build_prefetch
from offmoe.policy.resize import resize_layers
from offmoe.policy.victims import NamedVictims, Place
from offmoe.profile import MissCosts
from offmoe.types import Access, CacheShape, ExpertKey, Fetch, KeptSlots, Plan, Wave

SCRATCH_SLOTS = 2
"""One is computed with while the next expert lands in the other."""


class _Need(NamedTuple):
    """The keys of one access: all of them, the resident ones (pending last), the missing ones."""

    access: Access
    keys: Sequence[int]
    resident: Sequence[int]
    missing: Sequence[int]


class _Placement(NamedTuple):
    """Where the experts of one access are computed: on the device, and by the host.

    num_slotless: missing experts that get no slot. refill: a key that the host computes and that is worth a slot.
    """

    waves: tuple[Wave, ...]
    num_slotless: int = 0
    on_host: tuple[Wave, ...] = ()
    refill: int | None = None


class Planner:
    """Decides for all layers of one model. `plan` must be called in the order of the accesses."""

    def __init__(self, shape: CacheShape, options: CacheOptions, make_policy: MakePolicy):
        self.shape = shape
        self.layers = build_layers(shape, options, make_policy)
        self.may_prefetch = options.prefetch != 0
        self._take(options)
        self._prefetch: PrefetchPolicy = build_prefetch(options.prefetch, shape)
        self._read_ahead: Collection[int] = ()
        """Keys that the last plan reads ahead."""
        self._arriving: Collection[int] = ()
        """Missing keys of this access that the last plan read ahead."""

    def _take(self, options: CacheOptions) -> None:
        """Everything that follows from the numbers of slots."""
        self.options = options
        self.num_slots = sum(options.quotas(self.shape))
        self.num_host_slots = sum(options.host_quotas(self.shape))
        self.num_scratch = num_scratch(options, self.shape)
        self._scratch = range(self.num_slots, self.num_slots + self.num_scratch)
        self._costs = options.miss_costs
        self._victims = NamedVictims(options, self.shape)

    def resize(self, options: CacheOptions) -> KeptSlots:
        """Go on with other numbers of slots; the policies keep what they know, and the best residents stay.

        Args:
            options: as they were, but for the numbers of slots, on_miss and miss_costs.
        Returns:
            Whose bytes the new slots are to hold.
        """
        kept = resize_layers(self.layers, self.shape, self.options, options)
        self._take(options)
        self._read_ahead = ()
        return kept

    def wants_prediction(self, layer: int) -> bool:
        """Whether a prediction for `layer` would be used now. Computing one costs about 0.1 ms."""
        return (
            self.may_prefetch
            and layer < self.shape.layers
            and self._prefetch.wants_prediction(layer)
            and not self.layers[layer].residency.complete
        )

    def ranks(self, layer: int) -> int:
        """Ranks of a token's predictions for `layer`, as bits, that a plan could fetch now if they were missing.

        What it learns meanwhile may let it read others ahead; it fetches none into slots.
        """
        return ALL_RANKS if self.layers[layer].host_tier is not None else self._prefetch.ranks(layer)

    def plan(self, access: Access) -> Plan:
        """What to do for one access. Residency changes as if it were done."""
        layer, demands = access.layer, access.demands
        cache = self.layers[layer]
        first, residency = cache.keys.start, cache.residency
        keys = [first + demand.expert for demand in demands]
        resident, missing, num_pending = residency.split(keys)
        if self.may_prefetch:
            self._arriving = [key for key in missing if key in self._read_ahead]
            self._read_ahead = ()
            experts = [demand.expert for demand in demands]
            self._prefetch.on_access(layer, experts, len(missing) - len(self._arriving))
        named: Sequence[int | None] = ()
        if missing or self._victims.keeps_lists:
            named = self._victims.take(residency, access, missing, keys)
        cache.policy.on_access(keys, demands, access.tail)
        if cache.host_tier is not None:
            cache.host_tier.on_access(keys)
        if num_pending:
            residency.on_access(keys)
        if cache.admission is not None:
            cache.admission.on_access(keys)
        waves: tuple[Wave, ...]
        on_host: tuple[Wave, ...]
        if cache.admission is None and len(keys) <= residency.capacity:
            waves = (cache.wave(resident, self._admit(cache, missing, keys, named) if missing else ()),)
            num_slotless, on_host, refill = 0, (), None
        else:
            waves, num_slotless, on_host, refill = self._place(cache, _Need(access, keys, resident, missing))
        num_arriving, self._arriving = len(self._arriving), ()
        prefetches, read_ahead = self._prefetches(layer + 1, access) if access.predicted else ((), ())
        if refill is not None:
            admission = residency.admit(refill, frozenset(keys), pending=True)
            if admission is not None:
                prefetches += (self._fetch(refill, *admission),)
        hits, pending, misses = len(resident) - num_pending, num_pending + num_arriving, len(missing) - num_arriving
        return Plan(layer, waves, prefetches, hits, pending, misses, num_slotless, on_host, read_ahead)

    def _place(self, cache: LayerCache, need: _Need) -> _Placement:
        """Placement of an access that needs waves, or some of whose missing experts may get no slot."""
        admission = cache.admission
        if admission is None:
            return _Placement(self._waves(cache, need.resident, need.missing))
        if self._costs is not None:
            return self._place_with_host(cache, need, admission, self._costs)
        if len(need.keys) > cache.residency.capacity:
            waves, slotless = self._best_in_waves(cache, admission, need)
        else:
            fetches, slotless = self._admit_worthy(cache, admission, need) if need.missing else ((), ())
            waves = [cache.wave(need.resident, fetches)]
        if slotless:
            first, *more = self._through_scratch(cache, slotless)
            if waves:  # scratch slots and pool slots do not collide, so the two waves are one
                last = waves.pop()
                first = Wave(last.experts + first.experts, last.fetches + first.fetches)
            waves += [first, *more]
        return _Placement(tuple(waves), len(slotless))

    def _best_in_waves(
        self, cache: LayerCache, admission: AdmissionPolicy, need: _Need
    ) -> tuple[list[Wave], Sequence[int]]:
        """A step with more experts than slots: waves of those that are worth a slot, and the other missing keys."""
        keep = set(cache.worth_keeping(need.missing, cache.residency.capacity, evicts=admission.evicts))
        kept, slotless = [key for key in need.missing if key in keep], [key for key in need.missing if key not in keep]
        waves = [cache.wave(need.resident, ())] if need.resident else []
        if kept:
            waves.append(cache.wave((), self._admit(cache, kept, {*kept, *filter(cache.is_resident, keep)})))
            waves = list(victims_first(waves)) if need.resident else waves
        return waves, slotless

    def _admit_worthy(
        self, cache: LayerCache, admission: AdmissionPolicy, need: _Need
    ) -> tuple[tuple[Fetch, ...], Sequence[int]]:
        """Fetches of the missing keys that are worth their victim's slot, and the other missing keys.

        The best missing key is asked about first.
        """
        residency, score = cache.residency, cache.policy.score
        if not admission.evicts and not residency.num_free:
            return (), need.missing
        protected = frozenset(need.keys)
        fetches: list[Fetch] = []
        slotless = []
        for key in cache.best_first(need.missing):
            victim = None if residency.num_free else residency.victim(protected)
            if victim is not None and not admission.admits(key, victim, score(key), score(victim)):
                slotless.append(key)
                continue
            fetches += self._admit(cache, (key,), protected)
        if cache.host_tier is None:
            fetches.sort(key=lambda fetch: fetch.key)
        else:  # two reads may pass through one RAM slot, which keeps the expert that was admitted last
            fetches.sort(key=lambda fetch: fetch.read)
        return tuple(fetches), sorted(slotless)

    def _place_with_host(
        self, cache: LayerCache, need: _Need, admission: AdmissionPolicy, costs: MissCosts
    ) -> _Placement:
        """Missing keys are divided between the link and the host."""
        access, resident = need.access, need.resident
        tokens = dict(zip(need.keys, [demand.tokens for demand in access.demands], strict=True))
        computed = split_misses(cache, admission, costs, need.missing, tokens, frozenset(need.keys))
        on_host = tuple(self._through_scratch(cache, list(computed))) if computed else ()
        fetched = [key for key in need.missing if key not in computed]
        waves: tuple[Wave, ...]
        if len(resident) + len(fetched) > cache.residency.capacity:
            waves = self._waves(cache, resident, fetched)
        else:
            waves = (cache.wave(resident, self._admit(cache, fetched, need.keys)),)
        if on_host and waves[0].fetches:  # residents are computed while the host computes, before any fetch has landed
            experts, fetches = waves[0]
            waves = (Wave(experts[: -len(fetches)], ()), Wave(experts[-len(fetches) :], fetches), *waves[1:])
        refill = best_refill(cache, computed) if access.tail == 1 and admission.evicts else None
        return _Placement(waves, len(computed), on_host, refill)

    def _waves(self, cache: LayerCache, resident: Sequence[int], missing: Sequence[int]) -> tuple[Wave, ...]:
        """Waves that give every missing key a slot, though there are fewer slots than keys."""
        capacity = cache.residency.capacity
        # The best of what is demanded or resident stays, less the slots that the rest passes through.
        best = cache.worth_keeping(missing, capacity - max(1, capacity // 4))
        keep = set(best)
        order = [key for key in missing if key not in keep] + [key for key in missing if key in keep]
        waves = [cache.wave(resident, ())] if resident else []
        while order:
            held = list(filter(cache.is_resident, best))  # everything else makes room
            wave, order = order[: capacity - len(held)], order[capacity - len(held) :]
            waves.append(cache.wave((), self._admit(cache, wave, {*held, *wave})))
        return victims_first(waves) if resident else tuple(waves)

    def _through_scratch(self, cache: LayerCache, keys: Sequence[int]) -> list[Wave]:
        waves = []
        for i in range(0, len(keys), self.num_scratch):
            pairs = zip(keys[i : i + self.num_scratch], self._scratch, strict=False)
            waves.append(cache.wave((), tuple([self._fetch(key, slot, None) for key, slot in pairs])))
        return waves

    def _admit(
        self, cache: LayerCache, missing: Sequence[int], protected: Collection[int], named: Sequence[int | None] = ()
    ) -> tuple[Fetch, ...]:
        """Fetches that give missing keys slots of the pool. named: by missing key, its victim; () chooses them now."""
        if len(protected) > 16:  # a list of up to 16 is as fast to search as a set
            protected = frozenset(protected)
        fetches = []
        for key, victim in zip_longest(missing, named):
            admission = cache.residency.admit(key, protected, named=victim)
            assert admission is not None, "a wave is never larger than its pool"
            fetches.append(self._fetch(key, *admission))
        if cache.host_tier is not None:
            fetches.sort(key=lambda fetch: fetch.read)  # experts in RAM arrive first
        return tuple(fetches)

    def _fetch(self, key: int, slot: int, evicted_key: int | None) -> Fetch:
        expert, evicted = self.shape.expert(key), None
        host: tuple[int | None, bool] = None, True
        if evicted_key is not None:
            evicted = self.shape.expert(evicted_key)
            if (tier := self.layers[evicted.layer].host_tier) is not None:
                tier.on_evict(evicted_key)
        if (tier := self.layers[expert.layer].host_tier) is not None:
            host = tier.place(key)
        return Fetch(expert, slot, evicted, *host, key in self._arriving)

    def _prefetches(self, layer: int, access: Access) -> tuple[tuple[Fetch, ...], tuple[ExpertKey, ...]]:
        """(copies from RAM into slots of `layer`, reads ahead from disk) that the access before it predicts."""
        if not self._prefetch.wants_prediction(layer):
            return (), ()
        cache = self.layers[layer]
        first, residency, tier = cache.keys.start, cache.residency, cache.host_tier
        predicted = [first + e for e in access.predicted[: residency.capacity]]
        missing = frozenset(residency.split(predicted)[1])
        candidates = [Candidate(rank, key - first) for rank, key in enumerate(predicted) if key in missing]
        chosen = self._prefetch.choose(layer, candidates, single=access.tail == 1) if candidates else ()
        if not chosen:
            return (), ()
        fetches: list[Fetch] = []
        read_ahead: list[int] = []
        for _, expert in chosen:
            key = first + expert
            if tier is None or not tier.holds(key):
                read_ahead.append(key)
                continue
            admission = residency.admit(key, predicted, pending=True)
            if admission is None:
                break
            fetches.append(self._fetch(key, *admission))
        self._prefetch.issued(layer, len(fetches) + len(read_ahead))
        self._read_ahead = read_ahead
        return tuple(fetches), tuple([self.shape.expert(key) for key in read_ahead])

    def fill(self, expert: ExpertKey, slot: int | None = None) -> bool:
        """Give a free slot to an expert that was read in the background; evicts nothing.

        To be called between two accesses, before `fill_ram` for the same boundary.

        Args:
            slot: The free slot that holds the expert. None, in a replay: any free slot, since none differs for a plan.

        Returns:
            Whether the expert got a slot; False changes nothing.
        """
        cache = self.layers[expert.layer]
        return cache.residency.fill(cache.keys[expert.expert], slot)

    def fill_ram(self, expert: ExpertKey, slot: int | None = None) -> bool:
        """As `fill`, for a free slot in RAM."""
        cache = self.layers[expert.layer]
        return cache.host_tier is not None and cache.host_tier.fill(cache.keys[expert.expert], slot)

    @property
    def names_victims(self) -> bool:
        """Whether every layer has named victims for the misses of one token."""
        return self._victims.holds_everywhere

    def next_places(self, layer: int) -> tuple[Place, ...]:
        """The slots that the misses of a layer's next access take, in order; () at lag 0. Changes nothing."""
        return self._victims.places(layer, self.layers[layer].residency)

    def missing(self, layer: int, experts: Sequence[int]) -> list[int]:
        """The experts of a layer that have no slot now. Changes nothing."""
        cache = self.layers[layer]
        return [expert for expert in experts if not cache.is_resident(cache.keys[expert])]


def num_scratch(options: CacheOptions, shape: CacheShape) -> int:
    """Scratch slots of a run: none if every miss gets a slot, or if every expert has one."""
    short = any(n < e for n, e in zip(options.quotas(shape), shape.experts, strict=True))
    return SCRATCH_SLOTS if short and options.on_miss != "fetch" else 0


def build_planner(options: CacheOptions, shape: CacheShape) -> Planner:
    """The planner of a run, for runtime and simulator alike.

    Raises:
        ConfigError: the options do not fit the model, or no eviction policy has the name.
    """
    return Planner(shape, options, build_eviction)
