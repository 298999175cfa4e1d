"""A dense checkpoint's experts as int4 or int8 in compressed-tensors' layout pack-quantized: names, order, config.

Nothing moves here. Experts get the names of the architecture's published checkpoints, one matrix each, and everything
else stays as it is, so that what loads the dense checkpoint loads the packed one: transformers' renamings for offmoe,
compressed-tensors for others. The plan is made from headers, complete with sizes and offsets, and tried on the catalog
before a byte is written. On disk an expert is one run of bytes, its matrices one behind the other.

What it must never do: write a config that claims something else than the tensors are, or names that load as something
else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.hf.adapters.find import find_experts
from offmoe.hf.catalog.build import build_catalog
from offmoe.hf.catalog.catalog import CatalogLayer, ExpertCatalog
from offmoe.hf.load.load import build_meta, model_class
from offmoe.hf.upstream import expert_names
from offmoe.quant.packed_weight import PackedWeight, WeightFormat
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.header import TensorInfo
from offmoe.storage.layout import Destination, Segment
from offmoe.storage.shard_writer import NewTensor, head_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SCALE_DTYPES = {torch.float64: torch.float32}
"""Scales are of the weights' dtype, which decoding computes in; nobody reads double ones."""

FLIPPED = {4: 0, 8: -0x7F7F7F80}
"""Xor of a word: codes at rest have 2**(bits - 1) added; ours of int4 have it already, of int8 not (0x80808080)."""


@dataclass(frozen=True)
class Item:
    """Bytes of the dense checkpoint and the tensors that they become. how: None if they are copied.

    name: of the tensor, or that an expert's matrix has where every expert has tensors of its own. layer: the MoE layer
    it belongs to, counted as the catalog does.
    """

    name: str
    source: Segment
    tensors: tuple[NewTensor, ...]
    how: WeightFormat | None = None
    layer: int | None = None

    @property
    def nbytes(self) -> int:
        """Of the new tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


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
        """Its bytes up to the first tensor."""
        return head_of(self.tensors)

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return len(self.head) + sum(item.nbytes for item in self.items)


def plan_shards(
    catalog: ExpertCatalog, meta: PreTrainedModel, how: WeightFormat, shard_bytes: int
) -> tuple[NewShard, ...]:
    """Shards of at most `shard_bytes` bytes of tensors, or of one expert: all that is copied first, then the experts.

    how: scales become the dtype of the weights. Raises UnsupportedModelError for experts that are neither stored one
    matrix at a time nor can be cut into such, or whose shape is no multiple of tiles and groups.
    """
    checkpoint = catalog.view.checkpoint
    experts: list[list[Item]] = []
    names: set[str] = set()
    for number, layer in enumerate(catalog.layers):
        for items in _Cut(checkpoint, meta, layer, number, how).experts():
            new = [item for item in items if item.name not in names]  # several modules may share one list of experts
            experts.append(new)
            names.update(item.name for item in new)
    quantized = {item.source.name for expert in experts for item in expert}
    copied = [
        [Item(name, checkpoint.segment(name), (NewTensor(name, info.dtype, info.shape),))]
        # the widest dtype first keeps all of a shard aligned
        for name, info in sorted(checkpoint.tensors.items(), key=lambda entry: -entry[1].dtype.itemsize)
        if name not in quantized
    ]
    groups = [*_filled(copied, shard_bytes), *_filled(experts, shard_bytes)]
    return tuple(
        NewShard(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    )


def _filled(units: Sequence[Sequence[Item]], shard_bytes: int) -> Iterator[list[Item]]:
    """Units that stay together, in shards."""
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
    """Cuts the experts of one layer into matrices of linear layers."""

    checkpoint: Checkpoint
    meta: PreTrainedModel
    layer: CatalogLayer
    number: int
    how: WeightFormat

    def experts(self) -> list[list[Item]]:
        parts = self.layer.assembly.destinations
        if self.layer.assembly.convert is not None:
            raise self._refusal("rearranges the rows of their matrices when it is loaded")
        names = {part.param: expert_names(self.meta, f"{self.layer.name}.{part.param}") for part in parts}
        return [
            [
                self._item(name, source)
                for segment, part in zip(record.segments, parts, strict=True)
                if len(segment.shape) > 1  # biases stay as they are
                for name, source in self._matrices(segment, part, expert, names[part.param])
            ]
            for expert, record in enumerate(self.layer.records)
        ]

    def _matrices(
        self, segment: Segment, part: Destination, expert: int, names: tuple[str, ...] | None
    ) -> Iterator[tuple[str, Segment]]:
        if part.transposed:
            raise self._refusal(f"has {segment.name!r} transposed")
        if self.checkpoint.tensors[segment.name].shape == segment.shape:
            yield segment.name, segment
            return
        if names is None or len(segment.shape) != 2 or segment.shape[0] % len(names):
            raise self._refusal(f"has all of them in {segment.name!r}, and there are no names for single ones")
        rows, nbytes = segment.shape[0] // len(names), segment.nbytes // len(names)
        for i, name in enumerate(names):
            offset = segment.offset + i * nbytes
            shape = (rows, segment.shape[1])
            yield (
                name.replace("*", str(expert)),
                Segment(segment.shard, offset, nbytes, segment.dtype, shape, segment.name),
            )

    def _item(self, name: str, source: Segment) -> Item:
        if len(source.shape) != 2 or not name.endswith(".weight"):
            raise self._refusal(f"has {name!r}, which is not the matrix of a linear layer")
        how = replace(self.how, scale_dtype=SCALE_DTYPES.get(source.dtype, source.dtype))
        rows, cols = source.shape
        how.check(f"{self.checkpoint.folder}: {name}", rows, cols)
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


def encode(packed: PackedWeight) -> list[torch.Tensor]:
    """A weight row by row as the tensors of its `Item`, in that order."""
    how, rows = packed.format, packed.rows
    out = [packed.words ^ FLIPPED[how.bits], packed.scales, torch.tensor([rows, packed.cols])]
    if packed.zeros is not None:
        pairs = packed.zeros.mT.contiguous().view(packed.zeros.shape[1], -1, 2)  # [groups, rows / 2, 2]
        words = (pairs[..., 0] | pairs[..., 1] << 4).view(torch.int32)  # [groups, rows / 8]
        out.insert(2, words.mT.contiguous())
    return out


def raw_parts(item: Item, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of `encode` by what the codec calls them."""
    names = (tensor.name.removeprefix(f"{item.name}_") for tensor in item.tensors)
    return {name.removesuffix("_point"): made for name, made in zip(names, tensors, strict=True)}


def quantization_config(catalog: ExpertCatalog, meta: PreTrainedModel, how: WeightFormat) -> dict[str, object]:
    """What config.json has to say. ignore: every linear layer that is not an expert's, by the names that it has in the
    checkpoint and in the model.
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
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(matrices | {name for name in linear if not name.startswith(inside)}),
        "kv_cache_scheme": None,
    }


def check_loads(
    folder: Path, shards: Sequence[NewShard], config: PretrainedConfig, quantization: dict[str, object]
) -> Checkpoint:
    """The checkpoint that is about to be written, by its headers; UnsupportedModelError if it would not load."""
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
        build_catalog(checkpoint, build_meta(config, model_class(config)))
    except CheckpointError as error:
        raise UnsupportedModelError(
            f"the experts of this model cannot be packed: once they are, they would not load ({error})"
        ) from error
    return checkpoint
