"""The eviction policy that options name, for every pool of a model.

Nothing moves. Bound: nothing, it is done once. Must never see more than options and shape (rule R1)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from offmoe.config import CacheOptions
from offmoe.policy.eviction import LRU, LRU2, AgedLFU, EvictionPolicy, Static
from offmoe.policy.queues import S3FIFO, Sieve
from offmoe.types import CacheShape

MakePolicy = Callable[[int, int], EvictionPolicy]
"""(index of the pool, number of keys) -> its eviction policy. Scope "layer" has a pool per layer, scope "model" one."""


def eviction_policies(options: CacheOptions, shape: CacheShape) -> MakePolicy:
    """What makes the policy of every pool of a run."""
    if options.eviction == "static":
        by_layer = options.popularity_of(shape)
        pooled = list(chain.from_iterable(by_layer))
        return lambda pool, _: Static(by_layer[pool] if options.scope == "layer" else pooled)
    if options.eviction == "aged-lfu":
        # The half-life counts accesses of one layer; a pool of all layers sees one of each per step.
        half_life = options.half_life * (shape.layers if options.scope == "model" else 1)
        return lambda _, keys: AgedLFU(keys, half_life)
    make = _SIMPLE[options.eviction]
    return lambda _, keys: make(keys)


_SIMPLE: dict[str, Callable[[int], EvictionPolicy]] = {"lru": LRU, "lru-2": LRU2, "s3-fifo": S3FIFO, "sieve": Sieve}
"""Policies that need nothing but the number of keys."""
