"""Loads the part of a model that is not routed experts, and gives it to the C kernels where these compute it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from offmoe.budget.inspect import Inspected
from offmoe.compute.dense_linear import DenseKernels
from offmoe.hf.adapters.find import decoder_layers
from offmoe.hf.catalog.catalog import ExpertCatalog
from offmoe.hf.load.attach import IMPLEMENTATION
from offmoe.hf.load.dense_layers import OffloadedLayers, dense_layers
from offmoe.hf.load.generation import plain_generation
from offmoe.hf.load.grouped_attention import group_heads
from offmoe.hf.load.kernel_linears import Pack, attach_kernels, dense_formats
from offmoe.hf.load.kernel_norms import attach_norms
from offmoe.hf.load.kernel_routers import attach_routers
from offmoe.hf.load.load import load_dense
from offmoe.hf.load.save import attach_safe_save
from offmoe.hf.load.token_attention import attach_token_attention
from offmoe.pack.quantizer import quantizer
from offmoe.quant.packed_weight import PackedWeight, WeightFormat


def load_dense_part(inspected: Inspected, closing: ExitStack) -> tuple[PreTrainedModel, DenseKernels | None]:
    """Load a model without its experts.

    Args:
        inspected: the model.
        closing: closes what the model needs while it runs.

    Returns:
        The model, and the C kernels that compute its linear layers; None: torch does.
    """
    offloaded, config = _offload_layers(inspected), inspected.config
    if offloaded is not None:
        closing.callback(offloaded.close)
    formats = dense_formats(inspected.meta, config.dense, inspected.catalog.stored)
    model = load_dense(
        inspected.folder,
        inspected.hf_config,
        inspected.model_class,
        inspected.catalog,
        device=inspected.backend.device,
        dtype=inspected.dtype,
        experts_implementation=IMPLEMENTATION,
        offloaded=offloaded,
        name_or_path=inspected.source.model,
        generation_folder=inspected.generation_folder,
        packed=[f"{name}.weight" for name in formats] if config.dense == "native" else (),
        **_forwarded(inspected),
    )
    model.requires_grad_(False)
    kernels = None
    if config.is_numeric and inspected.backend.unified_memory and not inspected.backend.has_device_kernels:
        kernels = _by_kernels(model, inspected, formats, offloaded.names if offloaded else ())
    if kernels is not None:
        closing.callback(kernels.close)
    changed_config = inspected.hf_config if inspected.asked.change else None
    attach_safe_save(model, inspected.folder, inspected.catalog, changed_config)
    return model, kernels


def _by_kernels(
    model: PreTrainedModel, inspected: Inspected, formats: Mapping[str, WeightFormat], absent: Collection[str]
) -> DenseKernels | None:
    """Give the linear layers, norms and attention of a loaded model to the C kernels, as far as they compute them.

    Args:
        model: the model on the CPU.
        inspected: what it was loaded from.
        formats: the linear layers whose weights are packed.
        absent: full names of weights that are in memory only while their layer runs.
    """
    group_heads(model)
    config = inspected.config
    with quantizer() as quantize:
        pack = _as_stored(inspected.catalog) if config.dense == "native" else quantize
        kernels = attach_kernels(model, formats, pack, int8_activations=config.activations == "int8", absent=absent)
    if kernels is not None:
        attached = attach_token_attention(model, kernels, attach_norms(model, kernels.kernels))
        attach_routers(model, kernels)
        kernels.attend = attached == len(decoder_layers(model))
    return kernels


def _as_stored(catalog: ExpertCatalog) -> Pack:
    """Gives weights as the checkpoint stores them, in tiles."""

    def read(weight: torch.Tensor, how: WeightFormat, name: str) -> PackedWeight:
        return catalog.stored[name].read(catalog.view.checkpoint)

    return read


def _forwarded(inspected: Inspected) -> dict[str, object]:
    """Options that go to transformers as they are. attn_implementation is in the configuration already."""
    options = dict(inspected.asked.forwarded)
    if inspected.asked.plain:
        options["generation_config"] = plain_generation(inspected.generation_folder, inspected.hf_config)
    return options


def _offload_layers(inspected: Inspected) -> OffloadedLayers | None:
    """The last decoder layers, as many as the plan has no room for."""
    plan = inspected.plan
    if plan.offloaded_in is None:
        return None
    layers = dense_layers(inspected.meta)[-plan.offloaded_layers :]
    return OffloadedLayers(
        layers, plan.offloaded_in, inspected.meta, inspected.checkpoint, inspected.catalog.dense, inspected.backend
    )
