"""The eviction policy that a name stands for."""

from __future__ import annotations

from offmoe.errors import ConfigError
from offmoe.eviction_names import check_eviction, registered_evictions
from offmoe.policy.eviction.aged_lfu import AgedLFU
from offmoe.policy.eviction.base import EvictionPolicy, Pool
from offmoe.policy.eviction.lru import LRU
from offmoe.policy.eviction.lru_k import LRU2
from offmoe.policy.eviction.s3_fifo import S3FIFO
from offmoe.policy.eviction.sieve import Sieve
from offmoe.policy.eviction.static import Static

_POLICIES: dict[str, type[EvictionPolicy]] = {
    "aged-lfu": AgedLFU,
    "lru": LRU,
    "lru-2": LRU2,
    "s3-fifo": S3FIFO,
    "sieve": Sieve,
    "static": Static,
}


def build_eviction(pool: Pool) -> EvictionPolicy:
    """The policy of one pool that the option `eviction` names.

    Raises:
        ConfigError: no policy has the name, or its factory does not give an `EvictionPolicy`.
    """
    name = pool.options.eviction
    check_eviction(name)
    factory = _POLICIES[name] if name in _POLICIES else registered_evictions()[name]
    if isinstance(factory, type) and issubclass(factory, EvictionPolicy):
        return factory.for_pool(pool)
    policy = factory()
    if not isinstance(policy, EvictionPolicy):
        raise ConfigError(
            f"eviction={name!r} gives a {type(policy).__name__}, which is no offmoe.policy.eviction.EvictionPolicy."
        )
    return policy
