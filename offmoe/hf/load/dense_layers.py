"""Offload dense weights: the last decoder layers keep theirs outside the device and stream them in before they run.

Used if the dense part does not fit the device. In every forward pass, the weight matrices of one offloaded layer at a
time are copied from host memory or from the shards into one buffer of device memory that all offloaded layers share.
The link or the disk bounds it; nothing overlaps it. Norms, biases, buffers and routers stay on the device: they are
small, and the router probe runs a router before its layer.

transformers' loader puts these weights where device_map says: on the "cpu", or on "disk", which means the original
shards. It writes only what it has to convert, into a temporary folder. Its hooks are removed after loading, because
they would map files and copy every small module by itself.

A layer whose forward failed keeps no weights in the buffer, and no two layers use the buffer at once.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from transformers import PreTrainedModel

from offmoe.device.backend import Backend
from offmoe.device.host_buffers import HostBuffers
from offmoe.errors import MissingTensorError, OffmoeError
from offmoe.hf.adapters.find import decoder_layers, expert_parameters, find_experts, require_adapter
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import ExpertLayout, ExpertRecord, Segment, typed
from offmoe.storage.store import ExpertStore
from offmoe.types import DISK, HOST, ExpertKey

logger = logging.getLogger(__name__)

PLACES = {HOST: "cpu", DISK: "disk"}
"""Place in a memory plan -> its name in transformers' device_map."""


@dataclass(frozen=True)
class DenseLayer:
    """A decoder layer that can be offloaded."""

    name: str
    """Module path of the layer."""
    shapes: dict[str, tuple[int, ...]]
    """Full name -> shape of each weight that may leave the device."""

    def layout(self, dtype: torch.dtype) -> ExpertLayout:
        """Where the weights stand in the shared buffer, if they have this dtype."""
        return ExpertLayout.of({name: (dtype, shape) for name, shape in self.shapes.items()})


def dense_layers(meta_model: PreTrainedModel) -> tuple[DenseLayer, ...]:
    """The decoder layers that can be offloaded, in module order: all layers of every stack that has experts somewhere.

    Weights that two modules share stay on the device.

    Args:
        meta_model: the model on the meta device, experts included.
    """
    experts = find_experts(meta_model)
    uses = Counter(id(param) for _, param in meta_model.named_parameters(remove_duplicate=False))
    stays = set(expert_parameters(meta_model)) | router_weights(meta_model, experts)
    out = []
    for path, layer in decoder_layers(meta_model).items():
        named = {f"{path}.{name}": param for name, param in layer.named_parameters()}
        moving = (n for n, p in named.items() if p.dim() > 1 and uses[id(p)] == 1 and n not in stays)
        out.append(DenseLayer(path, {name: tuple(named[name].shape) for name in moving}))
    return tuple(layer for layer in out if layer.shapes)


def router_weights(model: nn.Module, experts: Mapping[str, nn.Module]) -> set[str]:
    """Full names of the matrices that have a row or a column per expert, in the block around each experts module."""
    out = set()
    for name, module in experts.items():
        adapter = require_adapter(module)
        count, block = adapter.num_experts(module), name.rpartition(".")[0]
        out |= {
            f"{block}.{n}"
            for n, p in model.get_submodule(block).named_parameters()
            if p.dim() == 2 and count in p.shape
        }
    return out


class _Weight(NamedTuple):
    """A parameter of an offloaded layer: its value while the layer runs (present) and while it does not (absent)."""

    owner: nn.Module
    param: str
    absent: nn.Parameter
    present: nn.Parameter


