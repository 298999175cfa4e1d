"""Dense layers at rest, outside the device: as images in host memory, or as tensors in shards.

What moves: all weights of one layer into device memory of the caller, in one copy per layer (host) or one read and one
copy per tensor (shards). Bound: the link; the disk. Host images are pinned if the backend can. Tensors that are stored
in another dtype are cast while they are copied.

What it must never do: map a file, or return before the bytes are safe to be used on the device's current stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from offmoe.device.arena import HostBuffers
from offmoe.device.backend import Backend
from offmoe.storage.layout import ExpertLayout, ExpertRecord, Segment, typed
from offmoe.storage.store import ExpertStore
from offmoe.types import ExpertKey


class LayerSource(Protocol):
    """Where the weights of some layers are, counted from 0."""

    def fetch(self, layer: int, memory: torch.Tensor, views: Mapping[str, torch.Tensor]) -> None:
        """Copy a layer to the device. memory: uint8 [nbytes of its layout]; views: the same memory, by weight."""

    def close(self) -> None:
        """Let go of memory and files."""


class HostImages:
    """Layers in host memory, each laid out as it will be on the device."""

    def __init__(
        self, layouts: Sequence[ExpertLayout], weights: Sequence[Mapping[str, torch.Tensor]], backend: Backend
    ) -> None:
        """Copy `weights` (per layer, by the names of its layout). CapacityError if there is no memory for it."""
        self._sizes = [layout.nbytes for layout in layouts]
        self._images = HostBuffers(len(layouts), max(self._sizes), pinning=backend)
        for i, (layout, tensors) in enumerate(zip(layouts, weights, strict=True)):
            for name, view in layout.views(self._images.tensor(i)[: layout.nbytes]).items():
                view.copy_(tensors[name])

    def fetch(self, layer: int, memory: torch.Tensor, views: Mapping[str, torch.Tensor]) -> None:
        # the image never changes, so nobody has to wait for the copy but the device itself
        memory.copy_(self._images.tensor(layer)[: self._sizes[layer]], non_blocking=self._images.pinned(layer))

    def close(self) -> None:
        self._images.close()


class ShardTensors:
    """Layers in safetensors shards, read tensor by tensor through one staging buffer."""

    def __init__(self, shards: Sequence[Path], segments: Sequence[Mapping[str, Segment]], backend: Backend) -> None:
        """segments: per layer by weight; `Segment.shard` counts in `shards`, of which only those needed are opened."""
        used = sorted({segment.shard for layer in segments for segment in layer.values()})
        number = {shard: i for i, shard in enumerate(used)}
        self._segments = {
            ExpertKey(i, j): (name, replace(segment, shard=number[segment.shard]))
            for i, layer in enumerate(segments)
            for j, (name, segment) in enumerate(layer.items())
        }
        self._count = [len(layer) for layer in segments]
        records = {key: ExpertRecord((segment,)) for key, (_, segment) in self._segments.items()}
        self._store = ExpertStore([shards[shard] for shard in used], records)
        self._staging = HostBuffers(1, self._store.buffer_bytes, pinning=backend)
        self._memory, self._tensor = self._staging.memory(0), self._staging.tensor(0)

    def fetch(self, layer: int, memory: torch.Tensor, views: Mapping[str, torch.Tensor]) -> None:
        for j in range(self._count[layer]):
            key = ExpertKey(layer, j)
            name, segment = self._segments[key]
            self._store.read_into(key, self._memory)
            # blocking, because the next tensor is read into the same buffer
            views[name].copy_(typed(self._store.segments(key, self._tensor)[0], segment))

    def close(self) -> None:
        self._store.close()
        self._staging.close()
