"""Where the weights of offloaded dense layers are kept: as images in host memory, or as tensors in shards.

A fetch copies all weights of one layer into device memory of the caller. Host images need one copy per layer, bound by
the link; they are pinned if the backend can pin. Shards need one read and one copy per tensor, bound by the disk; no
file is mapped. A tensor that is stored in another dtype is cast by the copy. When a fetch returns, the bytes are safe
to use on the device's current stream.
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
    """Holds the weights of some layers, counted from 0."""

    def fetch(self, layer: int, memory: torch.Tensor, views: Mapping[str, torch.Tensor]) -> None:
        """Copy a layer to the device.

        Args:
            layer: which layer.
            memory: device memory, uint8 [bytes of the layer's layout].
            views: the same memory as the layer's weights, by name.
        """

    def close(self) -> None:
        """Release memory and files."""


class HostImages:
    """Layers in host memory, each laid out as on the device."""

    def __init__(
        self, layouts: Sequence[ExpertLayout], weights: Sequence[Mapping[str, torch.Tensor]], backend: Backend
    ) -> None:
        """Copy `weights` (per layer, by the names of its layout) to host memory.

        Raises:
            CapacityError: there is not enough host memory.
        """
        self._sizes = [layout.nbytes for layout in layouts]
        self._images = HostBuffers(len(layouts), max(self._sizes), pinning=backend)
        for i, (layout, tensors) in enumerate(zip(layouts, weights, strict=True)):
            for name, view in layout.views(self._images.tensor(i)[: layout.nbytes]).items():
                view.copy_(tensors[name])

    def fetch(self, layer: int, memory: torch.Tensor, views: Mapping[str, torch.Tensor]) -> None:
        # the image never changes, so only the device has to wait for the copy
        memory.copy_(self._images.tensor(layer)[: self._sizes[layer]], non_blocking=self._images.pinned(layer))

    def close(self) -> None:
        self._images.close()


class ShardTensors:
    """Layers in safetensors shards, read tensor by tensor through one staging buffer."""

    def __init__(self, shards: Sequence[Path], segments: Sequence[Mapping[str, Segment]], backend: Backend) -> None:
        """Open the shards that hold a layer.

        Args:
            shards: paths; those that no segment needs are not opened.
            segments: per layer, where each weight is. `Segment.shard` is an index into `shards`.
            backend: pins the staging buffer if it can.
        """
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
