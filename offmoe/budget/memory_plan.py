"""The division of the device's memory as a value: what `model.offload.memory()` and `inspect` show."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from offmoe.budget.host import HostPlan
from offmoe.text import format_size


@dataclass(frozen=True)
class MemoryPlan:
    """The division of the device's memory. All figures are bytes unless they say otherwise.

    Args:
        budget: the most that all parts may take.
        dense: dense weights that stay on the device.
        slots: all expert slots.
        kv: the KV cache.
        staging: staging buffers; 0 if they are not on the device.
        workspace: activations, logits and temporary bytes of one expert.
        smallest: the smallest budget that works.
        max_context: tokens that the KV cache holds, over all sequences.
        slots_per_layer: number of slots of each MoE layer.
        smallest_dense: the smallest budget that works with all dense weights on the device.
        in_flight: the buffers that offloaded dense layers are streamed through.
        offloaded: dense weights that are kept outside the device.
        offloaded_layers: number of decoder layers, the last ones, that these belong to.
        offloaded_in: where they are kept, HOST or DISK; None if there are none.
        scratch: slots for experts that compute without becoming resident.
        scope: what shares the slots; in one pool, "model", only the sum of slots_per_layer counts.
        reason: why scope="auto" became that, in one line; "" if it was not "auto".
        host: the plan of RAM; None on a device whose memory is the host's.
    """

    budget: int
    dense: int
    slots: int
    kv: int
    staging: int
    workspace: int
    smallest: int
    max_context: int
    slots_per_layer: tuple[int, ...]
    smallest_dense: int = 0
    in_flight: int = 0
    offloaded: int = 0
    offloaded_layers: int = 0
    offloaded_in: str | None = None
    scratch: int = 0
    scope: str = "layer"
    reason: str = ""
    host: HostPlan | None = None

    @property
    def used(self) -> int:
        """Bytes of all parts together."""
        return self.dense + self.in_flight + self.slots + self.scratch + self.kv + self.staging + self.workspace

    def to_dict(self) -> dict[str, Any]:
        """The plan for JSON, whose keys say "parked" for offloaded."""
        values = {name.replace("offloaded", "parked"): value for name, value in asdict(self).items()}
        return {**values, "slots_per_layer": list(self.slots_per_layer), "used": self.used}

    def describe(self) -> str:
        """The plan in one line."""
        slots = f"{sum(self.slots_per_layer)} expert slots"
        parts = [("dense", self.dense), (slots, self.slots), (f"KV of {self.max_context} tokens", self.kv)]
        parts += [("scratch", self.scratch), ("staging", self.staging), ("workspace", self.workspace)]
        parts[1:1] = [("a dense layer in flight", self.in_flight)]
        text = ", ".join(f"{name} {format_size(size)}" for name, size in parts if size)
        if self.offloaded_layers:
            text += f"; dense weights of {self.offloaded_layers} layers, {format_size(self.offloaded)}, come from "
            text += f"{self.offloaded_in} in every pass"
        if self.host is not None:
            text += f"; {self.host.describe()}"
        if self.reason:
            text += f"; {self.reason}"
        return f"{format_size(self.used)} of {format_size(self.budget)}: {text}"
