"""Run Mixture-of-Experts models of transformers whose experts stay outside the device.

`offmoe.from_pretrained(model, ...)` returns the architecture's own class; options are those of `OffloadConfig`; counts
are `CacheStats`; errors derive from `OffmoeError`. Names that need torch or numpy are imported when they are first
used, so that `import offmoe` and the command line start at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from offmoe.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    MissingTensorError,
    OffmoeError,
    ShardChangedError,
    TraceError,
    TransferError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from offmoe.api import from_pretrained
    from offmoe.config import OffloadConfig
    from offmoe.eviction_names import register_eviction
    from offmoe.types import CacheStats

__version__ = "0.1.0"

__all__ = [
    "CacheStats",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "MissingTensorError",
    "OffloadConfig",
    "OffmoeError",
    "ShardChangedError",
    "TraceError",
    "TransferError",
    "UnsupportedModelError",
    "__version__",
    "from_pretrained",
    "register_eviction",
]

_LAZY = {
    "CacheStats": "offmoe.types",
    "OffloadConfig": "offmoe.config",
    "from_pretrained": "offmoe.api",
    "register_eviction": "offmoe.eviction_names",
}
"""Public names by the module that has them."""


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
