"""Background fills of a recorded run, repeated in its replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offmoe.config import CacheOptions
from offmoe.policy.planner import Planner
from offmoe.trace.fills import Fills
from offmoe.types import CacheStats, ExpertKey

Boundary = tuple[Sequence[ExpertKey], Sequence[ExpertKey]]
"""The experts that get a device slot, and those that get a RAM slot, between two accesses."""


def fills_by_access(
    fills: Fills | None, recorded: CacheOptions | None, options: CacheOptions
) -> Mapping[int, Boundary]:
    """The fills that a replay repeats, by the access that they come before.

    Args:
        fills: those of the trace.
        recorded: the options of the run.
        options: those of the replay. With any other than the run's, fills would have come at other times: there are
            none then.
    """
    return {} if fills is None or options != recorded else fills.by_access


def fill(planner: Planner, boundary: Boundary, stats: CacheStats) -> None:
    """Let the fills of one boundary take effect, and count them."""
    slots, in_ram = boundary
    for expert in slots:
        stats.filled_by(expert, planner.fill(expert))
    for expert in in_ram:
        stats.filled_by(expert, planner.fill_ram(expert))
