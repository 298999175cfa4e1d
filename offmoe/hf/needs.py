"""What a model will need on the device apart from its experts, worked out on the meta device.

Nothing moves. The KV cache follows from the configuration; where an architecture caches less (sliding windows, linear
attention), this is an upper bound. Must never be below what transformers allocates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from offmoe.hf.adapters import expert_parameters
from offmoe.hf.catalog import ExpertCatalog, find_experts
from offmoe.runtime.formats import PARAM_ALIGNMENT, ExpertLayout, aligned
from offmoe.runtime.memory import ModelBytes
from offmoe.runtime.store import plan_reads
from offmoe.runtime.transfer import staging_plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

UNLIMITED_CONTEXT = 1 << 20
"""Tokens, where the configuration names no limit."""
WORKSPACE_TOKENS = 64
"""Rows whose activations and logits the workspace holds; a longer prefill takes what the KV reserve does not use
yet.
"""


def model_bytes(
    meta_model: PreTrainedModel, catalog: ExpertCatalog, dtype: torch.dtype, *, staging_counts: bool
) -> ModelBytes:
    """Bytes of the dense part, of a token of KV cache, of a slot of each layer, of staging and of the workspace."""
    config = meta_model.config
    buffer_bytes = max(plan_reads(record).nbytes for record in catalog.records.values())
    staging = staging_plan(buffer_bytes)[1] * buffer_bytes if staging_counts else 0
    text = config.get_text_config()
    limit = int(getattr(text, "max_position_embeddings", None) or 0)
    widest = max(int(getattr(text, "vocab_size", 0)), 8 * int(text.hidden_size))
    return ModelBytes(
        dense=dense_bytes(meta_model, dtype),
        kv_per_token=kv_bytes_per_token(config, dtype),
        context_limit=limit if limit > 0 else UNLIMITED_CONTEXT,
        slot_bytes=tuple(aligned(layer.layout.nbytes, PARAM_ALIGNMENT) for layer in catalog.layers),
        staging=staging,
        workspace=WORKSPACE_TOKENS * widest * 4 + max(_cast_bytes(layer.layout, dtype) for layer in catalog.layers),
    )


def _cast_bytes(layout: ExpertLayout, dtype: torch.dtype) -> int:
    """Of one expert in the dtype to compute in, if that is not the checkpoint's."""
    other = [p for p in layout.params if p.dtype != dtype]
    return sum(p.nbytes // p.dtype.itemsize * dtype.itemsize for p in other)


def dense_bytes(meta_model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Parameters and buffers that are not experts', shared ones once; floating point ones in `dtype`."""
    experts = {
        id(module.get_parameter(name))
        for module in find_experts(meta_model).values()
        for name in expert_parameters(module)
    }
    tensors = {id(t): t for t in [*meta_model.parameters(), *meta_model.buffers()] if id(t) not in experts}
    return sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in tensors.values())


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of all layers of one token; layers may differ."""
    return sum(_cached_elements(layer) for layer in config.get_text_config().per_layer_config) * dtype.itemsize


def _cached_elements(layer: PretrainedConfig) -> int:
    heads = int(layer.num_attention_heads)
    head = int(getattr(layer, "head_dim", None) or layer.hidden_size // heads)
    if getattr(layer, "kv_lora_rank", None):  # multi-head latent attention: transformers caches expanded keys, values
        key = int(layer.qk_nope_head_dim) + int(layer.qk_rope_head_dim)
        return heads * (key + int(layer.v_head_dim))
    kv_heads = int(getattr(layer, "num_key_value_heads", None) or heads)
    return kv_heads * (head + int(getattr(layer, "v_head_dim", None) or head))
