"""`from_pretrained`: compose catalog, store, arena, planner and transfer around a model of transformers.

What moves: the dense weights, once, from the shards to the device; the experts stay where they are. Bound: reading
the dense part. Must never materialize an expert as a parameter, not even while loading; what fits was decided before
(inspection.py).
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from offmoe.budget.inspect import Inspected, inspect
from offmoe.compute.compute import build_compute, device_compute
from offmoe.config import Default, OffloadConfig
from offmoe.device.arena import SlotArena, slot_layouts
from offmoe.errors import ConfigError
from offmoe.handle import Offload
from offmoe.hf.adapters.find import find_experts, require_adapter
from offmoe.hf.load import attach as hf_experts
from offmoe.hf.load.dense_layers import ParkedLayers, dense_layers
from offmoe.hf.load.load import load_dense
from offmoe.pack.on_load import write
from offmoe.policy.planner import build_planner
from offmoe.runtime.executor import ExpertExecutor
from offmoe.runtime.host_experts import HostPart
from offmoe.storage.store import ExpertStore
from offmoe.text import format_size
from offmoe.trace.recorder import TraceWriter
from offmoe.transfer.engine import TransferEngine
from offmoe.transfer.host_exchange import HostExchange
from offmoe.transfer.slot_writer import SlotWriter
from offmoe.types import CacheStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


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
    """The same with all shards here: downloads those that are not, and quantizes experts that are to be.

    What that writes is removed with the model that `load` makes, or by `release`.
    """
    found = replace(inspected, checkpoint=inspected.source.fetch(inspected.checkpoint))
    if found.quantize is None:
        return found
    made = write(found.catalog, found.folder, found.quantize, str(found.folder))
    return replace(
        found,
        folder=made.checkpoint.folder,
        checkpoint=made.checkpoint,
        catalog=made.catalog,
        quantize=None,
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
        if backend.unified_memory:
            arena = SlotArena(backend.allocate, slots + scratch)
        else:
            arena = SlotArena(backend.allocate, slots, in_ram=scratch)
        stats = CacheStats.for_layers(catalog.shape.layers)
        slot_writer = SlotWriter(store, arena, backend, catalog.layers)
        transfer = TransferEngine(slot_writer, host_slots=planner.num_host_slots, on_stall=stats.stalled)
        closing.insert(0, transfer.close)
        closing.append(arena.close)
        decodings, kernels = [layer.decode for layer in catalog.layers], [layer.cpu_slot for layer in catalog.layers]
        compute = build_compute(
            arena,
            layouts,
            decodings,
            kernels,
            dtype=inspected.dtype,
            int8_activations=config.activations == "int8",
        )
        closing.insert(0, compute.close)
        host = None
        if scratch and not backend.unified_memory:
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
