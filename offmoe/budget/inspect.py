"""Reads a model's configuration and headers and divides the memory: what `inspect` shows and loading starts from.

No weight is read, and of a model on the Hub only configuration and headers are downloaded. A model that does not fit is
refused here, not while it loads. The flow: needs.py (what the model needs; estimate.py if there is only a
configuration), then resolve.py (options against needs and device), which calls device.py and host.py (what goes where).
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from offmoe.budget.estimate import estimate
from offmoe.budget.memory_plan import MemoryPlan
from offmoe.budget.needs import ModelNeeds, catalog_needs
from offmoe.budget.resolve import check_config, divide_or_refusal
from offmoe.checks import check_forms
from offmoe.compute.cpu_compute import has_cpu_kernels
from offmoe.compute.gpu_compute import has_gpu_kernels
from offmoe.config import OffloadConfig
from offmoe.device.backend import Backend
from offmoe.device.select import select_backend
from offmoe.errors import CapacityError
from offmoe.hf.adapters.find import find_experts
from offmoe.hf.catalog.build import build_catalog
from offmoe.hf.catalog.catalog import ExpertCatalog
from offmoe.hf.catalog.quant_config import quantization_method, shapes_are_in_shards
from offmoe.hf.hub.locate import Source, locate
from offmoe.hf.load.attach import expert_layers
from offmoe.hf.load.config import build_meta, lone_config, model_class, read_config
from offmoe.hf.load.open import open_source
from offmoe.hf.load.options import ModelOptions, compute_dtype, dtype_of_weights, parse_dtype
from offmoe.hf.load.overrides import without_change
from offmoe.hf.predict.route_recorder import unpredictable_reasons
from offmoe.pack.on_load import planned, to_quantize, with_experts
from offmoe.quant.packed_weight import WeightFormat
from offmoe.storage.checkpoint import Checkpoint
from offmoe.text import command_words, span
from offmoe.types import CacheShape

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a model needs and what fits; nothing is loaded.

    Args:
        folder: the model's folder, or its configuration file if there is nothing else.
        hf_config: the model's configuration.
        model_class: its class in transformers.
        needs: what it needs.
        quantization: the method that the checkpoint is quantized by; None if it is not.
        dtype: dtype to compute in.
        stored: dtype of the dense weights at rest, and of experts that are not quantized.
        requested: the options as they were given, but for exactness="auto".
        config: the options, resolved.
        plan: the division of memory; for a device that is large enough if there is a refusal.
        refusal: why the model cannot run here with these options; None if it can.
        backend: the device.
        free: bytes of the device's memory that counted as free.
        meta: the model on the meta device. If a lone configuration has very many expert modules, it is built with two
            per layer.
        catalog: the experts as the headers describe them; None if there is only a configuration.
    """

    folder: Path
    hf_config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    needs: ModelNeeds
    quantization: str | None
    dtype: torch.dtype
    stored: torch.dtype
    requested: OffloadConfig
    config: OffloadConfig
    plan: MemoryPlan
    refusal: CapacityError | None
    backend: Backend
    free: int
    meta: PreTrainedModel
    catalog: ExpertCatalog | None = None

    @property
    def shape(self) -> CacheShape:
        """Experts and top_k of each MoE layer."""
        return self.needs.shape

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts at rest."""
        return sum(n * size for n, size in zip(self.shape.experts, self.shape.expert_bytes, strict=True))

    def unpredictable(self) -> tuple[str | None, ...] | None:
        """Why the experts of each MoE layer cannot be predicted; None for a layer whose can.

        None in all if only a run can tell.
        """
        return unpredictable_reasons(self.meta, list(find_experts(self.meta).values()))


@dataclass(frozen=True, kw_only=True)
class Inspected(Survey):
    """A checkpoint whose headers were read; nothing is loaded.

    Args:
        source: where the checkpoint is; downloads shards of the Hub.
        checkpoint: its headers. After `fetch` quantized it, those of the quantized one.
        catalog: its experts, in the format in which they will be loaded.
        quantize: the format that `fetch` will quantize experts to; None if there is nothing to do.
        temporary: the folder of a checkpoint that `fetch` quantized; removed with the model.
        generation_folder: the folder whose generation_config.json is the model's, if it has one.
        asked: what the caller asks of transformers.
    """

    source: Source
    checkpoint: Checkpoint
    catalog: ExpertCatalog
    quantize: WeightFormat | None = None
    temporary: TemporaryDirectory[str] | None = None
    generation_folder: Path | None = None
    asked: ModelOptions = field(default_factory=ModelOptions)

    def say_exactness(self) -> None:
        """Log that exactness="auto" became "numeric" because of how the checkpoint's experts are stored."""
        config, is_asked = self.config, "exactness" in self.requested.explicit
        if config.is_numeric and config.experts == config.dense == "native" and not is_asked:
            logger.warning(
                "experts are quantized, and kernels compute with them as they are stored: sums run in another order "
                "than stock transformers' (exactness='numeric'). exactness='bitwise' gives stock's, more slowly."
            )

    def release(self) -> None:
        """Remove the temporary folder, for a caller that does not load the model. Idempotent."""
        if self.temporary is not None:
            self.temporary.cleanup()


