"""What a model needs, worked out on the meta device: the bytes of its dense part, KV cache, experts and workspace.

The KV cache follows from the configuration. Where an architecture caches less (sliding windows, linear attention), the
figure is an upper bound. No figure may be below what transformers allocates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from offmoe.budget.forward_pass import FEW_TOKENS, PassBytes, pass_bytes
from offmoe.device.pages import PAGE_BYTES
from offmoe.errors import UnsupportedModelError
from offmoe.hf.adapters.find import expert_parameters
from offmoe.hf.catalog.catalog import CatalogLayer, ExpertCatalog
from offmoe.hf.catalog.stored_dense import StoredWeight
from offmoe.hf.load.dense_layers import DenseLayer, dense_layers
from offmoe.hf.load.kernel_linears import saved_bytes
from offmoe.storage.layout import PARAM_ALIGNMENT, aligned
from offmoe.storage.read_plan import plan_reads
from offmoe.transfer.staging import staging_plan
from offmoe.types import CacheShape

UNLIMITED_CONTEXT = 1 << 20
"""The context limit in tokens of a model whose configuration names none."""


class ExpertBytes(NamedTuple):
    """Bytes of one expert of a layer.

    Args:
        at_rest: in the checkpoint.
        slot: in a device slot.
        read: of the buffer that it is read into.
        cast: temporary bytes while it computes, such as a copy in the dtype to compute in.
    """

    at_rest: int
    slot: int
    read: int
    cast: int


class Parameters(NamedTuple):
    """Number of a model's parameters, and of those that are not routed experts'."""

    total: int
    dense: int


class DenseLayerBytes(NamedTuple):
    """Bytes of the dense part of one decoder layer that may be kept outside the device.

    Args:
        weights: its weights.
        landing: the buffer on the device that they are streamed to.
        reading: the buffer that they are read into, if that is on the device; else 0.
    """

    weights: int
    landing: int
    reading: int


@dataclass(frozen=True)
class ModelBytes:
    """Bytes that a model needs on the device.

    Args:
        dense: the dense part, `layers` included.
        kv_per_token: the KV cache of one token, and its share of what is there twice while the cache grows.
        context_limit: the longest sequence in tokens.
        slot_bytes: a slot of each MoE layer.
        staging: the staging buffers; 0 if they are not on the device.
        workspace: activations, logits and temporary bytes of one expert.
        layers: the decoder layers whose dense part may be kept outside the device.
        loading: the dense part while it loads, before slots exist, if it is larger then.
    """

    dense: int
    kv_per_token: int
    context_limit: int
    slot_bytes: tuple[int, ...]
    staging: int
    workspace: int
    layers: tuple[DenseLayerBytes, ...] = ()
    loading: int = 0

    def dense_with(self, num_offloaded: int) -> tuple[int, int]:
        """(resident, in flight) bytes of the dense part if the last `num_offloaded` layers are not on the device."""
        layers = self.layers[len(self.layers) - num_offloaded :]
        if not layers:
            return self.dense, 0
        in_flight = max(layer.landing for layer in layers) + max(layer.reading for layer in layers)
        return self.dense - sum(layer.weights for layer in layers), in_flight

    def num_offloaded(self, budget: int) -> int | None:
        """How many decoder layers must be offloaded at least so that the dense part fits; None if it never does."""
        return next((n for n in range(len(self.layers) + 1) if sum(self.dense_with(n)) <= budget), None)

    @property
    def min_dense(self) -> int:
        """The fewest bytes of device memory that the dense part can do with."""
        return min(sum(self.dense_with(n)) for n in range(len(self.layers) + 1))


class ModelNeeds(NamedTuple):
    """Everything that a division of memory needs to know about a model.

    Args:
        shape: experts and top_k of each MoE layer.
        experts: one expert of each MoE layer.
        parameters: the model's parameters.
        bytes: what it needs on the device.
        forward: temporary bytes of a forward pass.
    """

    shape: CacheShape
    experts: tuple[ExpertBytes, ...]
    parameters: Parameters
    bytes: ModelBytes
    forward: PassBytes

    def with_chunks(self, tokens: int) -> ModelNeeds:
        """The same with a workspace for prefill in chunks of `tokens` tokens; it may be larger anyway."""
        needed = self.forward.reserve(tokens, self.bytes.context_limit) + self.temporary
        return self._replace(bytes=replace(self.bytes, workspace=max(self.bytes.workspace, needed)))

    def with_dense(
        self, meta: PreTrainedModel, form: str, dtype: torch.dtype, stored: Mapping[str, StoredWeight]
    ) -> ModelNeeds:
        """The same with the dense part as the option `dense` says.

        Weights that are quantized are as large as before while they load, and cannot leave the device. Those that
        kernels read as they are stored are never larger; outside the device they are decoded.

        Args:
            meta: the model on the meta device.
            form: a value of the option `dense`.
            dtype: dtype to compute in.
            stored: `ExpertCatalog.stored`; empty without kernels.
        """
        saved = saved_bytes(meta, form, dtype, stored)
        if not saved:
            return self
        dense, layers = self.bytes.dense, self.bytes.layers
        smaller = replace(self.bytes, dense=dense - sum(saved.values()))
        if form != "native":
            return self._replace(bytes=replace(smaller, loading=dense, layers=()))
        of_layer = [sum(saved.get(name, 0) for name in layer.shapes) for layer in dense_layers(meta)]
        packed = [layer._replace(weights=layer.weights - n) for layer, n in zip(layers, of_layer, strict=True)]
        return self._replace(bytes=replace(smaller, layers=tuple(packed)))

    @property
    def temporary(self) -> int:
        """Temporary bytes of one expert while it computes; a part of the workspace."""
        return max(expert.cast for expert in self.experts)


def catalog_needs(
    catalog: ExpertCatalog, meta: PreTrainedModel, dtype: torch.dtype, stored: torch.dtype, *, unified_memory: bool
) -> ModelNeeds:
    """What a model needs by its checkpoint's headers. Arguments as `model_needs`; catalog: the checkpoint's experts."""
    experts = tuple(
        ExpertBytes(
            at_rest=layer.common_record.nbytes,
            slot=aligned(max(form.layout.nbytes for form in layer.forms), PARAM_ALIGNMENT),
            read=max(plan_reads(record).nbytes for record in layer.records),
            cast=max(_computing_bytes(form, dtype) for form in layer.forms),
        )
        for layer in catalog.layers
    )
    return model_needs(meta, catalog.shape, experts, dtype, stored, unified_memory=unified_memory)


def model_needs(
    meta: PreTrainedModel,
    shape: CacheShape,
    experts: tuple[ExpertBytes, ...],
    dtype: torch.dtype,
    stored: torch.dtype,
    *,
    unified_memory: bool,
) -> ModelNeeds:
    """What a model needs whose experts are known.

    Args:
        meta: the model on the meta device.
        shape: experts and top_k of each MoE layer.
        experts: one expert of each MoE layer.
        dtype: dtype to compute in.
        stored: dtype of the decoder layers' dense weights at rest.
        unified_memory: whether the device's memory is the host's, so that staging buffers count too.
    """
    buffer_bytes = max(expert.read for expert in experts)
    staging = staging_plan(buffer_bytes).buffers * buffer_bytes if unified_memory else 0
    text = meta.config.get_text_config()
    limit = int(getattr(text, "max_position_embeddings", None) or 0)
    forward = pass_bytes(meta.config, dtype, max(shape.top_k))
    logits = FEW_TOKENS * int(getattr(text, "vocab_size", 0)) * 4
    activations = max(forward.of(1, FEW_TOKENS, FEW_TOKENS, 0), logits)
    layers = dense_layers(meta)
    needed = ModelBytes(
        dense=dense_bytes(meta, dtype),
        kv_per_token=kv_bytes_per_token(meta.config, dtype) + kv_growth_per_token(meta.config, dtype),
        context_limit=limit if limit > 0 else UNLIMITED_CONTEXT,
        slot_bytes=tuple(expert.slot for expert in experts),
        staging=staging,
        workspace=activations + max(expert.cast for expert in experts),
        layers=tuple(_layer_bytes(layer, dtype, stored if unified_memory else None) for layer in layers),
    )
    return ModelNeeds(shape, experts, count_parameters(meta), needed, forward)


def _layer_bytes(layer: DenseLayer, dtype: torch.dtype, stored: torch.dtype | None) -> DenseLayerBytes:
    """The bytes of one decoder layer. stored: dtype at rest; None if the read buffer is not on the device."""
    sizes = [torch.Size(shape).numel() for shape in layer.shapes.values()]
    # A read takes whole pages, and one page more because a tensor may begin inside a page.
    reading = 0 if stored is None else aligned(max(sizes) * stored.itemsize, PAGE_BYTES) + PAGE_BYTES
    return DenseLayerBytes(sum(sizes) * dtype.itemsize, layer.layout(dtype).nbytes + PARAM_ALIGNMENT, reading)


def _computing_bytes(layer: CatalogLayer, dtype: torch.dtype) -> int:
    """Temporary bytes while one expert of the layer computes in `dtype`."""
    if layer.cpu_slot is not None:
        return layer.cpu_slot.working_bytes()
    if layer.decode is not None:
        return layer.decode.nbytes(dtype)
    cast = [param for param in layer.layout.params if param.dtype != dtype]
    return sum(param.nbytes // param.dtype.itemsize * dtype.itemsize for param in cast)


def count_parameters(meta_model: PreTrainedModel) -> Parameters:
    """Count the parameters of a model on the meta device; shared ones count once."""
    experts = expert_parameters(meta_model)
    sizes = [(name not in experts, p.numel()) for name, p in meta_model.named_parameters()]
    return Parameters(sum(n for _, n in sizes), sum(n for dense, n in sizes if dense))


def dense_bytes(meta_model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of the parameters and buffers that are not experts', floating-point ones in `dtype`; shared ones once."""
    experts = expert_parameters(meta_model)
    params = [t for name, t in meta_model.named_parameters() if name not in experts]
    size = sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in params)
    # The loader casts some buffers and leaves others in their own dtype, such as frequencies of rotary embeddings.
    return size + sum(t.numel() * max(dtype.itemsize, t.element_size()) for t in meta_model.buffers())


