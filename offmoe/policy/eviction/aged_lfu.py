"""Aged LFU: evict the least used, where an access counts less the older it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from math import log2

from offmoe.policy.eviction.base import Pool, ScoredPolicy
from offmoe.types import Demand

HALF_LIFE = 16.0
"""Accesses after which one counts half. On recorded routing hit rates are flat between 8 and 32; at 16 the policy is
never below LRU and closes 20 to 32 % of the gap between LRU and the optimum on gpt-oss-20b."""
EARLIER_TOKENS = 1 / 16
"""Weight of a prompt's tokens before the tail: they are at least 64 tokens old, four half-lives of 16."""


class AgedLFU(ScoredPolicy):
    """Evicts the key with the lowest count of accesses, halved every `half_life` accesses. Counts survive eviction.

    Aging multiplies all counts alike and so never changes their order. The score is therefore log2 of the count as seen
    from access 0, log2(sum of 2^(t_i / half_life)), which changes only when its key is accessed.

    A step of many tokens ages the counts as its tail of n <= 64 rows would one by one. Its demands tell how many of the
    tail's tokens are routed to an expert, not which, so each counts as the mean of the ages 0 to n - 1.

    With counts of an earlier run, an expert begins with the aged count that its share of the tokens tends to.
    """

    def __init__(self, half_life: float = HALF_LIFE, shares: Mapping[int, float] | None = None):
        """half_life: in accesses of single tokens to this pool. shares: by key, the share of the pool's accesses that
        demanded it in an earlier run."""
        self._now = 0.0
        self._step = 1.0 / half_life
        self._decay: float = 2.0**-self._step
        fresh = 1.0 - self._decay  # an access at every step adds up to 1 / fresh
        super().__init__({key: log2(share / fresh) for key, share in (shares or {}).items() if share > 0})

    @classmethod
    def for_pool(cls, pool: Pool) -> AgedLFU:
        # The option counts accesses of one layer; a pool of all layers sees one of each layer per step.
        half_life = pool.options.half_life * pool.num_layers
        counts = pool.options.warm_counts_of(pool.shape)
        if counts is None:
            return cls(half_life)
        by_key = list(chain.from_iterable(counts))
        return cls(half_life, {key: by_key[key] / pool.num_layers for key in pool.keys})

    def on_access(self, keys: Sequence[int], demands: Sequence[Demand], tail: int) -> None:
        self._now = now = self._now + tail * self._step
        scores = self.scores
        if tail <= 1:
            for key in keys:
                old = scores[key]  # below `now` unless the key has been used far above average
                scores[key] = (
                    now + log2(1.0 + 2.0 ** (old - now)) if old <= now else old + log2(1.0 + 2.0 ** (now - old))
                )
            return
        mean_age = (1.0 - self._decay**tail) / (tail * (1.0 - self._decay))
        for key, demand in zip(keys, demands, strict=True):
            use = now + log2(mean_age * (demand.tail_tokens + (demand.tokens - demand.tail_tokens) * EARLIER_TOKENS))
            old = scores[key]
            high, low = (use, old) if use >= old else (old, use)
            scores[key] = high + log2(1.0 + 2.0 ** (low - high))
