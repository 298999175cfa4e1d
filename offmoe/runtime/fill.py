"""The background fill of one model: plans it, and lets what has landed take effect between two accesses.

When it has ended and demands have displaced some of it, it goes over what is still free once more.
"""

from __future__ import annotations

from collections.abc import Sequence

from offmoe.policy.fill import plan_fills
from offmoe.policy.planner import Planner
from offmoe.transfer.engine import TransferEngine
from offmoe.transfer.ticket import NO_SLOT
from offmoe.types import CacheStats, Demand, ExpertKey


class BackgroundFill:
    """Brings the experts of one model into free slots and free RAM slots; for the thread that computes."""

    def __init__(self, transfer: TransferEngine, order: Sequence[ExpertKey], stats: CacheStats) -> None:
        """order: the experts in the order in which they should come. stats: counts what took effect."""
        self._transfer, self._order, self._stats = transfer, order, stats
        self._planner: Planner | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will take effect."""
        return self._planner is None

    def start(self, planner: Planner) -> None:
        """Begin, with a planner that plans every access from now on. After a failed read it does not begin again."""
        fills = [] if self._transfer.fill_progress.error else plan_fills(planner, self._order)
        self._planner = planner if fills else None
        self._transfer.fill(fills)

    def settle(self, layer: int, demands: Sequence[Demand]) -> tuple[list[ExpertKey], list[ExpertKey]]:
        """Let landed fills take effect, before an access is planned.

        Args:
            layer: MoE layer of the access.
            demands: of the access. What they demand and is just being read takes effect as well.

        Returns:
            The experts that got a slot, and those that got a RAM slot.
        """
        planner = self._planner
        assert planner is not None
        fetches = self._transfer.settle_fills([ExpertKey(layer, demand.expert) for demand in demands])
        slots = [fetch for fetch in fetches if fetch.slot != NO_SLOT]
        in_ram = [fetch for fetch in fetches if fetch.host is not None]
        for fetch in slots:
            took_effect = planner.fill(fetch.key, fetch.slot)
            assert took_effect, "a fetch into the slot of a fill, or of its expert, displaces the fill"
            self._stats.filled_by(fetch.key)
        for fetch in in_ram:
            took_effect = planner.fill_ram(fetch.key, fetch.host)
            assert took_effect, "a fetch into the RAM slot of a fill, or of its expert, displaces the fill"
            self._stats.filled_by(fetch.key)
        if not self._transfer.filling:
            self.start(planner)
        return [fetch.key for fetch in slots], [fetch.key for fetch in in_ram]
