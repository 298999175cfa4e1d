"""The table of eviction policies: every name that the option `eviction` may have, and what makes the policy.

The table stands below the options, so that they can refuse an unknown name before a policy is imported. It is the one
table in offmoe that a program may add to while it runs (`offmoe.register_eviction`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from offmoe.errors import ConfigError

Factory = Callable[[], Any]
"""A subclass of `offmoe.policy.eviction.EvictionPolicy`, or a function without arguments that returns an instance."""

EVICTIONS = ("aged-lfu", "lru", "lru-2", "s3-fifo", "sieve", "static")
"""The policies that offmoe brings. `offmoe.policy.eviction.registry` knows their classes."""

_registered: dict[str, Factory] = {}


def register_eviction(name: str, factory: Factory) -> None:
    """Add an eviction policy under a name that `eviction=` then accepts, for this process.

    Args:
        name: the value of `eviction=`. Traces record it, so a replay needs the same name to be registered.
        factory: a subclass of `offmoe.policy.eviction.EvictionPolicy`, or a function without arguments that returns an
            instance. It is called once per pool of slots: once per MoE layer with scope="layer", once with "model".

    Raises:
        ConfigError: the name is empty, belongs to a policy of offmoe or to another factory, or factory is not callable.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"register_eviction({name!r}, ...): the name must be a string that is not empty.")
    if name in EVICTIONS or _registered.get(name, factory) is not factory:
        raise ConfigError(f"register_eviction({name!r}, ...): the name is taken; choose another.")
    if not callable(factory):
        raise ConfigError(f"register_eviction({name!r}, {factory!r}): the factory must be a class or a function.")
    _registered[name] = factory


def registered_evictions() -> Mapping[str, Factory]:
    """The policies that were added with `register_eviction`, by name."""
    return dict(_registered)


def check_eviction(name: object) -> None:
    """Raise ConfigError unless `name` is a policy of offmoe or a registered one."""
    if name not in EVICTIONS and name not in _registered:
        on_command_line = name if ":" in str(name) else "MODULE:CLASS"
        raise ConfigError(
            f"eviction={name!r} is unknown. Use one of: {', '.join([*EVICTIONS, *_registered])}. Register a policy of "
            f"your own first: offmoe.register_eviction({name!r}, ...), or --eviction {on_command_line} on the command "
            "line."
        )
