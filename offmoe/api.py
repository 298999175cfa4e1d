"""`from_pretrained`: compose catalog, store, arena, planner and transfer around a model of transformers.

What moves: the dense weights, once, from the shards to the device; the experts stay where they are. Bound: reading
the dense part. Must never materialise an expert as a parameter, not even while loading, and decides what fits before
it loads anything."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from offmoe.config import Default, OffloadConfig, format_size
from offmoe.errors import CapacityError, ConfigError
from offmoe.fit import divide_or_say
from offmoe.hf import experts as hf_experts
from offmoe.hf.adapters import find_experts, require_adapter
from offmoe.hf.catalog import ExpertCatalog, build_catalog
from offmoe.hf.dense import ParkedLayers, dense_layers
from offmoe.hf.estimate import estimate, quantisation_method
from offmoe.hf.foresight import foresee
from offmoe.hf.hub import Source, locate
from offmoe.hf.load import build_meta, compute_dtype, load_dense, lone_config, model_class, read_config, require_index
from offmoe.hf.needs import ExpertBytes, Parameters, count_parameters, expert_bytes, model_bytes
from offmoe.hf.quantization import shapes_are_in_shards
from offmoe.hf.requantised import planned, to_quantise, with_experts, write
from offmoe.offload import Offload
from offmoe.policy.planner import build_planner
from offmoe.runtime.arena import SlotArena, slot_layouts
from offmoe.runtime.backend import Backend, select_backend
from offmoe.runtime.checkpoint import Checkpoint
from offmoe.runtime.computing import build_compute, device_compute
from offmoe.runtime.exchange import HostExchange, HostPart
from offmoe.runtime.executor import ExpertExecutor
from offmoe.runtime.memory import MemoryPlan
from offmoe.runtime.packing import WeightFormat
from offmoe.runtime.store import ExpertStore
from offmoe.runtime.transfer import TransferEngine
from offmoe.trace import TraceWriter
from offmoe.types import CacheShape, CacheStats

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


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
    quantisation: str | None
    """Method that the checkpoint is quantised by."""
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
        return foresee(self.meta, list(find_experts(self.meta).values()))


@dataclass(frozen=True)
class Inspected(Survey):
    """A checkpoint whose headers have been read; nothing is loaded, and of the Hub's shards nothing else downloaded."""

    source: Source
    checkpoint: Checkpoint
    """Of `source`; once quantised, what was written."""
    catalog: ExpertCatalog
    """With experts as they will be loaded."""
    quantise: WeightFormat | None = None
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
    backend = select_backend(config.device)
    hf_config = read_config(source)
    cls = model_class(hf_config)
    method = quantisation_method(hf_config)
    # what is quantised is computed in bfloat16, whatever else a config forgets to say
    compute = compute_dtype(dtype, hf_config, torch.float32 if method is None else torch.bfloat16)
    stored, counts = compute_dtype(None, hf_config, compute), backend.staging_counts
    found = estimate(with_experts(hf_config, config.experts), cls, compute, stored, staging_counts=counts)
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

    A model on the Hub is downloaded only if bitsandbytes quantised it: its headers do not say the shapes of weights.
    """
    found = _read_headers(model, config, dtype, **hub)
    if found.refusal is not None:
        raise found.refusal
    return found


def _read_headers(
    model: str | os.PathLike[str], config: OffloadConfig, dtype: str | torch.dtype | None, **hub: Any
) -> Inspected:
    backend = select_backend(config.device)
    source = locate(model, **hub)
    hf_config = read_config(source.folder)
    cls = model_class(hf_config)
    checkpoint = source.checkpoint()
    require_index(checkpoint)
    if shapes_are_in_shards(hf_config):
        checkpoint = source.fetch(checkpoint)
    meta = build_meta(hf_config, cls)
    catalog = build_catalog(checkpoint, meta)
    how = None if config.experts == "native" else to_quantise(catalog, hf_config, config.experts)
    if how is not None:
        catalog, _ = planned(catalog, meta, hf_config, how)
    if config.is_numeric and backend.slots_in_ram:
        catalog = catalog.for_kernels(meta)
    compute = compute_dtype(dtype, hf_config, torch.bfloat16 if catalog.view.encoded else torch.float32)
    experts = expert_bytes(catalog, compute)
    layers = dense_layers(meta)
    # to be read as it is stored, or as transformers writes it once more, which is in the dtype to compute in
    wider = max(compute, compute_dtype(None, hf_config, compute), key=lambda dtype: dtype.itemsize)
    needs = model_bytes(meta, experts, layers, compute, wider, staging_counts=backend.staging_counts)
    return Inspected(
        source.folder,
        hf_config,
        cls,
        catalog.shape,
        experts,
        count_parameters(meta),
        quantisation_method(hf_config),
        compute,
        *divide_or_say(config, catalog.shape, experts, needs, backend, backend.free_bytes()),
        backend,
        meta,
        source,
        checkpoint,
        catalog,
        how,
    )


def from_pretrained(
    model: str | os.PathLike[str],
    device: str | None = None,
    device_memory: int | str = "auto",
    host_memory: int | str = "auto",
    slots_per_layer: int | tuple[int, ...] | None = None,
    experts: str = "native",
    eviction: str = Default("aged-lfu"),
    scope: str = Default("layer"),
    max_context: int | None = None,
    on_miss: str = Default("auto"),
    prefetch: int | str = Default("auto"),
    exactness: str = "auto",
    activations: str = "float",
    profile: str | os.PathLike[str] | None = None,
    trace: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    **hf_kwargs: Any,
) -> PreTrainedModel:
    """A model of transformers whose experts stay outside the device; an instance of the architecture's own class.

    model: a folder, a Hub id, or "demo". Options: docs of OffloadConfig. profile: JSON of `offmoe tune`; an option that
    is given wins over it. trace: record the routing into this file, written when `model.offload` is closed. dtype: to
    compute in; slots keep the checkpoint's. hf_kwargs go to transformers. Raises ConfigError, CheckpointError or
    CapacityError before anything is loaded."""
    if "torch_dtype" in hf_kwargs:
        raise ConfigError("torch_dtype= is transformers' old name; use dtype=.")
    config = OffloadConfig(
        device=device,
        device_memory=device_memory,
        host_memory=host_memory,
        slots_per_layer=slots_per_layer,
        experts=experts,
        eviction=eviction,
        scope=scope,
        max_context=max_context,
        on_miss=on_miss,
        prefetch=prefetch,
        exactness=exactness,
        activations=activations,
        profile=profile,
    )
    hub = {name: hf_kwargs.pop(name) for name in HUB_OPTIONS if name in hf_kwargs}
    inspected = inspect(model, config, dtype=dtype, **hub)
    plan = inspected.plan
    logger.info("%s on %s", plan.describe(), inspected.config.device)
    if plan.parked_layers:
        logger.warning(
            "the dense part does not fit: %d decoder layers (%s) come from %s in every pass; device_memory=%d holds it",
            plan.parked_layers,
            format_size(plan.parked),
            plan.parked_in,
            plan.smallest_dense,
        )
    return load(inspected, name=str(model), trace=trace, **hf_kwargs)


def fetch(inspected: Inspected) -> Inspected:
    """The same with all shards here: downloads those that are not, and quantises experts that are to be.

    What that writes is removed with the model that `load` makes, or by `release`.
    """
    found = replace(inspected, checkpoint=inspected.source.fetch(inspected.checkpoint))
    if found.quantise is None:
        return found
    made = write(found.catalog, found.folder, found.quantise, str(found.folder))
    return replace(
        found,
        folder=made.checkpoint.folder,
        checkpoint=made.checkpoint,
        catalog=made.catalog,
        quantise=None,
        temporary=made.folder,
    )


def load(
    inspected: Inspected, *, name: str = "", trace: str | os.PathLike[str] | None = None, **hf_kwargs: Any
) -> PreTrainedModel:
    """Load what `inspect` found, and `fetch` what is not here yet."""
    inspected = fetch(inspected)
    catalog, backend, config = inspected.catalog, inspected.backend, inspected.config
    layouts = [layer.layout for layer in catalog.layers]
    closing = [inspected.release]
    try:
        planner = build_planner(config.cache(), catalog.shape)
        writer = None if trace is None else TraceWriter(trace, name, catalog.shape, config.cache())
        parked = _park(inspected)
        if parked is not None:
            closing.insert(0, parked.close)
        model = load_dense(
            inspected.folder,
            inspected.hf_config,
            inspected.model_class,
            catalog,
            device=backend.device,
            dtype=inspected.dtype,
            experts_implementation=hf_experts.IMPLEMENTATION,
            parked=parked,
            called=inspected.source.folder,
            **hf_kwargs,
        )
        model.requires_grad_(False)
        store = ExpertStore(inspected.checkpoint.shards, catalog.records)
        closing.insert(0, store.close)
        inspected.checkpoint.check_unchanged()
        slots = slot_layouts(layouts, inspected.plan.slots_per_layer, config.scope)
        scratch = [max(layouts, key=lambda layout: layout.nbytes)] * planner.num_scratch
        if backend.staging_counts:
            arena = SlotArena(backend.allocate, slots + scratch)
        else:
            arena = SlotArena(backend.allocate, slots, in_ram=scratch)
        stats = CacheStats.for_layers(catalog.shape.layers)
        assemblies = [layer.assembly for layer in catalog.layers]
        transfer = TransferEngine(
            store,
            arena,
            backend,
            layouts,
            assemblies,
            host_slots=planner.num_host_slots,
            on_stall=stats.stalled,
        )
        closing.insert(0, transfer.close)
        closing.append(arena.close)
        decodings, kernels = [layer.decode for layer in catalog.layers], [layer.kernel for layer in catalog.layers]
        compute = build_compute(arena, layouts, decodings, kernels, int8_activations=config.activations == "int8")
        closing.insert(0, compute.close)
        host = None
        if scratch and not backend.staging_counts:
            exchange = HostExchange(backend)
            closing.append(exchange.close)
            host = HostPart(compute, exchange)
        found = find_experts(model)
        modules = [found[layer.name] for layer in catalog.layers]
        if config.is_numeric and backend.has_device_kernels:
            compute = device_compute(catalog.layers, [require_adapter(m).math(m) for m in modules], arena, compute)
            closing.insert(0, compute.close)
        executor = ExpertExecutor(planner, transfer, compute, backend, stats, host)
        executor.trace = writer
        for layer, module in enumerate(modules):
            hf_experts.attach(module, executor, layer)
        Offload(model, config, inspected.plan, executor, modules, closing)
    except BaseException:
        for close in closing:
            close()
        raise
    return model


def _park(inspected: Inspected) -> ParkedLayers | None:
    """The last decoder layers, as many as the plan has no room for."""
    plan = inspected.plan
    if plan.parked_in is None:
        return None
    layers = dense_layers(inspected.meta)[-plan.parked_layers :]
    return ParkedLayers(
        layers, plan.parked_in, inspected.meta, inspected.checkpoint, inspected.catalog.dense, inspected.backend
    )