def kv_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers.

    In an encoder-decoder model tokens of both sides count: the decoder's layers cache their own tokens and, for cross
    attention, the encoder's.
    """
    if config.is_encoder_decoder:
        return _layers_of(config, "decoder") * 2 * kv_growth_per_token(config, dtype)
    return sum(sum(cached_elements(layer)) for layer in config.get_text_config().per_layer_config) * dtype.itemsize


def kv_growth_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes per token that are there twice while a cache grows: transformers joins the old and the new keys of a layer
    in new memory, then its values.
    """
    if config.is_encoder_decoder:
        heads = int(getattr(config, "decoder_attention_heads", None) or config.num_attention_heads)
        return heads * int(getattr(config, "d_kv", None) or config.hidden_size // heads) * dtype.itemsize
    return max(max(cached_elements(layer)) for layer in config.get_text_config().per_layer_config) * dtype.itemsize


def cached_elements(layer: PreTrainedConfig) -> tuple[int, int]:
    """Elements of the keys and of the values that one decoder layer caches per token."""
    heads = int(layer.num_attention_heads)
    head = int(getattr(layer, "head_dim", None) or layer.hidden_size // heads)
    if getattr(layer, "kv_lora_rank", None):  # multi-head latent attention; transformers caches expanded keys
        key = int(layer.qk_nope_head_dim) + int(layer.qk_rope_head_dim)
        return heads * key, heads * int(layer.v_head_dim)
    kv_heads = int(getattr(layer, "num_key_value_heads", None) or heads)
    return kv_heads * head, kv_heads * int(getattr(layer, "v_head_dim", None) or head)


def num_layers(config: PreTrainedConfig) -> int:
    """Number of layers of the text part; of encoder and decoder together."""
    if config.is_encoder_decoder:
        return _layers_of(config, "encoder") + _layers_of(config, "decoder")
    return int(config.get_text_config().num_hidden_layers)


def _layers_of(config: PreTrainedConfig, side: str) -> int:
    """Number of layers of one side ("encoder" or "decoder") of an encoder-decoder model."""
    for name in (f"{side}_layers", f"num_{side}_layers", "num_layers", "num_hidden_layers"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise UnsupportedModelError(f"config.json of model type {config.model_type!r} does not say how many layers it has")
