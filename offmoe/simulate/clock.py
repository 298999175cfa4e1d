"""Prices plans: how long a simulated run takes, with one compute stream and one path for incoming experts.

The clock follows the order of the runtime:

* A layer computes its resident experts first, then each fetched expert as it arrives. A large expert is computed in
  part before all of it has arrived.
* One fetch at a time occupies the path. Demands go before prefetches that have not started. The fetches of all waves
  are requested at once.
* Read-aheads begin behind the demands. A wasted one costs the few MB that are read before it stops.
* Time that computing does not cover is stall. Requesting a fetch takes time from computing.
* Experts that the host computes beside a device are read like the others. The host starts with the layer, and the
  device waits for the host before it computes fetched experts.

The model is rough for prompts: the dense part of many tokens costs less than that many times one token's. Pricing takes
about 2 us per (step, layer). It must never influence a plan; nothing is measured here, all costs come from a profile.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from offmoe.io_limits import WHOLE_BYTES, last_share, stop_share
from offmoe.profile import CostModel
from offmoe.types import Access, CacheShape, ExpertKey, Plan


class Clock:
    """The time of one simulated run.

    Attributes:
        now_s: seconds that the run has taken so far.
        stall_s: the part of them in which computing waited for experts.
    """

    def __init__(self, costs: CostModel, shape: CacheShape):
        self.now_s = 0.0
        self.stall_s = 0.0
        self._fetch_s = {
            read: [costs.fetch_s(nbytes, read=read) for nbytes in shape.expert_bytes] for read in (True, False)
        }
        """Seconds that a fetch occupies the path, by whether it is read from disk, then by layer."""
        self._landing_s = [costs.landing_s(n) * last_share(n) for n in shape.expert_bytes]
        largest = max(shape.expert_bytes)
        self._scales = [nbytes / largest for nbytes in shape.expert_bytes]
        self._misses = costs.miss_costs(largest)
        self._expert_s = costs.expert_us_device * 1e-6
        landed_us = costs.expert_us_device if costs.expert_us_landed is None else costs.expert_us_landed
        self._early_s = [
            0.0 if n <= WHOLE_BYTES else max(0.0, costs.expert_us_device - landed_us) * 1e-6 for n in shape.expert_bytes
        ]
        """By layer: seconds of computing an expert for one token that pass before all of the expert has landed."""
        self._request_s = costs.fetch_us * 1e-6
        self._dense_s = costs.dense_us_per_token * 1e-6 / shape.layers
        self._free_at = 0.0
        """When the path becomes free."""
        self._queue: dict[ExpertKey, tuple[float, bool]] = {}
        """Prefetches that have not started: when they were requested, and whether they are read from disk."""
        self._lands: dict[ExpertKey, float] = {}
        """When fetches that were started have landed."""
        self._stop_s = [s * stop_share(n) for s, n in zip(self._fetch_s[True], shape.expert_bytes, strict=True)]
        """By layer: seconds until a wasted read has stopped."""
        self._read_aheads: tuple[float, tuple[ExpertKey, ...]] = 0.0, ()
        """When the read-aheads of the last plan were requested, and which experts they are."""

    def add(self, access: Access, plan: Plan, rows: int) -> None:
        """Advance the clock by one layer in a step of `rows` tokens."""
        layer = plan.layer
        self.now_s += self._dense_s * rows
        tokens = {demand.expert: demand.tokens for demand in access.demands}
        self._start_prefetches()
        host_done = self._compute_on_host(plan, tokens) if plan.on_host else self.now_s
        residents = len(plan.waves[0].experts) - len(plan.waves[0].fetches) if plan.on_host else -1
        keys = [ExpertKey(layer, expert) for wave in plan.waves for expert, _ in wave.experts]
        self._start_fetches(plan, keys)
        for i, key in enumerate(keys):
            if i == residents:
                self._wait(host_done)
            n = tokens[key.expert]
            self._wait(self._lands.pop(key, 0.0) - (self._early_s[layer] if n == 1 else 0.0))
            self.now_s += self._expert_s * n
        self._wait(host_done)
        for fetch in plan.prefetches:
            self._queue[fetch.key] = self.now_s, fetch.read

    def _start_fetches(self, plan: Plan, keys: Collection[ExpertKey]) -> None:
        """Request the fetches of a plan, then its read-aheads. keys: the experts that the plan computes."""
        fetched = {fetch.key: fetch.read for wave in plan.waves for fetch in wave.fetches}
        for key in self._use_read_aheads(fetched):
            del fetched[key]
        for key in keys:  # a prefetch that is demanded before it has started is a demand like the others
            _, read = self._queue.pop(key, (0.0, None))
            read = fetched.get(key, read)
            if read is not None:
                self._fetch(key, self.now_s, read)
                self.now_s += self._request_s
        self._read_aheads = self.now_s, plan.read_ahead

    def _fetch(self, key: ExpertKey, requested_at: float, read: bool) -> None:
        self._free_at = max(self._free_at, requested_at) + self._fetch_s[read][key.layer]
        self._lands[key] = self._free_at + self._landing_s[key.layer]

    def _use_read_aheads(self, wanted: Collection[ExpertKey]) -> list[ExpertKey]:
        """The experts of `wanted` whose read-ahead has begun. Those continue; the other read-aheads stop now."""
        requested_at, keys = self._read_aheads
        used = []
        for key in keys:
            began = max(self._free_at, requested_at)
            if began >= self.now_s:
                break
            ends = began + self._fetch_s[True][key.layer]
            if key in wanted:
                used.append(key)
                self._lands[key] = ends + self._landing_s[key.layer]
            self._free_at = ends if key in wanted else min(ends, self.now_s + self._stop_s[key.layer])
        return used

    def _wait(self, until: float) -> None:
        if until > self.now_s:
            self.stall_s += until - self.now_s
            self.now_s = until

    def _compute_on_host(self, plan: Plan, tokens: Mapping[int, int]) -> float:
        """When the host has computed its experts of a layer."""
        scale, costs = self._scales[plan.layer], self._misses
        read_at = self.now_s
        computed = [fetch for wave in plan.on_host for fetch in wave.fetches]
        for _ in filter(lambda fetch: fetch.read, computed):
            self._free_at = read_at = max(self._free_at, self.now_s) + costs.read_us * scale * 1e-6
        link_us = sum([len(wave.fetches) for wave in plan.waves]) * costs.link_us * scale
        host_s = costs.host_s([tokens[fetch.key.expert] for fetch in computed], link_us, scale)
        last_s = costs.host_us * scale * 1e-6 if read_at > self.now_s else 0.0  # the expert that was read last
        return max(self.now_s + host_s, read_at + last_s)

    def _start_prefetches(self) -> None:
        """Start the queued prefetches for which the path became free before now."""
        for key, (requested_at, read) in list(self._queue.items()):
            if max(self._free_at, requested_at) >= self.now_s:
                break
            del self._queue[key]
            self._fetch(key, requested_at, read)
