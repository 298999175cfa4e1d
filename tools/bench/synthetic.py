"""Checkpoints of Mixtral's and Qwen3's shape and names with random weights, for benchmarks that no published model
fits: in bf16, or packed as `offmoe pack` writes them without a dense checkpoint to pack."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import save_file

from offmoe.storage.checkpoint import INDEX_FILE, Checkpoint
from offmoe.storage.shard_writer import NewTensor, head_of, octets, write_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from offmoe.pack.plan import NewShard
    from offmoe.quant.packed_weight import WeightFormat

EXPERTS_PER_SHARD = 2
SPREAD = 65536
MIXTRAL_EXPERT, MIXTRAL_PARTS = "block_sparse_moe.experts.{}.{}", ("w1", "w2", "w3")
QWEN3_EXPERT, QWEN3_PARTS = "mlp.experts.{}.{}", ("gate_proj", "down_proj", "up_proj")
NAMES = {"mixtral": (MIXTRAL_EXPERT, MIXTRAL_PARTS), "qwen3_moe": (QWEN3_EXPERT, QWEN3_PARTS)}
"""Model type -> the name of an expert's weight in a layer, from its number and a part; the parts gate, down, up."""
INT4_DEVIATION = 4.6
"""Standard deviation of evenly drawn int4 values."""


def write_mixtral(
    folder: Path, hidden: int, intermediate: int, *, layers: int, experts: int, top_k: int, vocabulary: int
) -> None:
    """Write a checkpoint in bf16 with Mixtral's names, shard by shard, and sync it to disk."""
    config = mixtral_config(hidden, intermediate, layers, experts, top_k, vocabulary)
    _write(folder, config, hidden, intermediate, layers, experts, MIXTRAL_EXPERT, MIXTRAL_PARTS)


def mixtral_config(
    hidden: int, intermediate: int, layers: int, experts: int, top_k: int, vocabulary: int
) -> PretrainedConfig:
    """A configuration of Mixtral's architecture: heads of 128, four query heads per key."""
    from transformers import MixtralConfig

    heads = max(2, hidden // 128)
    return MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )


def write_qwen3(
    folder: Path, hidden: int, intermediate: int, *, layers: int, experts: int, top_k: int, vocabulary: int
) -> None:
    """As `write_mixtral`, with Qwen3's names. Every layer has experts."""
    config = qwen3_config(hidden, intermediate, layers, experts, top_k, vocabulary)
    _write(folder, config, hidden, intermediate, layers, experts, QWEN3_EXPERT, QWEN3_PARTS)


def qwen3_config(
    hidden: int, intermediate: int, layers: int, experts: int, top_k: int, vocabulary: int, heads: int | None = None
) -> PretrainedConfig:
    """A configuration of Qwen3's architecture: heads of 128, four query heads per key; heads: query heads."""
    from transformers import Qwen3MoeConfig

    heads = heads or max(2, hidden // 128)
    return Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        moe_intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=128,  # type: ignore[call-arg]  # a field of the configuration, though not of its signature
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )


def _write(
    folder: Path,
    config: PretrainedConfig,
    hidden: int,
    intermediate: int,
    layers: int,
    experts: int,
    names: str,
    parts: tuple[str, str, str],
) -> None:
    """names: gives the name of an expert's weight in a layer, from its number and a part. parts: gate, down, up."""
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config).state_dict()
    dense = {}
    for name, weight in skeleton.items():
        if "experts" not in name:
            value = torch.ones(weight.shape) if weight.ndim == 1 else torch.randn(weight.shape) * hidden**-0.5
            dense[name] = value.bfloat16()
    weight_map = dict.fromkeys(dense, "dense.safetensors")
    _save(dense, folder / "dense.safetensors")
    # One random array; every tensor is a window of it that begins elsewhere: drawing them all would take minutes.
    drawn = (torch.randn(hidden * intermediate + SPREAD) * hidden**-0.5).bfloat16()
    tensors: dict[str, torch.Tensor] = {}
    number = 0
    for layer in range(layers):
        for expert in range(experts):
            for i, part in enumerate(parts, 1):
                start = 997 * (3 * (layer * experts + expert) + i) % SPREAD
                shape = (hidden, intermediate) if i == 2 else (intermediate, hidden)
                name = f"model.layers.{layer}.{names.format(expert, part)}.weight"
                tensors[name] = drawn[start : start + hidden * intermediate].clone().view(shape)
            if (expert + 1) % EXPERTS_PER_SHARD == 0 or expert == experts - 1:
                file = f"experts-{number:03d}.safetensors"
                _save(tensors, folder / file)
                weight_map |= dict.fromkeys(tensors, file)
                tensors, number = {}, number + 1
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_sparse(folder: Path, config: PretrainedConfig) -> None:
    """Write a bf16 checkpoint that has headers alone: its tensors are holes in the file, which read as zeros."""
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config).state_dict()
    tensors = [NewTensor(name, torch.bfloat16, tuple(w.shape)) for name, w in skeleton.items() if "experts" not in name]
    wide, high = (config.intermediate_size, config.hidden_size), (config.hidden_size, config.intermediate_size)
    expert_name, parts = NAMES[config.model_type]
    weight_map = dict.fromkeys((t.name for t in tensors), _save_hole(folder / "dense.safetensors", tensors))
    for layer in range(config.num_hidden_layers):
        tensors = [
            NewTensor(f"model.layers.{layer}.{expert_name.format(expert, part)}.weight", torch.bfloat16, shape)
            for expert in range(num_experts(config))
            for part, shape in zip(parts, (wide, high, wide), strict=True)
        ]
        file = _save_hole(folder / f"experts-{layer:03d}.safetensors", tensors)
        weight_map |= {tensor.name: file for tensor in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def num_experts(config: PretrainedConfig) -> int:
    """Experts per layer, by either name."""
    return int(getattr(config, "num_local_experts", None) or config.num_experts)


class Qwen3Shape(NamedTuple):
    """A model of Qwen3's architecture in bf16."""

    hidden: int
    intermediate: int
    layers: int
    experts: int
    top_k: int
    vocabulary: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return 6 * self.hidden * self.intermediate


def write_sparse_qwen3(folder: Path, shape: Qwen3Shape) -> None:
    """Write a bf16 checkpoint of Qwen3's names whose experts are holes in files, which read as zeros.

    Nothing but headers and the dense part is written, so a model of any size takes seconds. Embeddings and routers are
    random, so tokens are routed to different experts; all other matrices are zeros too.
    """
    from transformers import AutoModelForCausalLM

    config = qwen3_config(*shape)
    write_sparse(folder, config)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config).state_dict()
    dense = {}
    for name, weight in skeleton.items():
        if "experts" not in name:
            is_random = any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate"))
            fill = torch.randn if is_random else torch.ones if weight.ndim == 1 else torch.zeros
            dense[name] = (fill(weight.shape) * (shape.hidden**-0.5 if is_random else 1.0)).bfloat16()
    _save(dense, folder / "dense.safetensors")


