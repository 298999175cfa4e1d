"""What a model will need on the device apart from its experts, worked out on the meta device.

Nothing moves. The KV cache follows from the configuration; where an architecture caches less (sliding windows, linear
attention), this is an upper bound. Must never be below what transformers allocates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from offmoe.budget.device import DenseLayerBytes, ModelBytes
from offmoe.device.arena import PAGE_BYTES
from offmoe.errors import UnsupportedModelError
from offmoe.hf.adapters.find import expert_parameters
from offmoe.hf.catalog.catalog import CatalogLayer, ExpertCatalog
from offmoe.hf.load.dense_layers import DenseLayer
from offmoe.storage.layout import PARAM_ALIGNMENT, ExpertLayout, aligned
from offmoe.storage.read_plan import plan_reads
from offmoe.transfer.staging import staging_plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

UNLIMITED_CONTEXT = 1 << 20
"""Tokens, where the configuration names no limit."""
WORKSPACE_TOKENS = 64
"""Rows whose activations and logits the workspace holds; a longer prefill takes what the KV reserve does not use
yet.
"""


class ExpertBytes(NamedTuple):
    """Bytes of one expert of a layer. read: of the buffer that it is read into; cast: of what computing takes beside
    the slot, such as a copy to compute with.
    """

    at_rest: int
    slot: int
    read: int
    cast: int


def expert_bytes(catalog: ExpertCatalog, dtype: torch.dtype) -> tuple[ExpertBytes, ...]:
    """Of each MoE layer, as the checkpoint's headers have it; computed in `dtype`."""
    return tuple(
        ExpertBytes(
            at_rest=layer.records[0].nbytes,
            slot=aligned(layer.layout.nbytes, PARAM_ALIGNMENT),
            read=max(plan_reads(record).nbytes for record in layer.records),
            cast=_computing_bytes(layer, dtype),
        )
        for layer in catalog.layers
    )


def model_bytes(
    meta_model: PreTrainedModel,
    experts: Sequence[ExpertBytes],
    layers: Sequence[DenseLayer],
    dtype: torch.dtype,
    stored: torch.dtype,
    *,
    unified_memory: bool,
) -> ModelBytes:
    """Bytes of the dense part, of a token of KV cache, of a slot of each layer, of staging and of the workspace.

    layers: those whose weights may leave the device; stored: the dtype of these at rest.
    """
    config = meta_model.config
    buffer_bytes = max(expert.read for expert in experts)
    staging = staging_plan(buffer_bytes).buffers * buffer_bytes if unified_memory else 0
    text = config.get_text_config()
    limit = int(getattr(text, "max_position_embeddings", None) or 0)
    widest = max(int(getattr(text, "vocab_size", 0)), 8 * int(text.hidden_size))
    return ModelBytes(
        dense=dense_bytes(meta_model, dtype),
        kv_per_token=kv_bytes_per_token(config, dtype),
        context_limit=limit if limit > 0 else UNLIMITED_CONTEXT,
        slot_bytes=tuple(expert.slot for expert in experts),
        staging=staging,
        workspace=WORKSPACE_TOKENS * widest * 4 + max(expert.cast for expert in experts),
        layers=tuple(_layer_bytes(layer, dtype, stored if unified_memory else None) for layer in layers),
    )


def _layer_bytes(layer: DenseLayer, dtype: torch.dtype, stored: torch.dtype | None) -> DenseLayerBytes:
    """stored: None if what is read is not on the device."""
    sizes = [torch.Size(shape).numel() for shape in layer.shapes.values()]
    # a window of whole pages, and a page more for where it begins
    reading = 0 if stored is None else aligned(max(sizes) * stored.itemsize, PAGE_BYTES) + PAGE_BYTES
    return DenseLayerBytes(sum(sizes) * dtype.itemsize, layer.layout(dtype).nbytes + PARAM_ALIGNMENT, reading)


def _computing_bytes(layer: CatalogLayer, dtype: torch.dtype) -> int:
    if layer.cpu_slot is not None:
        return layer.cpu_slot.working_bytes()
    return _cast_bytes(layer.layout, dtype) if layer.decode is None else layer.decode.nbytes(dtype)


def _cast_bytes(layout: ExpertLayout, dtype: torch.dtype) -> int:
    """Of one expert in the dtype to compute in, if that is not the checkpoint's."""
    other = [p for p in layout.params if p.dtype != dtype]
    return sum(p.nbytes // p.dtype.itemsize * dtype.itemsize for p in other)


class Parameters(NamedTuple):
    """Numbers of a model: all of its parameters, and those that are not routed experts'."""

    total: int
    dense: int


def count_parameters(meta_model: PreTrainedModel) -> Parameters:
    """Of a model on the meta device; shared ones once."""
    experts = expert_parameters(meta_model)
    sizes = [(name not in experts, p.numel()) for name, p in meta_model.named_parameters()]
    return Parameters(sum(n for _, n in sizes), sum(n for dense, n in sizes if dense))


def dense_bytes(meta_model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Parameters and buffers that are not experts', shared ones once; floating point ones in `dtype`."""
    experts = expert_parameters(meta_model)
    params = [t for name, t in meta_model.named_parameters() if name not in experts]
    size = sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in params)
    # the loader casts some buffers and leaves others, such as the frequencies of rotary embeddings, as they were made
    return size + sum(t.numel() * max(dtype.itemsize, t.element_size()) for t in meta_model.buffers())


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of all layers of one token.

    With an encoder, a token of either side: the decoder's layers cache their own tokens and, for cross attention, the
    encoder's.
    """
    if config.is_encoder_decoder:
        heads = int(getattr(config, "decoder_attention_heads", None) or config.num_attention_heads)
        head = int(getattr(config, "d_kv", None) or config.hidden_size // heads)
        return _layers_of(config, "decoder") * 2 * heads * head * dtype.itemsize
    return sum(_cached_elements(layer) for layer in config.get_text_config().per_layer_config) * dtype.itemsize


def _cached_elements(layer: PretrainedConfig) -> int:
    """Of one token in one decoder layer; layers may differ."""
    heads = int(layer.num_attention_heads)
    head = int(getattr(layer, "head_dim", None) or layer.hidden_size // heads)
    if getattr(layer, "kv_lora_rank", None):  # multi-head latent attention: transformers caches expanded keys, values
        key = int(layer.qk_nope_head_dim) + int(layer.qk_rope_head_dim)
        return heads * (key + int(layer.v_head_dim))
    kv_heads = int(getattr(layer, "num_key_value_heads", None) or heads)
    return kv_heads * (head + int(getattr(layer, "v_head_dim", None) or head))


def num_layers(config: PretrainedConfig) -> int:
    """Layers of the text part; of encoder and decoder together."""
    if config.is_encoder_decoder:
        return _layers_of(config, "encoder") + _layers_of(config, "decoder")
    return int(config.get_text_config().num_hidden_layers)


def _layers_of(config: PretrainedConfig, side: str) -> int:
    for name in (f"{side}_layers", f"num_{side}_layers", "num_layers", "num_hidden_layers"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise UnsupportedModelError(f"config.json of model type {config.model_type!r} does not say how many layers it has")
