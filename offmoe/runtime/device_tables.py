"""The tables by which the device places misses itself, and the host's part of keeping them (device_decode.py).

Moves: table entries, some hundred bytes per layer and step, by stores into RAM that the device maps.
Bound: microseconds of the host per layer.
Must never: name a source or a slot that a copy, a read or a kernel under way may still change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offmoe.compute.gpu_compute import RoutedForm, routed_layer
from offmoe.compute.kernels.device import Launch, launch_kernel
from offmoe.compute.kernels.routed import NOWHERE, NUMBERS, LayerSizes, RoutedLayer, RoutedState
from offmoe.compute.kernels.routing_log import Entry
from offmoe.device.backend import Backend
from offmoe.device.host_buffers import HostBuffers
from offmoe.policy.planner import Planner
from offmoe.policy.victims import NAMED
from offmoe.storage.layout import PARAM_ALIGNMENT
from offmoe.transfer.engine import TransferEngine
from offmoe.types import CacheShape, ExpertKey

ENTRIES_PER_LAYER = 2
"""Entries of the log per MoE layer. A step writes one, and the host has read all of them when it ends."""


class DeviceTables:
    """The tables of one model."""

    def __init__(
        self,
        forms: Sequence[RoutedForm],
        shape: CacheShape,
        transfer: TransferEngine,
        backend: Backend,
        launch: Launch = launch_kernel,
    ) -> None:
        """Allocate them.

        Args:
            forms: of the experts of each MoE layer.
            shape: of the model.
            transfer: fills slots and RAM slots.
            backend: the device, which pins the RAM that both sides use.
            launch: starts kernels.

        Raises:
            CapacityError: the system does not give the memory.
        """
        self.shape, self._forms, self._transfer, self._launch = shape, forms, transfer, launch
        self._buffers: list[HostBuffers] = []

        def mapped(nbytes: int) -> torch.Tensor:
            self._buffers.append(HostBuffers(1, nbytes, pinning=backend))
            return self._buffers[-1].tensor(0)

        sizes = [
            LayerSizes(experts, k, NAMED * k, form.pieces)
            for experts, k, form in zip(shape.experts, shape.top_k, forms, strict=True)
        ]
        self.state = RoutedState(sizes, 1, backend.device, mapped, ENTRIES_PER_LAYER * shape.layers)
        """What device and host share."""
        self.layers: list[RoutedLayer] = []
        """The kernels of each layer. Empty while the slots are elsewhere than they know."""
        self._held: list[dict[int, int]] = [{} for _ in forms]
        """Per layer, by key, the RAM slot whose bytes the layer's sources name."""
        self._named: list[frozenset[int]] = [frozenset() for _ in forms]
        """Per layer, the experts that hold the slots of its list, and NOWHERE for a free one."""
        self._places: Sequence[int] = ()
        """Per slot, where it starts, in units of 256 bytes."""

    @property
    def is_mapped(self) -> bool:
        """Whether the device can read and write the tables in RAM."""
        return all(buffer.pinned(0) for buffer in self._buffers)

    def compile(self, dtype: torch.dtype) -> None:
        """Compile the kernels of all layers for inputs of this dtype, where Triton compiles."""
        self._build()
        kinds = zip(self._forms, self.state.sizes, strict=True)
        for layer in dict(zip(kinds, self.layers, strict=True)).values():
            layer.compile(dtype)

    def write(self, planner: Planner) -> None:
        """Say anew where experts are, and leave the first lists of victims. All transfers are settled, the device is
        idle.
        """
        self._build()
        self.state.log.reset()
        self.state.aborted.zero_()
        for i, layer in enumerate(self.layers):
            layer.reset(self._places_of(planner, i))
            self._hold(planner, i)
            self._leave_list(planner, i)

    def settle(self, planner: Planner, layer: int) -> None:
        """Answer the access of a layer with which the device waits: the planner's experts are in their slots."""
        self._hold(planner, layer)
        self.layers[layer].settle(self._places_of(planner, layer))

    def after_access(self, planner: Planner, entry: Entry) -> None:
        """Leave the list for the next access of a layer, once the planner knows this one."""
        i = entry.layer
        layer = self.layers[i]
        layer.number = (layer.number + 1) % NUMBERS
        by_score = planner.layers[i].policy.ranks_by_score
        if by_score and not entry.misses and self._named[i].isdisjoint(entry.ids):
            layer.leave_again()
        else:
            self._leave_list(planner, i)

    def after_repeat(self, layer: int) -> None:
        """Leave the list of a layer once more: its last access was one that the planner had already, all hits."""
        this = self.layers[layer]
        this.number = (this.number + 1) % NUMBERS
        this.leave_again()

    def slots_moved(self) -> None:
        """Note that slots are elsewhere, and hold no reference to where they were. The device is idle."""
        self.layers, self._places = [], ()
        for held in self._held:  # RAM slots are elsewhere too
            held.clear()

    def close(self) -> None:
        """Release the tables; idempotent. The device is idle."""
        self.layers = []
        for buffer in self._buffers:
            buffer.close()

    def _build(self) -> None:
        """Bind the layers to the slots, if they are not."""
        arena = self._transfer.writer.arena
        if not self.layers:
            layers = enumerate(self._forms)
            self.layers = [routed_layer(i, form, self.state, arena, self._launch) for i, form in layers]
            self.state.sources.zero_()
            self._places = [start // PARAM_ALIGNMENT for start in arena.starts]

    def _places_of(self, planner: Planner, layer: int) -> dict[int, int]:
        """By resident expert of a layer, where its slot starts."""
        cache, places = planner.layers[layer], self._places
        return {key - cache.keys.start: places[slot] for key, slot in cache.residency.slot_of.items()}

    def _hold(self, planner: Planner, layer: int) -> None:
        """Say where the layer's experts are in RAM, as far as that has changed."""
        cache, known, this = planner.layers[layer], self._held[layer], self.layers[layer]
        now = {} if cache.host_tier is None else cache.host_tier.slot_of
        any_slot = cache.residency.slots[0]
        for key in known.keys() - now.keys():
            this.hold(key - cache.keys.start, ())
            del known[key]
        for key, slot in now.items():
            if known.get(key) == slot:
                continue
            expert = key - cache.keys.start
            pieces = self._transfer.ram.pieces(ExpertKey(layer, expert), slot, any_slot)
            if pieces:
                this.hold(expert, pieces)
                known[key] = slot
            elif known.pop(key, None) is not None:  # it moved; a slot may be pinned later, so this looks again
                this.hold(expert, ())

    def _leave_list(self, planner: Planner, layer: int) -> None:
        """Name the victims of the layer's next access."""
        places = self._places
        first = planner.layers[layer].keys.start
        named = [(places[slot], NOWHERE if key is None else key - first) for slot, key in planner.next_places(layer)]
        self.layers[layer].leave(named)
        self._named[layer] = frozenset(expert for _, expert in named)
