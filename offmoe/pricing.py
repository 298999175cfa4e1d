"""What plans cost in time: one compute stream, one way in for experts, and the runtime's order of both.

Nothing is measured here; the costs come from a profile. Bound: some 2 us per (step, layer). The model: a layer computes
what is resident first, then every expert as it arrives; one fetch at a time occupies the way in; demands go before
prefetches that have not started, and the fetches of all waves are asked for at once; what computing does not cover is
stall. Rough for prompts, where the dense part of many tokens costs less than that many times one token's. Must never
influence a plan (rule R1)."""

from __future__ import annotations

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
        self._expert_s = costs.expert_us_device * 1e-6
        self._dense_s = costs.dense_us_per_token * 1e-6 / shape.layers
        self._free_at = 0.0
        # Prefetches that have not started: when they were asked for, and whether they are to be read from disk.
        self._queue: dict[ExpertKey, tuple[float, bool]] = {}
        self._lands: dict[ExpertKey, float] = {}

    def add(self, access: Access, plan: Plan, rows: int) -> None:
        """One layer's access, in a step of `rows` tokens."""
        layer = plan.layer
        self.now_s += self._dense_s * rows
        tokens = {demand.expert: demand.tokens for demand in access.demands}
        self._start_prefetches()
        keys = [ExpertKey(layer, expert) for wave in plan.waves for expert, _ in wave.experts]
        fetched = {fetch.key: fetch.read for wave in plan.waves for fetch in wave.fetches}
        for key in keys:  # a prefetch that is demanded before it has started is a demand like the others
            _, read = self._queue.pop(key, (0.0, None))
            read = fetched.get(key, read)
            if read is not None:
                self._fetch(key, self.now_s, read)
        for key in keys:
            lands = self._lands.pop(key, 0.0)
            if lands > self.now_s:
                self.stall_s += lands - self.now_s
                self.now_s = lands
            self.now_s += self._expert_s * tokens[key.expert]
        for fetch in plan.prefetches:
            self._queue[fetch.key] = self.now_s, fetch.read

    def _fetch(self, key: ExpertKey, asked_at: float, read: bool) -> None:
        self._free_at = max(self._free_at, asked_at) + self._fetch_s[read][key.layer]
        self._lands[key] = self._free_at

    def _start_prefetches(self) -> None:
        """Those for which the way in was free before now."""
        for key, (asked_at, read) in list(self._queue.items()):
            if max(self._free_at, asked_at) >= self.now_s:
                break
            del self._queue[key]
            self._fetch(key, asked_at, read)
