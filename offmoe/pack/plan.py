"""Plans a packed checkpoint: names, order and bytes of its tensors, and its config.

The layout is compressed-tensors' pack-quantized. Each expert matrix gets the name it has in the architecture's
published checkpoints, and everything else is copied, so whatever loads the dense checkpoint loads the packed one:
offmoe through transformers' renamings, other programs through compressed-tensors. The plan follows from headers alone,
with all sizes and offsets, and a catalog is built from it before a byte is written. On disk an expert is one run of
bytes, one matrix after the other; with `tiles` that run is in the order of the CPU's kernels (tiles.py), which only
offmoe reads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.hf.adapters.find import find_experts
from offmoe.hf.catalog.build import build_catalog
from offmoe.hf.catalog.catalog import CatalogLayer, ExpertCatalog
from offmoe.hf.load.config import build_meta, model_class
from offmoe.hf.upstream import expert_names
from offmoe.pack.tiles import decode_tiles, encode_tiles, end_on_page, tile_tensors
from offmoe.quant.int_formats import SIGN_BITS, TILES_FORMAT
from offmoe.quant.packed_weight import PackedWeight, WeightFormat
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import Destination, Segment, TensorInfo
from offmoe.storage.read_plan import ALIGNMENT
from offmoe.storage.shard_writer import NewTensor, head_of

SCALE_DTYPES = {torch.float64: torch.float32}
"""Weights' dtypes whose scales get another dtype. Decoding computes in the scales' dtype, and no reader takes float64.
"""

FLIPPED = {4: 0, 8: SIGN_BITS}
"""What a word is xored with by its bits. Codes at rest have 2**(bits - 1) added, which `PackedWeight` has for int4 but
not for int8."""


@dataclass(frozen=True)
class Item:
    """One tensor, or one expert's matrix, of the dense checkpoint, and the tensors that it becomes.

    Args:
        name: the tensor's name; for an expert's matrix, its name in a checkpoint with one tensor per expert.
        source: its bytes in the dense checkpoint.
        tensors: the tensors of the packed checkpoint.
        how: the format to quantize to; None if the bytes are copied.
        layer: index of the expert's MoE layer in the catalog; None if the bytes are copied.
        tiles: whether the new tensors are in the order of the kernels.
    """

    name: str
    source: Segment
    tensors: tuple[NewTensor, ...]
    how: WeightFormat | None = None
    layer: int | None = None
    tiles: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the new tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def encode(self, packed: PackedWeight) -> dict[str, torch.Tensor]:
        """The new tensors, in their order. packed: the item's weight, row by row."""
        return encode_tiles(packed, self.name, self.tensors) if self.tiles else encode(packed)

    def decode(self, written: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What `encode` gave, by the names and in the order of compressed-tensors, for the loss to be measured on."""
        assert self.how is not None
        return encode(decode_tiles(written, self.name, self.how)) if self.tiles else written


@dataclass(frozen=True)
class NewShard:
    """One file of the packed checkpoint."""

    file: str
    items: tuple[Item, ...]

    @property
    def tensors(self) -> list[NewTensor]:
        return [tensor for item in self.items for tensor in item.tensors]

    @property
    def head(self) -> bytes:
        """The file's bytes up to its first tensor, which stands on a page if it is of an extent."""
        return head_of(self.tensors, ALIGNMENT if any(item.tiles for item in self.items) else 8)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.head) + sum(item.nbytes for item in self.items)


