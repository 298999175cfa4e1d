"""The experts that were filled in the background during a recording: the one input of a replay besides the accesses.

In the file, all optional (m, n: fills before the first access, and between later ones):

    initial      int32 [m, 2], (MoE layer, expert) of experts that had a slot before the first access
    events       int32 [n, 3], (access, MoE layer, expert): the expert got a free slot before this access, from 0
    initial_ram  int32 [m, 2], as initial, for RAM slots
    events_ram   int32 [n, 3], as events, for RAM slots

Accesses are counted as `Trace.accesses` gives them. Of one boundary, the fills of device slots come first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from offmoe.errors import TraceError
from offmoe.types import CacheShape, ExpertKey

_TIERS = ("", "_ram")
"""Endings of the arrays' names: device slots, RAM slots."""


@dataclass(frozen=True, eq=False)
class Fills:
    """The fills of one recording.

    slots: int32 [n, 3], rows of (access, MoE layer, expert) in the order in which they took effect.
    ram: as `slots`, for RAM slots.
    """

    slots: np.ndarray
    ram: np.ndarray

    @classmethod
    def of(cls, slots: Sequence[tuple[int, int, int]], ram: Sequence[tuple[int, int, int]]) -> Fills | None:
        """The fills of two lists of (access, MoE layer, expert); None if both are empty."""
        if not slots and not ram:
            return None
        return cls(*(np.array(rows, np.int32).reshape(-1, 3) for rows in (slots, ram)))

    @classmethod
    def read(cls, arrays: Mapping[str, np.ndarray], shape: CacheShape) -> Fills | None:
        """The fills that a file's arrays hold, None without any; TraceError if they contradict the model."""
        if not any(name + tier in arrays for name in ("initial", "events") for tier in _TIERS):
            return None
        return cls(*(_joined(arrays, tier, shape) for tier in _TIERS))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the file, without those that are empty."""
        arrays = {}
        for tier, rows in zip(_TIERS, (self.slots, self.ram), strict=True):
            arrays["initial" + tier] = rows[rows[:, 0] == 0, 1:]
            arrays["events" + tier] = rows[rows[:, 0] > 0]
        return {name: rows.astype(np.int32) for name, rows in arrays.items() if len(rows)}

    @cached_property
    def by_access(self) -> dict[int, tuple[list[ExpertKey], list[ExpertKey]]]:
        """By access, the experts that got a device slot and those that got a RAM slot before it."""
        before: defaultdict[int, tuple[list[ExpertKey], list[ExpertKey]]] = defaultdict(lambda: ([], []))
        for tier, rows in enumerate((self.slots, self.ram)):
            for access, layer, expert in rows.tolist():
                before[access][tier].append(ExpertKey(layer, expert))
        return dict(before)

    def __len__(self) -> int:
        return len(self.slots) + len(self.ram)


def _joined(arrays: Mapping[str, np.ndarray], tier: str, shape: CacheShape) -> np.ndarray:
    """The fills of one tier: int32 [n, 3]."""
    initial = _checked(arrays, f"initial{tier}", 2)
    events = _checked(arrays, f"events{tier}", 3)
    if (events[:, 0] < 0).any() or (np.diff(events[:, 0]) < 0).any():
        raise TraceError(f"'events{tier}' must count accesses from 0, in ascending order.")
    rows = np.concatenate([np.pad(initial, ((0, 0), (1, 0))), events])
    layers, experts = rows[:, 1], rows[:, 2]
    inside = (layers >= 0) & (layers < shape.layers)
    limits = np.array(shape.experts)[np.where(inside, layers, 0)]
    if not (inside & (experts >= 0) & (experts < limits)).all():
        raise TraceError(f"'initial{tier}' or 'events{tier}' names a layer or an expert that the model does not have.")
    return rows


def _checked(arrays: Mapping[str, np.ndarray], name: str, width: int) -> np.ndarray:
    """An array of ints [n, width]; an empty one if the file has none."""
    array = arrays.get(name)
    if array is None:
        return np.zeros((0, width), np.int32)
    if array.dtype.kind != "i" or array.ndim != 2 or array.shape[1] != width:
        raise TraceError(f"{name!r} is {array.dtype} {array.shape}; expected ints of shape (n, {width}).")
    return array.astype(np.int32) if array.dtype.itemsize <= 4 else array
