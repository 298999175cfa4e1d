"""One access -> one plan; the same object in the runtime, which executes it, and in the simulator, which counts it.

Nothing moves. It is on the critical path of every layer: at most 50 us in steady state (measured by
tools/bench/overhead.py). Every expert that an access needs is protected before the first victim is chosen. Must never
see a tensor, a stream, a clock or a file (rule R1), and never lets the order of Python sets decide anything.

A layer that demands more experts than it has slots runs in waves: residents first, then the missing ones in ascending
id; those that the policy would rather keep come last, so that they and the best residents are what stays.

Where not all that is missed gets a slot (on_miss), the rest passes through scratch slots, which belong to no layer and
hold nothing from one access to the next. Their numbers follow those of the slots. Beside a device with memory of its
own they are in RAM, and the host computes what stands there; the likeliest of it to be wanted again is fetched
afterwards, while the link is idle."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate

from offmoe.config import CacheOptions
from offmoe.policy.admission import AdmissionPolicy, build_admission
from offmoe.policy.choice import MakePolicy, eviction_policies
from offmoe.policy.host_split import Missed, on_host
from offmoe.policy.host_tier import HostTier
from offmoe.policy.prefetch import Candidate, PrefetchPolicy, build_prefetch
from offmoe.policy.residency import Admission, Residency
from offmoe.profile import MissCosts
from offmoe.types import Access, CacheShape, ExpertKey, Fetch, Lookup, Plan, Wave

FEW = 16
"""Keys that are searched as fast in a list as in a set."""
FILL_CHANCE = 0.6
"""From which on an expert that the host has computed is worth a fetch that nobody waits for."""
SCRATCH_SLOTS = 2
"""One is computed with while the next expert lands in the other."""


class Planner:
    """Decides for all layers of one model. `plan` must be called in the order of the accesses."""

    def __init__(self, shape: CacheShape, options: CacheOptions, make_policy: MakePolicy):
        self.shape = shape
        self.options = options
        quotas = options.quotas(shape)
        self._first_key: Sequence[int]
        pool_keys = shape.experts if options.scope == "layer" else (sum(shape.experts),)
        if options.scope == "layer":
            first_slot = [0, *accumulate(quotas)]
            self._first_key = [0] * shape.layers
            self._policies = [make_policy(layer, shape.experts[layer]) for layer in range(shape.layers)]
            self._pools = [
                Residency(shape.experts[layer], range(first_slot[layer], first_slot[layer + 1]), self._policies[layer])
                for layer in range(shape.layers)
            ]
        else:
            self._first_key = [0, *accumulate(shape.experts)][:-1]
            policy = make_policy(0, pool_keys[0])
            self._policies = [policy] * shape.layers
            self._pools = [Residency(pool_keys[0], range(sum(quotas)), policy)] * shape.layers
        in_ram = options.host_quotas(shape)
        first_host = [0, *accumulate(in_ram)]
        self._host = [
            HostTier(experts, range(first, first + n), self._policies[layer], self._first_key[layer]) if n else None
            for layer, (experts, n, first) in enumerate(zip(shape.experts, in_ram, first_host, strict=False))
        ]
        self._key_of = [ExpertKey(layer, e) for layer in range(shape.layers) for e in range(shape.experts[layer])]
        # Where a pool's keys begin among all experts: keys of a layer's own pool count from 0.
        self._base = [0, *accumulate(shape.experts)] if options.scope == "layer" else [0] * shape.layers
        self._prefetch: PrefetchPolicy = build_prefetch(options.prefetch, shape)
        self.num_slots = sum(quotas)
        self.num_host_slots = sum(in_ram)
        self.num_scratch = num_scratch(options, shape)
        self._scratch = range(self.num_slots, self.num_slots + self.num_scratch)
        admissions = [build_admission(options.on_miss) for _ in pool_keys]
        self._admissions = admissions if options.scope == "layer" else admissions * shape.layers
        self._costs = options.miss_costs
        largest = max(shape.expert_bytes)
        self._scales = [nbytes / largest for nbytes in shape.expert_bytes]
        self._ram = self.num_host_slots > 0
        self.may_prefetch = options.prefetch != 0
        self._ahead: tuple[int, Collection[int]] = 0, ()
        """Layer and keys that the last plan has begun to read for it."""
        self._came: Collection[int] = ()
        """What of this access was read ahead."""

    def wants_prediction(self, layer: int) -> bool:
        """Whether a prediction for `layer` could change a plan now: it is worth computing one."""
        return (
            self.may_prefetch
            and layer < self.shape.layers
            and self._prefetch.wants_prediction(layer)
            and not self._pools[layer].complete
        )

    def plan(self, access: Access) -> Plan:
        """What to do for one access; changes residency as if it were done."""
        layer, demands = access.layer, access.demands
        pool, policy, first = self._pools[layer], self._policies[layer], self._first_key[layer]
        experts = [d.expert for d in demands]
        keys = [first + e for e in experts] if first else experts
        here, missing, pending = pool.split(keys)
        if self.may_prefetch:
            ahead_of, on_their_way = self._ahead
            self._came = [key for key in missing if key in on_their_way] if ahead_of == layer else ()
            self._ahead = 0, ()
            self._prefetch.demanded(layer, experts, len(missing) - len(self._came))
        policy.used(keys, demands, access.tail)
        host = self._host[layer]
        if host is not None:
            host.used(experts)
        for key in here[len(here) - pending :]:
            pool.demanded(key)
        admission, passing = self._admissions[layer], 0
        waves: tuple[Wave, ...]
        if admission is not None and self._costs is not None:
            admission.demanded(keys)
            return self._divided(access, admission, self._costs, keys, here, missing, pending)
        if admission is not None:
            admission.demanded(keys)
            waves, passing = self._selective(layer, admission, here, missing, keys)
        elif len(keys) <= pool.capacity:
            waves = (self._wave(layer, here, self._admit(layer, missing, keys) if missing else ()),)
        else:
            waves = self._waves(layer, here, missing)
        came, self._came = len(self._came), ()
        prefetches, read_ahead = self._prefetches(layer + 1, access) if access.predicted else ((), ())
        hits, misses = len(here) - pending, len(missing) - came
        return Plan(layer, waves, prefetches, hits, pending + came, misses, passing, (), read_ahead)

    def _selective(
        self, layer: int, admission: AdmissionPolicy, here: Sequence[int], missing: Sequence[int], keys: Sequence[int]
    ) -> tuple[tuple[Wave, ...], int]:
        """Waves of an access some of whose missing experts get no slot, and how many do not."""
        pool = self._pools[layer]
        if len(keys) <= pool.capacity:
            fetches, passing = self._select(layer, admission, missing, keys) if missing else ((), ())
            waves = [self._wave(layer, here, fetches)]
        else:
            keep = self._worth_keeping(layer, missing, admission.replaces, pool.capacity)
            kept, passing = [key for key in missing if key in keep], [key for key in missing if key not in keep]
            held = [key for key in keep if pool.lookup(key) != Lookup.MISS]
            waves = [self._wave(layer, here, ())] if here else []
            if kept:
                waves.append(self._wave(layer, (), self._admit(layer, kept, {*held, *kept})))
                waves = list(_victims_first(waves)) if here else waves
        if passing:
            first, *more = self._through_scratch(layer, passing)
            if waves:  # which leave the scratch slots alone
                before = waves.pop()
                first = Wave(before.experts + first.experts, before.fetches + first.fetches)
            waves += [first, *more]
        return tuple(waves), len(passing)

    def _through_scratch(self, layer: int, passing: Sequence[int]) -> list[Wave]:
        waves = []
        for i in range(0, len(passing), self.num_scratch):
            slots = zip(passing[i : i + self.num_scratch], self._scratch, strict=False)
            waves.append(self._wave(layer, (), tuple(self._fetch(layer, key, Admission(s, None)) for key, s in slots)))
        return waves

    def _divided(
        self,
        access: Access,
        admission: AdmissionPolicy,
        costs: MissCosts,
        keys: Sequence[int],
        here: Sequence[int],
        missing: Sequence[int],
        pending: int,
    ) -> Plan:
        """The plan of an access whose missing experts are divided between the link and the host."""
        layer, pool, score = access.layer, self._pools[access.layer], self._policies[access.layer].score
        protected = frozenset(keys)
        tokens = dict(zip(keys, [demand.tokens for demand in access.demands], strict=True))
        best_first = sorted(missing, key=lambda key: (-score(key), key))
        chances = {}
        for key in best_first[pool.free :]:
            victim = pool.victim(protected)
            chances[key] = 0.5 if victim is None else admission.chance(key, victim, score(key), score(victim))
        left = list(chances)
        if admission.replaces:
            missed = [Missed(key, tokens[key], chances[key]) for key in left]
            left = on_host(missed, len(here), costs, self._scales[layer])
        computed = frozenset(left)
        through = tuple(self._through_scratch(layer, sorted(computed)))
        fetched = [key for key in missing if key not in computed]
        waves: tuple[Wave, ...]
        if len(here) + len(fetched) > pool.capacity:
            waves = self._waves(layer, here, fetched)
        else:
            waves = (self._wave(layer, here, self._admit(layer, fetched, keys) if fetched else ()),)
        if through and waves[0].fetches:  # what is there already is computed beside the host
            first, fetches = waves[0].experts, waves[0].fetches
            waves = (Wave(first[: -len(fetches)], ()), Wave(first[-len(fetches) :], fetches), *waves[1:])
        came, self._came = len(self._came), ()
        prefetches, read_ahead = self._prefetches(layer + 1, access) if access.predicted else ((), ())
        if access.tail == 1 and through and admission.replaces:
            prefetches += self._fill(layer, through, chances, protected)
        hits, misses = len(here) - pending, len(missing) - came
        return Plan(layer, waves, prefetches, hits, pending + came, misses, len(computed), through, read_ahead)

    def _fill(
        self, layer: int, through: Sequence[Wave], chances: Mapping[int, float], protected: Collection[int]
    ) -> tuple[Fetch, ...]:
        """The best of what the host computes, if it is in RAM and worth a slot."""
        pool, first, ram = self._pools[layer], self._first_key[layer], self._host[layer]
        experts = [fetch.key.expert for wave in through for fetch in wave.fetches]
        in_ram = [first + expert for expert in experts if ram is not None and ram.holds(expert)]
        best = max(in_ram, key=lambda key: (chances[key], -key), default=-1)
        if best < 0 or chances[best] < FILL_CHANCE:
            return ()
        admitted = pool.admit(best, protected, pending=True)
        return () if admitted is None else (self._fetch(layer, best, admitted),)

    def _select(
        self, layer: int, admission: AdmissionPolicy, missing: Sequence[int], protected: Collection[int]
    ) -> tuple[tuple[Fetch, ...], Sequence[int]]:
        """Fetches of those that are worth the slot of another, the best first to choose; and those that are not."""
        pool, score = self._pools[layer], self._policies[layer].score
        if not admission.replaces and pool.full:
            return (), missing
        if len(protected) > FEW:
            protected = frozenset(protected)
        fetches, passing = [], []
        for key in sorted(missing, key=lambda key: (-score(key), key)):
            victim = pool.victim(protected) if pool.full else None
            if victim is not None and not admission.admits(key, victim, score(key), score(victim)):
                passing.append(key)
                continue
            admitted = pool.admit(key, protected)
            assert admitted is not None, "a wave is never larger than its pool"
            fetches.append(self._fetch(layer, key, admitted))
        fetches.sort(key=lambda fetch: (fetch.read, fetch.key))
        return tuple(fetches), sorted(passing)

    def _worth_keeping(self, layer: int, missing: Sequence[int], replaces: bool, count: int) -> set[int]:
        """The best of all that is demanded or resident. replaces: residents need not stay."""
        pool, score = self._pools[layer], self._policies[layer].score
        residents = pool.resident_keys()
        stay: Sequence[int] = () if replaces else residents
        candidates = {*missing, *residents}.difference(stay)
        return {*stay, *sorted(candidates, key=lambda key: (-score(key), -key))[: count - len(stay)]}

    def _admit(self, layer: int, missing: Sequence[int], protected: Collection[int]) -> tuple[Fetch, ...]:
        pool = self._pools[layer]
        if len(protected) > FEW:
            protected = frozenset(protected)
        fetches = []
        for key in missing:
            admission = pool.admit(key, protected)
            assert admission is not None, "a wave is never larger than its pool"
            fetches.append(self._fetch(layer, key, admission))
        if self._host[layer] is not None:
            fetches.sort(key=lambda fetch: fetch.read)  # what only the link brings is there first
        return tuple(fetches)

    def _fetch(self, layer: int, key: int, admission: Admission) -> Fetch:
        base, (slot, evicted) = self._base[layer], admission
        wanted = self._key_of[base + key]
        forgotten = None if evicted is None else self._key_of[base + evicted]
        came = key in self._came
        if not self._ram:
            return Fetch(wanted, slot, forgotten, read_ahead=came) if came else Fetch(wanted, slot, forgotten)
        if forgotten is not None and (before := self._host[forgotten.layer]) is not None:
            before.left(forgotten.expert)
        host = self._host[layer]
        if host is None:
            return Fetch(wanted, slot, forgotten, read_ahead=came)
        return Fetch(wanted, slot, forgotten, *host.place(wanted.expert, on_device=slot < self.num_slots), came)

    def _wave(self, layer: int, here: Sequence[int], fetches: tuple[Fetch, ...]) -> Wave:
        """Residents `here`, then what is fetched."""
        pool, first = self._pools[layer], self._first_key[layer]
        experts = [key - first for key in here] if first else here
        residents = zip(experts, pool.slots_of(here), strict=True)
        return Wave((*residents, *[(fetch.key.expert, fetch.slot) for fetch in fetches]), fetches)

    def _waves(self, layer: int, here: Sequence[int], missing: Sequence[int]) -> tuple[Wave, ...]:
        pool, policy = self._pools[layer], self._policies[layer]
        # What should stay: the best of all that is demanded or resident, less the slots that the rest passes through.
        passing = max(1, pool.capacity // 4)
        candidates = sorted({*missing, *pool.resident_keys()}, key=lambda key: (-policy.score(key), -key))
        best = candidates[: pool.capacity - passing]
        keep = set(best)
        order = [key for key in missing if key not in keep] + [key for key in missing if key in keep]
        waves = [self._wave(layer, here, ())] if here else []
        while order:
            # Residents worth keeping hold their slots; everything else makes room.
            held = [key for key in best if pool.lookup(key) != Lookup.MISS]
            wave, order = order[: pool.capacity - len(held)], order[pool.capacity - len(held) :]
            waves.append(self._wave(layer, (), self._admit(layer, wave, {*held, *wave})))
        return _victims_first(waves) if here else tuple(waves)

    def _prefetches(self, layer: int, access: Access) -> tuple[tuple[Fetch, ...], tuple[ExpertKey, ...]]:
        """Of what `access`, of the layer before, predicts for `layer`: what is copied from RAM into a slot, and what is
        read ahead from disk.
        """
        if not self._prefetch.wants_prediction(layer):
            return (), ()
        pool, first, ram = self._pools[layer], self._first_key[layer], self._host[layer]
        predicted = access.predicted[: pool.capacity]
        missing = pool.split([first + e for e in predicted])[1]
        if not missing:
            return (), ()
        away = frozenset(missing)
        candidates = [Candidate(rank, e) for rank, e in enumerate(predicted) if first + e in away]
        chosen = self._prefetch.choose(layer, candidates, single=access.tail == 1)
        if not chosen:
            return (), ()
        protected = {first + e for e in predicted}
        fetches: list[Fetch] = []
        ahead: list[int] = []
        for _, expert in chosen:
            if ram is None or not ram.holds(expert):
                ahead.append(expert)
                continue
            admission = pool.admit(first + expert, protected, pending=True)
            if admission is None:
                break
            fetches.append(self._fetch(layer, first + expert, admission))
        self._prefetch.issued(layer, len(fetches) + len(ahead))
        self._ahead = layer, [first + expert for expert in ahead]
        return tuple(fetches), tuple([ExpertKey(layer, expert) for expert in ahead])

    def missing(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Which experts of a layer have no slot now; mutates nothing."""
        pool, first = self._pools[layer], self._first_key[layer]
        return [expert for expert in experts if pool.lookup(first + expert) == Lookup.MISS]

    def check(self) -> None:
        """Assert the invariants of every pool."""
        for pool in self._pools:
            pool.check()
        for layer, host in enumerate(self._host):
            if host is not None:
                first = self._first_key[layer]
                host.check(self._pools[layer].holds(range(first, first + self.shape.experts[layer])))


def _victims_first(waves: Sequence[Wave]) -> tuple[Wave, ...]:
    """The residents of the first wave in the order in which later waves take their slots, so that what is read
    meanwhile need not wait for them."""
    residents, later = waves[0], waves[1:]
    turns = [fetch.slot for wave in later for fetch in wave.fetches]
    taken = {slot: -turn for turn, slot in enumerate(reversed(turns))}
    return (Wave(tuple(sorted(residents.experts, key=lambda pair: taken.get(pair[1], 1))), ()), *later)


def num_scratch(options: CacheOptions, shape: CacheShape) -> int:
    """Scratch slots that a run needs: none where every miss gets a slot, or nothing can be missed twice."""
    short = any(n < e for n, e in zip(options.quotas(shape), shape.experts, strict=True))
    return SCRATCH_SLOTS if short and options.on_miss != "fetch" else 0


def build_planner(options: CacheOptions, shape: CacheShape) -> Planner:
    """The planner of a run; runtime and simulator both get theirs here. ConfigError if the options do not fit the
    model.
    """
    return Planner(shape, options, eviction_policies(options, shape))
