"""What a model needs and what fits, found out before anything is loaded: what `inspect` shows and loading starts from.

What moves: configuration and headers, of a model on the Hub these alone. Bound: building the model on the meta device
and naming its tensors. Must never read a weight, and never leave what does not fit to be found out while loading.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from offmoe.budget.device import MemoryPlan
from offmoe.budget.estimate import estimate
from offmoe.budget.needs import ExpertBytes, Parameters, count_parameters, expert_bytes, model_bytes
from offmoe.budget.resolve import check_config, divide_or_say
from offmoe.config import OffloadConfig
from offmoe.device.backend import Backend, select_backend
from offmoe.errors import CapacityError
from offmoe.hf.adapters.find import find_experts
from offmoe.hf.catalog.build import build_catalog
from offmoe.hf.catalog.catalog import ExpertCatalog
from offmoe.hf.catalog.quant_config import quantization_method, shapes_are_in_shards
from offmoe.hf.hub.locate import Source, locate
from offmoe.hf.load.config import lone_config, model_class, read_config
from offmoe.hf.load.dense_layers import dense_layers
from offmoe.hf.load.load import compute_dtype, require_index
from offmoe.hf.load.meta_model import build_meta
from offmoe.hf.load.options import parse_dtype
from offmoe.hf.predict.meta import unpredictable_reasons
from offmoe.pack.on_load import planned, to_quantize, with_experts
from offmoe.quant.packed_weight import WeightFormat
from offmoe.storage.checkpoint import Checkpoint
from offmoe.types import CacheShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Survey:
    """What a model needs and what fits, from its configuration; nothing is loaded.

    refusal: why it cannot run here as asked; `plan` is then for a device that is large enough.
    """

    folder: Path
    """Of the model, or its configuration file where there is nothing else."""
    hf_config: PretrainedConfig
    model_class: type[PreTrainedModel]
    shape: CacheShape
    experts: tuple[ExpertBytes, ...]
    """Of each MoE layer."""
    parameters: Parameters
    quantization: str | None
    """Method that the checkpoint is quantized by."""
    dtype: torch.dtype
    config: OffloadConfig
    """As asked, with device, slots, context and modes resolved."""
    plan: MemoryPlan
    refusal: CapacityError | None
    backend: Backend
    meta: PreTrainedModel
    """On the meta device. Of a configuration with a great many expert modules, one that has but two per layer."""

    @property
    def expert_bytes(self) -> int:
        """All experts, at rest."""
        return sum(n * size for n, size in zip(self.shape.experts, self.shape.expert_bytes, strict=True))

    def unpredictable(self) -> tuple[str | None, ...] | None:
        """For each MoE layer why its experts cannot be predicted, None where they can; None if only a run can tell."""
        return unpredictable_reasons(self.meta, list(find_experts(self.meta).values()))


@dataclass(frozen=True)
class Inspected(Survey):
    """A checkpoint whose headers have been read; nothing is loaded, and of the Hub's shards nothing else downloaded."""

    source: Source
    checkpoint: Checkpoint
    """Of `source`; once quantized, what was written."""
    catalog: ExpertCatalog
    """With experts as they will be loaded."""
    quantize: WeightFormat | None = None
    """What experts are still to be made, which `fetch` does."""
    temporary: TemporaryDirectory[str] | None = None
    """Where that is, if it was done; removed with the model."""

    def release(self) -> None:
        """Remove what `fetch` has written, where no model does; idempotent."""
        if self.temporary is not None:
            self.temporary.cleanup()


def survey(
    model: str | os.PathLike[str], config: OffloadConfig, *, dtype: str | torch.dtype | None = None, **hub: Any
) -> Survey:
    """What `inspect` finds, also where the model does not fit, and also of a configuration alone: a config.json, or a
    folder that holds nothing else of a model.

    Of a configuration, an explicit device_memory is taken at its word: the model may be meant for another machine.
    """
    source = lone_config(model)
    if source is None:
        return _read_headers(model, config, dtype, **hub)
    backend = _checked_backend(config, dtype)
    hf_config = read_config(source)
    cls = model_class(hf_config)
    method = quantization_method(hf_config)
    # what is quantized is computed in bfloat16, whatever else a config forgets to say
    compute = compute_dtype(dtype, hf_config, torch.float32 if method is None else torch.bfloat16)
    stored, unified = compute_dtype(None, hf_config, compute), backend.unified_memory
    found = estimate(with_experts(hf_config, config.experts), cls, compute, stored, unified_memory=unified)
    asked = 0 if config.device_memory == "auto" else int(config.device_memory)
    free = max(asked, backend.free_bytes())
    return Survey(
        source,
        hf_config,
        cls,
        found.shape,
        found.experts,
        found.parameters,
        method,
        compute,
        *divide_or_say(config, found.shape, found.experts, found.needs, backend, free),
        backend,
        found.meta,
    )


def inspect(
    model: str | os.PathLike[str], config: OffloadConfig, *, dtype: str | torch.dtype | None = None, **hub: Any
) -> Inspected:
    """Read headers and configuration, divide the memory; loads no weight. Raises what `from_pretrained` would.

    A model on the Hub is downloaded only if bitsandbytes quantized it: its headers do not say the shapes of weights.
    """
    found = _read_headers(model, config, dtype, **hub)
    if found.refusal is not None:
        raise found.refusal
    return found


def _checked_backend(config: OffloadConfig, dtype: str | torch.dtype | None) -> Backend:
    """The backend of the options' device; refuses options that it cannot honor before anything is downloaded."""
    if dtype not in (None, "auto"):
        parse_dtype(dtype)
    backend = select_backend(config.device)
    check_config(config, backend)
    return backend


def _read_headers(
    model: str | os.PathLike[str], config: OffloadConfig, dtype: str | torch.dtype | None, **hub: Any
) -> Inspected:
    backend = _checked_backend(config, dtype)
    source = locate(model, **hub)
    hf_config = read_config(source.folder)
    cls = model_class(hf_config)
    checkpoint = source.checkpoint()
    require_index(checkpoint)
    if shapes_are_in_shards(hf_config):
        checkpoint = source.fetch(checkpoint)
    meta = build_meta(hf_config, cls)
    catalog = build_catalog(checkpoint, meta)
    how = None if config.experts == "native" else to_quantize(catalog, hf_config, config.experts)
    if how is not None:
        catalog, _ = planned(catalog, meta, hf_config, how)
    if config.is_numeric and backend.unified_memory and not backend.has_device_kernels:
        catalog = catalog.for_kernels(meta)
    compute = compute_dtype(dtype, hf_config, torch.bfloat16 if catalog.view.encoded else torch.float32)
    experts = expert_bytes(catalog, compute)
    layers = dense_layers(meta)
    # to be read as it is stored, or as transformers writes it once more, which is in the dtype to compute in
    wider = max(compute, compute_dtype(None, hf_config, compute), key=lambda dtype: dtype.itemsize)
    needs = model_bytes(meta, experts, layers, compute, wider, unified_memory=backend.unified_memory)
    return Inspected(
        source.folder,
        hf_config,
        cls,
        catalog.shape,
        experts,
        count_parameters(meta),
        quantization_method(hf_config),
        compute,
        *divide_or_say(config, catalog.shape, experts, needs, backend, backend.free_bytes()),
        backend,
        meta,
        source,
        checkpoint,
        catalog,
        how,
    )
