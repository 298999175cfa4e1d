"""What plans cost in time: one compute stream, one way in for experts, and the runtime's order of both.

Nothing is measured here; the costs come from a profile. Bound: some 2 us per (step, layer). The model: a layer computes
what is resident first, then every expert as it arrives, and some of a large one before all of it has; one fetch at a
time occupies the way in; demands go before prefetches that have not started, and the fetches of all waves are asked for
at once; what is read ahead begins behind them and costs a few MB where it was for nothing; what computing does not
cover is stall. Asking for a fetch takes time from computing. What the host computes beside a device is read like the
rest, starts with the layer and ends before anything is computed with that was fetched. Rough for prompts, where the
dense part of many tokens costs less than that many times one token's. Must never influence a plan (rule R1)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from offmoe.io_limits import WHOLE_BYTES, last_share, stop_share
from offmoe.profile import CostModel
from offmoe.types import Access, CacheShape, ExpertKey, Plan


class Clock:
    """Time of a simulated run. `now_s` of it has passed, `stall_s` of that waiting for experts."""

    def __init__(self, costs: CostModel, shape: CacheShape):
        self.now_s = 0.0
        self.stall_s = 0.0
        self._fetch_s = {
            read: [costs.fetch_s(nbytes, read=read) for nbytes in shape.expert_bytes] for read in (True, False)
        }
        self._landing_s = [costs.landing_s(n) * last_share(n) for n in shape.expert_bytes]
        largest = max(shape.expert_bytes)
        self._scales = [nbytes / largest for nbytes in shape.expert_bytes]
        self._misses = costs.miss_costs(largest)
        self._expert_s = costs.expert_us_device * 1e-6
        landed_us = costs.expert_us_device if costs.expert_us_landed is None else costs.expert_us_landed
        self._early_s = [
            0.0 if n <= WHOLE_BYTES else max(0.0, costs.expert_us_device - landed_us) * 1e-6 for n in shape.expert_bytes
        ]
        """Of an expert's computing for one token, what is done before all of it is there."""
        self._asking_s = costs.fetch_us * 1e-6
        self._dense_s = costs.dense_us_per_token * 1e-6 / shape.layers
        self._free_at = 0.0
        # Prefetches that have not started: when they were asked for, and whether they are to be read from disk.
        self._queue: dict[ExpertKey, tuple[float, bool]] = {}
        self._lands: dict[ExpertKey, float] = {}
        self._stop_s = [s * stop_share(n) for s, n in zip(self._fetch_s[True], shape.expert_bytes, strict=True)]
        """Until a read has stopped that was for nothing."""
        self._ahead: tuple[float, tuple[ExpertKey, ...]] = 0.0, ()
        """When reading ahead was asked for, and what."""

    def add(self, access: Access, plan: Plan, rows: int) -> None:
        """One layer's access, in a step of `rows` tokens."""
        layer = plan.layer
        self.now_s += self._dense_s * rows
        tokens = {demand.expert: demand.tokens for demand in access.demands}
        self._start_prefetches()
        host_done = self._compute_on_host(plan, tokens) if plan.on_host else self.now_s
        residents = len(plan.waves[0].experts) - len(plan.waves[0].fetches) if plan.on_host else -1
        keys = [ExpertKey(layer, expert) for wave in plan.waves for expert, _ in wave.experts]
        fetched = {fetch.key: fetch.read for wave in plan.waves for fetch in wave.fetches}
        for key in self._read_ahead(fetched):
            del fetched[key]
        for key in keys:  # a prefetch that is demanded before it has started is a demand like the others
            _, read = self._queue.pop(key, (0.0, None))
            read = fetched.get(key, read)
            if read is not None:
                self._fetch(key, self.now_s, read)
                self.now_s += self._asking_s
        self._ahead = self.now_s, plan.read_ahead
        for i, key in enumerate(keys):
            if i == residents:
                self._wait(host_done)
            n = tokens[key.expert]
            self._wait(self._lands.pop(key, 0.0) - (self._early_s[layer] if n == 1 else 0.0))
            self.now_s += self._expert_s * n
        self._wait(host_done)
        for fetch in plan.prefetches:
            self._queue[fetch.key] = self.now_s, fetch.read

    def _fetch(self, key: ExpertKey, asked_at: float, read: bool) -> None:
        self._free_at = max(self._free_at, asked_at) + self._fetch_s[read][key.layer]
        self._lands[key] = self._free_at + self._landing_s[key.layer]

    def _read_ahead(self, wanted: Collection[ExpertKey]) -> list[ExpertKey]:
        """What of `wanted` is being read since the layer before, or has been; the rest of that stops now."""
        asked_at, keys = self._ahead
        came = []
        for key in keys:
            began = max(self._free_at, asked_at)
            if began >= self.now_s:
                break
            ends = began + self._fetch_s[True][key.layer]
            if key in wanted:
                came.append(key)
                self._lands[key] = ends + self._landing_s[key.layer]
            self._free_at = ends if key in wanted else min(ends, self.now_s + self._stop_s[key.layer])
        return came

    def _wait(self, until: float) -> None:
        if until > self.now_s:
            self.stall_s += until - self.now_s
            self.now_s = until

    def _compute_on_host(self, plan: Plan, tokens: Mapping[int, int]) -> float:
        """When the host is done with its experts of a layer."""
        scale, costs = self._scales[plan.layer], self._misses
        read_at = self.now_s
        computed = [fetch for wave in plan.on_host for fetch in wave.fetches]
        for _ in filter(lambda fetch: fetch.read, computed):
            self._free_at = read_at = max(self._free_at, self.now_s) + costs.read_us * scale * 1e-6
        link_us = sum([len(wave.fetches) for wave in plan.waves]) * costs.link_us * scale
        took = costs.host_s([tokens[fetch.key.expert] for fetch in computed], link_us, scale)
        last = costs.host_us * scale * 1e-6 if read_at > self.now_s else 0.0  # of what was read last
        return max(self.now_s + took, read_at + last)

    def _start_prefetches(self) -> None:
        """Those for which the way in was free before now."""
        for key, (asked_at, read) in list(self._queue.items()):
            if max(self._free_at, asked_at) >= self.now_s:
                break
            del self._queue[key]
            self._fetch(key, asked_at, read)