def _save_hole(file: Path, tensors: list[NewTensor], head: bytes | None = None) -> str:
    """A shard without bytes behind its header, which is `head` if that is given. Returns its name."""
    head = head_of(tensors) if head is None else head
    with open(file, "wb") as out:
        out.write(head)
        out.truncate(len(head) + sum(tensor.nbytes for tensor in tensors))
    return file.name


def write_packed(
    folder: Path,
    config: PretrainedConfig,
    how: WeightFormat,
    scratch: Path,
    *,
    sparse: bool = False,
    tiles: bool = False,
) -> None:
    """Write a checkpoint with quantized experts of random words, in the layout of `offmoe pack`.

    The dense checkpoint that it would be packed from, four times as large, never exists: a plan needs headers alone.

    Args:
        folder: to write to.
        config: of Mixtral's or Qwen3's architecture.
        how: the experts' format.
        scratch: a folder for the headers.
        sparse: write headers alone, as `write_sparse` does.
        tiles: with experts in the order of the kernels, as `offmoe pack --layout tiles`.
    """
    from offmoe.hf.catalog.build import build_catalog
    from offmoe.hf.load.config import build_meta, model_class
    from offmoe.pack.pack import SHARD_BYTES
    from offmoe.pack.plan import plan_shards, quantization_config

    source = scratch / f"{folder.name}-headers"
    write_sparse(source, config)
    meta = build_meta(config, model_class(config))
    catalog = build_catalog(Checkpoint.open(source), meta)
    folder.mkdir(parents=True)
    shards = plan_shards(catalog, meta, how, SHARD_BYTES, tiles)
    drawn = None if sparse else _Drawn(config)
    for shard in shards:
        if drawn is None:
            _save_hole(folder / shard.file, shard.tensors, shard.head)
        else:
            write_file(folder / shard.file, drawn.pieces(shard))
            _drop(folder / shard.file)
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    values = json.loads((source / "config.json").read_text())
    values["quantization_config"] = quantization_config(catalog, meta, how, tiles)
    (folder / "config.json").write_text(json.dumps(values, indent=2))


class _Windows:
    """Random tensors: windows of one random array that each begin elsewhere. Drawing them all would take minutes."""

    def __init__(self, drawn: torch.Tensor):
        self._drawn, self._number = drawn, 0

    def next(self, shape: tuple[int, ...]) -> torch.Tensor:
        self._number += 1
        start = 997 * self._number % SPREAD
        return self._drawn[start : start + math.prod(shape)].view(shape)


def _words(count: int) -> torch.Tensor:
    """Random int4 words without the value -8: with it the mean is not 0, and experts push every residual one way."""
    pairs = torch.randint(1, 16, (count, 4, 2), dtype=torch.uint8)
    return (pairs[..., 0] | pairs[..., 1] << 4).view(torch.int32).view(-1)


class _Drawn:
    """Random weights of a packed checkpoint: words, scales that give them the usual deviation, dense weights."""

    def __init__(self, config: PretrainedConfig):
        matrix, deviation = config.intermediate_size * config.hidden_size, config.hidden_size**-0.5
        self._words = _Windows(_words(matrix // 8 + SPREAD))
        drawn = torch.rand(matrix // 16 + SPREAD) + 0.5
        self._scales = _Windows((drawn * deviation / INT4_DEVIATION).bfloat16())
        self._dense = _Windows((torch.randn(config.vocab_size * config.hidden_size + SPREAD) * deviation).bfloat16())

    def pieces(self, shard: NewShard) -> Iterator[bytes | memoryview]:
        """The bytes of a shard, in order."""
        yield shard.head
        for item in shard.items:
            if item.how is None:
                (tensor,) = item.tensors
                is_norm = len(tensor.shape) == 1
                yield octets(torch.ones(tensor.shape).bfloat16() if is_norm else self._dense.next(tensor.shape))
                continue
            for tensor in item.tensors:
                if tensor.dtype == torch.int32:
                    yield octets(self._words.next(tensor.shape))
                elif tensor.dtype == torch.bfloat16:
                    yield octets(self._scales.next(tensor.shape))
                elif tensor.dtype == torch.int64:
                    yield octets(torch.tensor(item.source.shape))
                else:
                    yield bytes(tensor.nbytes)  # what aligns tiles


def _drop(file: Path) -> None:
    """Drop a file that is on the disk from the page cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as written:
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    with open(file, "rb+") as written:
        os.fsync(written.fileno())  # a page that is not on the disk yet cannot be dropped from the cache
    _drop(file)
