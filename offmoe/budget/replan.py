"""Divides the memory of a loaded model anew: dense weights stay where they are, and slots, KV cache and RAM change."""

from __future__ import annotations

from dataclasses import dataclass, replace

from offmoe.budget.memory_plan import MemoryPlan
from offmoe.budget.needs import ModelNeeds
from offmoe.budget.resolve import check_config, divide
from offmoe.config import OffloadConfig
from offmoe.device.backend import Backend
from offmoe.errors import CapacityError, ConfigError


@dataclass(frozen=True)
class Loaded:
    """What a division of memory has to know of a loaded model.

    Args:
        requested: the options as they were given.
        config: the options that hold now, resolved.
        plan: the division that holds now.
        needs: what the model needs, as when it was loaded.
        backend: the device.
        computes_on_host: whether plans may leave experts to the host.
    """

    requested: OffloadConfig
    config: OffloadConfig
    plan: MemoryPlan
    needs: ModelNeeds
    backend: Backend
    computes_on_host: bool = False

    def divide(
        self,
        *,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        max_context: int | None = None,
        slots_per_layer: int | tuple[int, ...] | None = None,
        host_untouched: int = 0,
    ) -> tuple[OffloadConfig, MemoryPlan]:
        """The division with other options; one that is None stays as it is.

        With another device_memory, slots_per_layer follows from it unless it is given too.

        Args:
            host_untouched: bytes of RAM that the division that holds has, and that the system still counts as free.

        Raises:
            CapacityError: it does not fit; the message names what would.
            ConfigError: an option cannot be used.
        """
        if slots_per_layer is None and device_memory is None:
            slots_per_layer = self.requested.slots_per_layer
        config = replace(
            self.requested,
            device=self.config.device,
            scope=self.config.scope,
            device_memory=self.plan.budget if device_memory is None else device_memory,
            host_memory=self._host_memory() if host_memory is None else host_memory,
            max_context=self.plan.max_context if max_context is None else max_context,
            slots_per_layer=slots_per_layer,
            on_miss=self._on_miss(),
            warm_counts=self.config.warm_counts,
        )
        check_config(config, self.backend)
        try:
            return self._divide(config, host_untouched)
        except CapacityError as refusal:
            raise CapacityError(f"{refusal}{self._longest_context(config, host_untouched)}") from None

    def _divide(self, config: OffloadConfig, host_untouched: int) -> tuple[OffloadConfig, MemoryPlan]:
        old = self.plan
        fixed = replace(
            self.needs.bytes, dense=old.dense + old.in_flight, layers=(), loading=0
        )  # dense weights cannot move
        held = old.dense + old.in_flight + old.slots + old.staging + old.scratch
        resolved, plan = divide(
            config,
            self.needs._replace(bytes=fixed),
            self.backend,
            self.backend.free_bytes() + held,
            host_held=0 if old.host is None else old.host.staging + old.host.slots + old.host.scratch - host_untouched,
        )
        if resolved.miss_costs is not None and self.config.miss_costs is not None:
            resolved = resolved.resolved(miss_costs=self.config.miss_costs)  # the host's time may have been measured
        return resolved, replace(
            plan,
            dense=old.dense,
            in_flight=old.in_flight,
            offloaded=old.offloaded,
            offloaded_layers=old.offloaded_layers,
            offloaded_in=old.offloaded_in,
        )

    def _host_memory(self) -> int | str:
        """The RAM that holds now, as an option."""
        if self.backend.unified_memory:
            return "auto"
        return 0 if self.requested.host_memory == 0 else int(self.config.host_memory)

    def _on_miss(self) -> str:
        """on_miss as it was given; "fetch" if the host would have to compute and nothing was built for that."""
        on_device = self.backend.unified_memory or not self.requested.is_numeric
        return self.requested.on_miss if on_device or self.computes_on_host else "fetch"

    def _longest_context(self, config: OffloadConfig, host_untouched: int) -> str:
        """A sentence that names the largest max_context that fits with the other options; "" if none does."""
        low, high = 0, int(config.max_context or 0)
        while low + 1 < high:
            middle = (low + high) // 2
            try:
                self._divide(replace(config, max_context=middle), host_untouched)
            except (CapacityError, ConfigError):
                high = middle
            else:
                low = middle
        return f" With max_context={low} it would fit." if low else ""
