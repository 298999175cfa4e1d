"""Eviction policies, one file per algorithm. A policy of your own derives from `EvictionPolicy` or `ScoredPolicy`."""

from offmoe.eviction_names import register_eviction
from offmoe.policy.eviction.base import EvictionPolicy, Pool, ScoredPolicy

__all__ = ["EvictionPolicy", "Pool", "ScoredPolicy", "register_eviction"]
