"""A dense checkpoint's experts as int4 or int8 in compressed-tensors' layout pack-quantized: names, order, config.

Nothing moves here. Experts get the names that they have in the dense checkpoint, one matrix each, and everything else
stays as it is, so that what loads the dense checkpoint loads the packed one: transformers' own renamings for offmoe,
compressed-tensors for others. The plan is made from headers, complete with sizes and offsets, and tried on the catalog
before a byte is written. On disk an expert is one run of bytes, its matrices one behind the other.

What it must never do: write a config that claims something else than the tensors are, or names that load as something
else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.hf.adapters import find_experts
from offmoe.hf.catalog import CatalogLayer, ExpertCatalog, build_catalog
from offmoe.hf.load import build_meta, model_class
from offmoe.runtime.checkpoint import Checkpoint, TensorInfo
from offmoe.runtime.formats import Part, Segment
from offmoe.runtime.packing import PackedWeight, WeightFormat
from offmoe.runtime.quantized import PackedInt
from offmoe.runtime.shards import NewTensor, head_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SCALE_DTYPES = {torch.float64: torch.float32}
"""Scales are of the weights' dtype, which decoding computes in; nobody reads double ones."""

FLIPPED = {4: 0, 8: -0x7F7F7F80}
"""Xor of a word: codes at rest have 2**(bits - 1) added; ours of int4 have it already, of int8 not (0x80808080)."""


@dataclass(frozen=True)
class Item:
    """A tensor `source` of the dense checkpoint and those that it becomes. how: None if it is copied.

    layer: the MoE layer it belongs to, counted as the catalog does.
    """

    source: str
    tensors: tuple[NewTensor, ...]
    how: WeightFormat | None = None
    layer: int | None = None

    @property
    def nbytes(self) -> int:
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


def plan_shards(catalog: ExpertCatalog, how: WeightFormat, shard_bytes: int) -> tuple[NewShard, ...]:
    """Shards of at most `shard_bytes` bytes of tensors, or of one expert: all that is copied first, then the experts.

    how: scales become the dtype of the weights. Raises UnsupportedModelError for experts that are not stored one matrix
    at a time, or whose shape is no multiple of tiles and groups.
    """
    checkpoint = catalog.view.checkpoint
    experts = [_expert_items(checkpoint, layer, i, how) for i, layer in enumerate(catalog.layers)]
    quantised: dict[str, list[Item]] = {}
    seen: set[str] = set()
    for expert in (expert for layer in experts for expert in layer):
        new = [item for item in expert if item.source not in seen]  # several modules may share one list of experts
        if new:
            quantised[new[0].source] = new
            seen.update(item.source for item in new)
    copied = [
        Item(name, (NewTensor(name, info.dtype, info.shape),))
        for name, info in checkpoint.tensors.items()
        if name not in seen
    ]
    groups = [
        # the widest dtype first keeps all of a shard aligned
        *_filled([[item] for item in sorted(copied, key=lambda i: -i.tensors[0].dtype.itemsize)], shard_bytes),
        *_filled(list(quantised.values()), shard_bytes),
    ]
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


def _expert_items(checkpoint: Checkpoint, layer: CatalogLayer, number: int, how: WeightFormat) -> list[list[Item]]:
    parts = layer.assembly.parts
    if layer.assembly.convert is not None:
        raise _refusal(checkpoint, layer, "interleaves the rows of its matrices")
    return [
        [
            _item(checkpoint, layer, number, segment, part, how)
            for segment, part in zip(record.segments, parts, strict=True)
            if len(segment.shape) > 1  # biases stay as they are
        ]
        for record in layer.records
    ]


def _item(
    checkpoint: Checkpoint, layer: CatalogLayer, number: int, segment: Segment, part: Part, how: WeightFormat
) -> Item:
    name = segment.name
    if checkpoint.tensors[name].shape != segment.shape:
        raise _refusal(checkpoint, layer, f"holds all of them in one tensor, {name!r}")
    if part.transposed:
        raise _refusal(checkpoint, layer, f"stores {name!r} transposed")
    if len(segment.shape) != 2 or not name.endswith(".weight"):
        raise _refusal(checkpoint, layer, f"has {name!r}, which is not the matrix of a linear layer")
    how = WeightFormat(how.kind, how.group, how.zero_points, SCALE_DTYPES.get(segment.dtype, segment.dtype))
    rows, cols = segment.shape
    how.check(f"{checkpoint.folder}: {name}", rows, cols)
    groups = how.groups(cols)
    tensors = [
        NewTensor(f"{name}_packed", torch.int32, (rows, cols // how.word_values)),
        NewTensor(f"{name}_scale", how.scale_dtype, (rows, groups)),
        NewTensor(f"{name}_shape", torch.int64, (2,)),
    ]
    if how.zero_points:
        tensors.insert(2, NewTensor(f"{name}_zero_point", torch.int32, (rows // how.word_values, groups)))
    return Item(name, tuple(tensors), how, number)


def _refusal(checkpoint: Checkpoint, layer: CatalogLayer, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{checkpoint.folder}: the experts of {layer.name!r} cannot be packed, because the checkpoint {why}; only "
        "experts with matrices of their own can be (for most architectures transformers writes these with "
        "save_pretrained(save_original_format=True))"
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


def codec(how: WeightFormat) -> PackedInt:
    """What will read a weight of this format."""
    return PackedInt(how.bits, how.group, symmetric=not how.zero_points)


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
    folder: Path, shards: Sequence[NewShard], config: PretrainedConfig, quantisation: dict[str, object]
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
    config.quantization_config = quantisation
    try:
        build_catalog(checkpoint, build_meta(config, model_class(config)))
    except CheckpointError as error:
        raise UnsupportedModelError(
            f"the experts of this model cannot be packed: once they are, they would not load ({error})"
        ) from error
    return checkpoint