class OffloadedLayers:
    """The offloaded layers of one model.

    Before loading, `device_map` and `folder` go to transformers' loader. After loading, `take_over` makes the model
    stream its layers. `close` releases memory and files.
    """

    def __init__(
        self,
        layers: Sequence[DenseLayer],
        place: str,
        meta_model: PreTrainedModel,
        checkpoint: Checkpoint,
        sources: Mapping[str, str],
        backend: Backend,
    ) -> None:
        """Prepare to load a model whose `layers` are offloaded.

        Args:
            layers: the layers to offload.
            place: HOST or DISK.
            meta_model: the model on the meta device, experts included.
            checkpoint: the model's tensors at rest.
            sources: full parameter name -> the checkpoint's tensor, if the tensor is loaded unchanged.
            backend: the device.
        """
        self._layers, self._place = tuple(layers), place
        self._checkpoint, self._sources, self._backend = checkpoint, sources, backend
        self.names = {name for layer in layers for name in layer.shapes}
        """Full names of the offloaded weights."""
        experts = expert_parameters(meta_model)
        tensors = [*meta_model.named_parameters(remove_duplicate=False)]
        names = [name for name, _ in [*tensors, *meta_model.named_buffers(remove_duplicate=False)]]
        self.device_map = {
            n: PLACES[place] if n in self.names else str(backend.device) for n in names if n not in experts
        }
        """Place of every parameter and buffer. Full names, because transformers matches prefixes, and `layers.1` is a
        prefix of `layers.10`."""
        self._folder = tempfile.TemporaryDirectory(prefix="offmoe-dense-")
        self._source: HostImages | ShardTensors | None = None
        self._user = threading.Lock()
        self._thread = 0
        self._present: int | None = None
        self._weights: list[list[_Weight]] = []

    @property
    def folder(self) -> Path:
        """The temporary folder for weights that transformers converts."""
        return Path(self._folder.name)

    def take_over(self, model: PreTrainedModel) -> None:
        """Make a model that was just loaded stream its offloaded layers.

        Raises:
            CapacityError: there is no memory for the buffer or the copies in host memory.
            MissingTensorError: an offloaded weight is in no shard.
        """
        remove_hook_from_module(model)
        loaded = [{name: model.get_parameter(name) for name in layer.shapes} for layer in self._layers]
        layouts = [ExpertLayout.of({n: (p.dtype, tuple(p.shape)) for n, p in layer.items()}) for layer in loaded]
        if self._place == HOST:
            self._source = HostImages(layouts, loaded, self._backend)
        else:
            self._source = ShardTensors(*self._locate(), self._backend)
        landing = self._backend.allocate(max(layout.nbytes for layout in layouts))
        for number, (layer, layout) in enumerate(zip(self._layers, layouts, strict=True)):
            memory = landing[: layout.nbytes]
            views = layout.views(memory)
            self._weights.append([_weight(model, name, view) for name, view in views.items()])
            self._show(number, present=False)
            self._attach(number, model.get_submodule(layer.name), memory, views)

    def close(self) -> None:
        """Release memory and files. The model cannot run afterwards."""
        if self._source is not None:
            self._source.close()
        self._folder.cleanup()

    def _attach(self, number: int, layer: nn.Module, memory: torch.Tensor, views: Mapping[str, torch.Tensor]) -> None:
        def enter(*_: object) -> None:
            self._take(number)
            assert self._source is not None
            self._source.fetch(number, memory, views)
            self._show(number, present=True)

        def leave(*_: object) -> None:
            if self._present == number:
                self._show(number, present=False)
                self._present = None
                self._user.release()

        layer.register_forward_pre_hook(enter, prepend=True)
        layer.register_forward_hook(leave, always_call=True)

    def _take(self, number: int) -> None:
        """Take the buffer for one layer; OffmoeError if another thread is using it."""
        if not self._user.acquire(blocking=False):
            if self._thread != threading.get_ident() or self._present is None:
                raise OffmoeError("the model is already running in another thread; wait for it, or load it once more")
            self._show(self._present, present=False)  # this thread's last forward was interrupted
        self._present, self._thread = number, threading.get_ident()

    def _show(self, number: int, *, present: bool) -> None:
        for weight in self._weights[number]:
            weight.owner._parameters[weight.param] = weight.present if present else weight.absent

    def _locate(self) -> tuple[tuple[Path, ...], list[dict[str, Segment]]]:
        """The shards, and per layer where each weight is: in what the loader converted, else in the checkpoint."""
        checkpoint, shards = self._checkpoint, self._checkpoint.shards
        sources = {name: self._sources[name] for name in self.names if name in self._sources}
        segments = {name: checkpoint.segment(tensor) for name, tensor in sources.items()}
        if os.listdir(self.folder):
            converted = Checkpoint.open(self.folder)
            for name in converted.tensors:
                segment = converted.segment(name)
                segments[name] = replace(segment, shard=len(shards) + segment.shard)
            shards = (*shards, *converted.shards)
        missing = sorted(self.names - segments.keys())
        if missing:
            raise MissingTensorError(
                f"{checkpoint.folder}: no tensor of the checkpoint becomes {missing[0]!r}; complete the download"
            )
        return shards, [{name: segments[name] for name in layer.shapes} for layer in self._layers]