def plan_shards(
    catalog: ExpertCatalog, meta: PreTrainedModel, how: WeightFormat, shard_bytes: int, tiles: bool = False
) -> tuple[NewShard, ...]:
    """The shards of the packed checkpoint: first what is copied, then the experts.

    Args:
        catalog: the dense checkpoint's experts.
        meta: its model on the meta device.
        how: the experts' format. Scales get the dtype of the weights.
        shard_bytes: the most bytes of tensors in a shard; a shard of one larger expert exceeds it.
        tiles: whether experts stand in the order of the kernels.

    Raises:
        UnsupportedModelError: experts cannot be cut into matrices of linear layers, or the format cannot hold them.
    """
    checkpoint = catalog.view.checkpoint
    experts: list[list[Item]] = []
    names: set[str] = set()
    for number, layer in enumerate(catalog.layers):
        for items in _Cut(checkpoint, meta, layer, number, how, tiles).experts():
            new = [item for item in items if item.name not in names]  # modules may share one list of experts
            experts.append(new)
            names.update(item.name for item in new)
    quantized = {item.source.name for expert in experts for item in expert}
    copied = [
        [Item(name, checkpoint.segment(name), (NewTensor(name, info.dtype, info.shape),))]
        # Sorted by dtype, the widest first, every tensor of a shard is aligned.
        for name, info in sorted(checkpoint.tensors.items(), key=lambda entry: -entry[1].dtype.itemsize)
        if name not in quantized
    ]
    groups = [*_filled(copied, shard_bytes), *_filled(experts, shard_bytes)]
    return tuple(
        NewShard(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    )


def check_packable(catalog: ExpertCatalog, meta: PreTrainedModel, how: WeightFormat) -> None:
    """Refuse experts that cannot be packed, by one expert of the first and of the last MoE layer.

    Raises:
        UnsupportedModelError: as `plan_shards`, which looks at every expert.
    """
    for number in {0, len(catalog.layers) - 1}:
        layer = catalog.layers[number]
        one = replace(layer, records=layer.records[:1])
        _Cut(catalog.view.checkpoint, meta, one, number, how).experts()


def _filled(units: Sequence[Sequence[Item]], shard_bytes: int) -> Iterator[list[Item]]:
    """Fill shards with units; a unit is not cut."""
    shard: list[Item] = []
    size = 0
    for unit in units:
        nbytes = sum(item.nbytes for item in unit)
        if shard and size + nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.extend(unit)
        size += nbytes
    if shard:
        yield shard


@dataclass(frozen=True)
class _Cut:
    """Cuts the experts of one layer, index `number` in the catalog, into matrices of linear layers."""

    checkpoint: Checkpoint
    meta: PreTrainedModel
    layer: CatalogLayer
    number: int
    how: WeightFormat
    tiles: bool = False

    def experts(self) -> list[list[Item]]:
        """The matrices of each expert."""
        experts = self._experts()
        if self.tiles:
            for items in experts:
                tensors = end_on_page(items[-1].tensors, sum(item.nbytes for item in items))
                items[-1] = replace(items[-1], tensors=tensors)
        return experts

    def _experts(self) -> list[list[Item]]:
        destinations = self.layer.assembly.destinations
        if self.layer.assembly.convert is not None:
            raise self._refusal("rearranges the rows of their matrices when it is loaded")
        names = {to.param: expert_names(self.meta, f"{self.layer.name}.{to.param}") for to in destinations}
        return [
            [
                self._item(name, source)
                for segment, to in zip(record.segments, destinations, strict=True)
                if len(segment.shape) > 1  # biases stay as they are
                for name, source in self._matrices(segment, to, expert, names[to.param])
            ]
            for expert, record in enumerate(self.layer.records)
        ]

    def _matrices(
        self, segment: Segment, to: Destination, expert: int, names: tuple[str, ...] | None
    ) -> Iterator[tuple[str, Segment]]:
        """(name, bytes) of the matrices in one segment. names: what they are called, "*" for the expert's number."""
        if to.transposed:
            raise self._refusal(f"has {segment.name!r} transposed")
        if self.checkpoint.tensors[segment.name].shape == segment.shape:
            yield segment.name, segment
            return
        if names is None or len(segment.shape) != 2 or segment.shape[0] % len(names):
            raise self._refusal(f"has all of them in {segment.name!r}, and there are no names for single ones")
        rows, nbytes = segment.shape[0] // len(names), segment.nbytes // len(names)
        for i, name in enumerate(names):
            offset, shape = segment.offset + i * nbytes, (rows, segment.shape[1])
            yield name.replace("*", str(expert)), replace(segment, offset=offset, nbytes=nbytes, shape=shape)

    def _item(self, name: str, source: Segment) -> Item:
        """The tensors that one matrix becomes."""
        if len(source.shape) != 2 or not name.endswith(".weight"):
            raise self._refusal(f"has {name!r}, which is not the matrix of a linear layer")
        how = replace(self.how, scale_dtype=SCALE_DTYPES.get(source.dtype, source.dtype))
        rows, cols = source.shape
        how.check(f"{self.checkpoint.folder}: {name}", rows, cols)
        if self.tiles:
            return Item(name, source, tile_tensors(name, rows, cols, how), how, self.number, tiles=True)
        groups = how.groups(cols)
        tensors = [
            NewTensor(f"{name}_packed", torch.int32, (rows, cols // how.word_values)),
            NewTensor(f"{name}_scale", how.scale_dtype, (rows, groups)),
            NewTensor(f"{name}_shape", torch.int64, (2,)),
        ]
        if how.zero_points:
            tensors.insert(2, NewTensor(f"{name}_zero_point", torch.int32, (rows // how.word_values, groups)))
        return Item(name, source, tuple(tensors), how, self.number)

    def _refusal(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.checkpoint.folder}: the experts of {self.layer.name!r} cannot be packed, because the checkpoint "
            f"{why}; only experts with matrices of their own, rows first, can be. Use a quantized checkpoint of the "
            "model, if there is one"
        )


def encode(packed: PackedWeight) -> dict[str, torch.Tensor]:
    """The tensors of an `Item` in rows, in its order, by the names that the codec has for them.

    packed: the item's weight, row by row.
    """
    out = {"packed": packed.words ^ FLIPPED[packed.format.bits], "scale": packed.scales}
    if packed.zeros is not None:
        pairs = packed.zeros.mT.contiguous().view(packed.zeros.shape[1], -1, 2)  # [groups, rows / 2, 2]
        words = (pairs[..., 0] | pairs[..., 1] << 4).view(torch.int32)  # [groups, rows / 8]
        out["zero"] = words.mT.contiguous()
    return {**out, "shape": torch.tensor([packed.rows, packed.cols])}


def quantization_config(
    catalog: ExpertCatalog, meta: PreTrainedModel, how: WeightFormat, tiles: bool = False
) -> dict[str, object]:
    """The `quantization_config` of the packed checkpoint's config.json.

    Its list "ignore" names every linear layer that is not an expert's, by its names in the checkpoint and in the model.
    """
    inside = tuple(f"{name}." for name in find_experts(meta))
    linear = {name for name, module in meta.named_modules() if isinstance(module, nn.Linear)}
    matrices = {
        name.removesuffix(".weight")
        for name, info in catalog.view.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and name not in catalog.keys
    }
    weights = {
        "num_bits": how.bits,
        "type": "int",
        "symmetric": not how.zero_points,
        "strategy": "channel" if how.group is None else "group",
        "group_size": how.group,
        "dynamic": False,
        "actorder": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": TILES_FORMAT if tiles else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(matrices | {name for name in linear if not name.startswith(inside)}),
        "kv_cache_scheme": None,
    }


def check_loads(
    folder: Path, shards: Sequence[NewShard], config: PreTrainedConfig, quantization: dict[str, object]
) -> ExpertCatalog:
    """Build the catalog of a packed checkpoint before it is written.

    Args:
        folder: where it will be written.
        shards: its shards.
        config: the dense model's config.
        quantization: its `quantization_config`.

    Returns:
        The packed checkpoint's experts, by the headers that its shards will have.

    Raises:
        UnsupportedModelError: it would not load.
    """
    tensors: dict[str, TensorInfo] = {}
    for number, shard in enumerate(shards):
        at = len(shard.head)
        for tensor in shard.tensors:
            tensors[tensor.name] = TensorInfo(number, at, tensor.nbytes, tensor.dtype, tensor.shape)
            at += tensor.nbytes
    checkpoint = Checkpoint(folder, tuple(folder / shard.file for shard in shards), tensors)
    config = copy.deepcopy(config)
    config.quantization_config = quantization
    try:
        return build_catalog(checkpoint, build_meta(config, model_class(config)))
    except CheckpointError as error:
        raise UnsupportedModelError(
            f"the experts of this model cannot be packed: once they are, they would not load ({error})"
        ) from error