S = TypeVar("S", bound=Survey)


def _divided(
    kind: type[S], config: OffloadConfig, needs: ModelNeeds, backend: Backend, free: int, /, **facts: Any
) -> S:
    """A survey of these facts, with the memory divided. free: bytes of the device's memory that are free."""
    _say_surplus(config.slots_per_layer, needs.shape)
    resolved, plan, refusal = divide_or_refusal(config, needs, backend, free)
    return kind(
        requested=config, needs=needs, backend=backend, free=free, config=resolved, plan=plan, refusal=refusal, **facts
    )


def _say_surplus(slots: int | tuple[int, ...] | None, shape: CacheShape) -> None:
    """Warn of more slots than experts: what is made of the option is not what it says."""
    each = (slots,) * shape.layers if isinstance(slots, int) else slots or ()
    if any(n > e for n, e in zip(each, shape.experts, strict=False)):
        logger.warning(
            "slots_per_layer=%s: a layer has %s experts, so it gets no more slots than those",
            slots,
            span(shape.experts),
        )


def survey(
    model: str | os.PathLike[str],
    config: OffloadConfig,
    *,
    dtype: str | torch.dtype | None = None,
    backend: Backend | None = None,
    **hub: Any,
) -> Survey:
    """As `inspect`, but a model that does not fit is no error, and a configuration alone is enough.

    With a configuration alone, an explicit device_memory counts as free: the plan may be for another machine.

    Args:
        model: as `inspect`; or a config.json, or a folder that holds no weights.
        config: the options.
        dtype: as `inspect`.
        backend: the device to plan for; None: the one that the options name.
        hub: as `inspect`.
    """
    source = None if hub.get("gguf_file") else lone_config(model)
    if source is None:
        return _read_headers(model, config, dtype, ModelOptions(plain=True), backend, **hub)
    backend = _checked_backend(config, dtype, backend)
    hf_config = read_config(source)
    cls = model_class(hf_config)
    method = quantization_method(hf_config)
    # A quantized model computes in bfloat16 if its config does not name a dtype.
    compute = compute_dtype(dtype, hf_config, torch.float32 if method is None else torch.bfloat16)
    stored, unified = compute_dtype(None, hf_config, compute), backend.unified_memory
    needs, meta = estimate(with_experts(hf_config, config.experts), cls, compute, stored, unified_memory=unified)
    needs = needs.with_dense(meta, config.dense, compute, {})
    wanted = 0 if config.device_memory == "auto" else int(config.device_memory)
    return _divided(
        Survey,
        config,
        needs,
        backend,
        max(wanted, backend.free_bytes()),
        folder=source,
        hf_config=hf_config,
        model_class=cls,
        quantization=method,
        dtype=compute,
        stored=stored,
        meta=meta,
    )


def inspect(
    model: str | os.PathLike[str],
    config: OffloadConfig,
    *,
    dtype: str | torch.dtype | None = None,
    asked: ModelOptions | None = None,
    **hub: Any,
) -> Inspected:
    """Read a model's headers and configuration and divide the memory.

    Of a model on the Hub weights are downloaded only if bitsandbytes quantized it: its headers do not tell the shapes.

    Args:
        model: a folder, a GGUF file, a Hub id, or "demo".
        config: the options.
        dtype: dtype to compute in; None: the checkpoint's.
        asked: options of transformers; the configuration that they change is the one that is planned for.
        hub: options of the Hub: revision, token, cache_dir, local_files_only, subfolder, force_download, gguf_file.

    Raises:
        CapacityError: the model does not fit.
        OffmoeError: whatever else `from_pretrained` raises before it loads.
    """
    inspected = inspect_or_refusal(model, config, dtype=dtype, asked=asked, **hub)
    if inspected.refusal is not None:
        words = command_words(model, revision=hub.get("revision"), gguf_file=hub.get("gguf_file"))
        raise CapacityError(f"{inspected.refusal} What would fit: offmoe inspect {words}")
    inspected.say_exactness()
    return inspected


