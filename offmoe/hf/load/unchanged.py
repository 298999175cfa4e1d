"""Whether somebody has touched modules since they were looked at: a look of 30 us where looking at all of it takes 85.

Must never: hold for modules with another hook, submodule, weight or `forward`, or another value of an attribute. It
must not keep a module alive that keeps it alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import nn

from offmoe.hf.load.own_forward import hooks_of

Place = tuple[dict[str, Any], str]
"""A dictionary and a key."""


class Unchanged:
    """Modules as they are now."""

    def __init__(self, parent: nn.Module, modules: Sequence[nn.Module], places: Sequence[Place] = ()) -> None:
        """Look at them.

        Args:
            parent: its hooks and submodules count, and nothing else.
            modules: submodules of it, further down as well.
            places: more that counts.
        """
        hooks = [hooks for module in (parent, *modules) for hooks in hooks_of(module)]
        self._unhooked, self._hooked = [h for h in hooks if not h], [(h, tuple(h)) for h in hooks if h]
        parts = [parent._modules, *(part for m in modules for part in (m._modules, m._parameters, m._buffers))]
        public = [(vars(m), name) for m in modules for name in ("forward", *vars(m)) if not name.startswith("_")]
        every = [*((part, name) for part in parts for name in part), *public, *places]
        self._places, self._names = [place for place, _ in every], [name for _, name in every]
        self._values = [*map(dict.get, self._places, self._names)]
        self._tensors = [value for value in self._values if isinstance(value, torch.Tensor) and not value.is_meta]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._states = self._states_now()

    def _states_now(self) -> list[int]:
        """Where tensors stand, and how often they have been changed; inference mode does not count."""
        return [*[tensor.data_ptr() for tensor in self._tensors], *[tensor._version for tensor in self._counted]]

    def holds(self) -> bool:
        """Whether nothing has changed."""
        are_held = map(is_, map(dict.get, self._places, self._names), self._values)  # a loop takes four times as long
        are_hooked = all(tuple(now) == then for now, then in self._hooked)  # no number is given to a second hook
        return are_hooked and not any(self._unhooked) and all(are_held) and self._states == self._states_now()
