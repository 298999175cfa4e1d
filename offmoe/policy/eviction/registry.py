"""The eviction policy that a name stands for."""

from __future__ import annotations

from importlib import import_module

from offmoe.errors import ConfigError
from offmoe.eviction_names import check_eviction, register_eviction, registered_evictions
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


def import_eviction(name: str) -> str:
    """Import the policy that "MODULE:CLASS" names and register it under that name; other names are left alone.

    Returns:
        The name, as `eviction=` and traces have it.

    Raises:
        ConfigError: the module cannot be imported, has no such class, or the class is no `EvictionPolicy`.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        return name
    try:
        policy = getattr(import_module(module), attribute)
    except Exception as error:  # importing runs code of the user's, which may raise anything
        raise ConfigError(f"eviction={name!r} cannot be imported: {type(error).__name__}: {error}.") from error
    if not (isinstance(policy, type) and issubclass(policy, EvictionPolicy)):
        raise ConfigError(
            f"eviction={name!r} is no eviction policy: derive the class from offmoe.policy.eviction.EvictionPolicy."
        )
    register_eviction(name, policy)
    return name