def inspect_or_refusal(
    model: str | os.PathLike[str],
    config: OffloadConfig,
    *,
    dtype: str | torch.dtype | None = None,
    asked: ModelOptions | None = None,
    **hub: Any,
) -> Inspected:
    """As `inspect`, but a model that does not fit is no error: the result has the refusal, and cannot be loaded."""
    asked = asked or ModelOptions()
    with without_change(asked.change, lambda: _read_headers(model, config, dtype, ModelOptions(), **hub)):
        return _read_headers(model, config, dtype, asked, **hub)


def _checked_backend(config: OffloadConfig, dtype: str | torch.dtype | None, backend: Backend | None = None) -> Backend:
    """The device's backend. Refuses options that it cannot honor, before anything is downloaded."""
    if dtype not in (None, "auto"):
        parse_dtype(dtype)
    backend = backend or select_backend(config.device)
    check_config(config, backend)
    return backend


def _with_kernels(
    config: OffloadConfig, catalog: ExpertCatalog, meta: PreTrainedModel, backend: Backend
) -> tuple[OffloadConfig, ExpertCatalog]:
    """The options with exactness="auto" decided, and the catalog with slots for the kernels that will compute.

    Quantized experts are numeric where kernels compute with them as they are stored. Bitwise they would be decoded at
    every use: an int4 expert took 5,000 us that way, and 180 by the CPU's kernels.
    """
    quantized = [i for i, layer in enumerate(catalog.layers) if layer.decode is not None]
    may_change = config.exactness == "auto" and quantized
    if not config.is_numeric and not may_change:
        return config, catalog
    in_c = backend.unified_memory and not backend.has_device_kernels
    for_kernels = catalog.for_kernels(meta) if in_c else catalog
    if not config.is_numeric:
        layers = expert_layers(for_kernels.layers, list(find_experts(meta).values()))
        has_kernels = has_gpu_kernels if backend.has_device_kernels else has_cpu_kernels
        if not any(has_kernels(layers[i]) for i in quantized):
            return config, catalog
        config = config.resolved(exactness="numeric")
    return config, for_kernels


def _read_headers(
    model: str | os.PathLike[str],
    config: OffloadConfig,
    dtype: str | torch.dtype | None,
    asked: ModelOptions,
    backend: Backend | None = None,
    **hub: Any,
) -> Inspected:
    backend = _checked_backend(config, dtype, backend)
    source = locate(model, **hub)
    opened = open_source(source, asked)
    hf_config, cls, checkpoint = opened.config, opened.model_class, opened.checkpoint
    if shapes_are_in_shards(hf_config):
        checkpoint = source.fetch(checkpoint)
    meta = build_meta(hf_config, cls)
    catalog = build_catalog(checkpoint, meta)
    how = None if config.experts == "native" else to_quantize(catalog, hf_config, config.experts)
    if how is not None:
        catalog = planned(catalog, meta, hf_config, how)
    config, catalog = _with_kernels(config, catalog, meta, backend)
    if not config.is_numeric:  # exactness="auto" was not decided when the options were checked
        check_forms({"experts": config.experts, "dense": config.dense}, "bitwise", config.activations)
    compute = compute_dtype(
        dtype, hf_config, torch.bfloat16 if catalog.view.needs_decoding else dtype_of_weights(checkpoint)
    )
    # Offloaded dense layers are read as they are stored, or as transformers writes them again, in the compute dtype.
    stored = max(compute, compute_dtype(None, hf_config, compute), key=lambda dtype: dtype.itemsize)
    needs = catalog_needs(catalog, meta, compute, stored, unified_memory=backend.unified_memory)
    needs = needs.with_dense(meta, config.dense, compute, catalog.stored)
    return _divided(
        Inspected,
        config,
        needs,
        backend,
        backend.free_bytes(),
        folder=source.folder,
        hf_config=hf_config,
        model_class=cls,
        quantization="gguf" if checkpoint.gguf is not None else quantization_method(hf_config),
        dtype=compute,
        stored=stored,
        meta=meta,
        generation_folder=opened.generation_folder,
        source=source,
        checkpoint=checkpoint,
        catalog=catalog,
        quantize=how,
        asked=asked,
    )