def _weight(model: nn.Module, name: str, view: torch.Tensor) -> _Weight:
    owner, _, param = name.rpartition(".")
    absent = nn.Parameter(torch.empty_like(view, device="meta"), requires_grad=False)
    return _Weight(model.get_submodule(owner), param, absent, nn.Parameter(view, requires_grad=False))


class HostImages:
    """Layers, counted from 0, in host memory, each laid out as on the device: one copy per fetch, bound by the link.

    The memory is pinned in the background if the backend can pin. When a fetch returns, the bytes are safe to use on
    the device's current stream.
    """

    def __init__(
        self, layouts: Sequence[ExpertLayout], weights: Sequence[Mapping[str, torch.Tensor]], backend: Backend
    ) -> None:
        """Copy `weights` (per layer, by the names of its layout) to host memory.

        Raises:
            CapacityError: there is not enough host memory.
        """
        self._backend, self._copied = backend, backend.event()
        self._sizes = [layout.nbytes for layout in layouts]
        self._images = HostBuffers(
            len(layouts), max(self._sizes), pinning=backend, later=True, on_refusal=self._say_pinned
        )
        try:
            for i, (layout, tensors) in enumerate(zip(layouts, weights, strict=True)):
                for name, view in layout.views(self._images.tensor(i)[: layout.nbytes]).items():
                    view.copy_(tensors[name])
                self._images.filled(i)
        except BaseException:
            self._images.close()
            raise

    def fetch(self, layer: int, memory: torch.Tensor, views: Mapping[str, torch.Tensor]) -> None:
        """Copy a layer to device memory, uint8 [bytes of its layout]. views: its weights in that memory, by name."""
        try:  # the image never changes, so only the device has to wait for the copy
            memory.copy_(self._images.tensor(layer)[: self._sizes[layer]], non_blocking=self._images.pinned(layer))
        finally:  # Ctrl-C may come in between, and `close` waits for the event
            self._copied.record(self._backend.compute)

    def close(self) -> None:
        """Wait for the last copy and release the memory; idempotent."""
        self._copied.synchronize()
        self._images.close()

    def _say_pinned(self, pinned: int, total: int) -> None:
        logger.warning(
            "only %d of %d offloaded dense layers in RAM could be pinned for %s: copies of the others are slower and "
            "hold computing up. A higher limit of the system avoids it.",
            pinned,
            total,
            self._backend.device,
        )


class ShardTensors:
    """Layers, counted from 0, in safetensors shards, read tensor by tensor through one staging buffer.

    A fetch is one read and one copy per tensor, bound by the disk; no file is mapped. The copy casts a tensor that is
    stored in another dtype.
    """

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
        """Copy a layer to the device, as `HostImages.fetch`."""
        for j in range(self._count[layer]):
            key = ExpertKey(layer, j)
            name, segment = self._segments[key]
            self._store.read_into(key, self._memory)
            # blocking, because the next tensor is read into the same buffer
            views[name].copy_(typed(self._store.segments(key, self._tensor)[0], segment.dtype, segment.shape))

    def close(self) -> None:
        self._store.close()
        self._staging.close()
