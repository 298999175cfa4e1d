"""torch.autocast for experts: whether it is enabled on a tensor's device, and operations that it must not change."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch


def autocast_enabled(x: torch.Tensor) -> bool:
    """Whether torch.autocast is enabled for the kind of device that holds `x`."""
    return torch.is_autocast_enabled(x.device.type)


def without_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """A context in which torch.autocast is disabled for the kind of device that holds `x`."""
    return torch.autocast(x.device.type, enabled=False)


def concatenate(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows [n, H] of all parts, in their order.

    torch.autocast is disabled for it: under autocast, torch.cat refuses every half precision but autocast's own.
    """
    with without_autocast(parts[0]):
        return torch.cat(list(parts))
