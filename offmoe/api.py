"""`from_pretrained`: catalog, store, slots, planner and transfer put together around a model of transformers.

Only the dense weights are read while loading; experts stay where they are, and never become parameters. `inspect` has
decided before what fits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from offmoe.budget.announce import announce
from offmoe.budget.inspect import Inspected, inspect
from offmoe.budget.memory_plan import MemoryPlan
from offmoe.budget.replan import Loaded
from offmoe.compute.compute import ExpertCompute
from offmoe.compute.cpu_compute import host_compute, scratch_layers
from offmoe.compute.dense_linear import DenseKernels
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.gpu_compute import device_compute
from offmoe.compute.torch_threads import TorchThreads
from offmoe.config import OffloadConfig
from offmoe.dense_part import load_dense_part
from offmoe.device.arena import SlotArena, slot_layouts
from offmoe.device.uploads import Uploads
from offmoe.errors import ConfigError
from offmoe.handle import Offload, SlotsOf
from offmoe.hf.adapters.find import find_experts
from offmoe.hf.load.attach import attach, expert_layers
from offmoe.hf.load.options import sort_options
from offmoe.hf.load.token_layers import attach_layers
from offmoe.pack.on_load import write
from offmoe.policy.planner import Planner, build_planner
from offmoe.profile import Profile
from offmoe.runtime.calls import Slots
from offmoe.runtime.decode_choice import build_device_decode
from offmoe.runtime.executor import ExpertExecutor
from offmoe.runtime.host_experts import HostExperts
from offmoe.runtime.host_probe import probed_costs
from offmoe.steps import Steps
from offmoe.storage.store import ExpertStore
from offmoe.trace.recorder import TraceWriter, check_writable
from offmoe.transfer.engine import TransferEngine
from offmoe.transfer.host_exchange import HostExchange
from offmoe.transfer.slot_writer import SlotWriter
from offmoe.types import CacheStats
from offmoe.warm_start import WarmStart

if TYPE_CHECKING:
    from offmoe.handle import OffloadedModel

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "gguf_file")


def from_pretrained(
    model: str | os.PathLike[str],
    offload_config: OffloadConfig | None = None,
    *,
    device: str | None = None,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    slots_per_layer: int | tuple[int, ...] | None = None,
    experts: str | None = None,
    dense: str | None = None,
    eviction: str | None = None,
    scope: str | None = None,
    max_context: int | None = None,
    prefill_chunk: int | None = None,
    on_miss: str | None = None,
    prefetch: int | str | None = None,
    exactness: str | None = None,
    activations: str | None = None,
    profile: str | os.PathLike[str] | Profile | None = None,
    half_life: float | None = None,
    popularity: tuple[tuple[float, ...], ...] | None = None,
    host_slots: int | tuple[int, ...] | None = None,
    state: str | os.PathLike[str] | None = None,
    fill: bool | None = None,
    lag: int | None = None,
    cuda_graphs: bool | str | None = None,
    trace: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    **hf_kwargs: Any,
) -> OffloadedModel:
    """Load a Mixture-of-Experts model of transformers whose experts stay outside the device.

    The result is an instance of the architecture's own class, in eval mode, with the runtime at `model.offload`. The
    options from `device` to `cuda_graphs` are those of `OffloadConfig`, which says what each of them means.

    Args:
        model: A folder, a .gguf file (any part of a split one), a Hub id such as "mistralai/Mixtral-8x7B-v0.1" or
            "owner/name:Q4_K_M" for one of the GGUF models of a repository, or "demo", the small model in the package.
        offload_config: Options prepared in one object. An option that is given by its own keyword wins over it.
        trace: Record into this .npz file which experts every token uses. It is written when `model.offload` is closed.
        dtype: Dtype to compute in: "bfloat16", "float16", "float32" or a torch.dtype. Slots keep the checkpoint's.
            Default: the checkpoint's.
        hf_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder` and `gguf_file` of the Hub, and
            whatever else transformers' `from_pretrained` takes: `attn_implementation`, `config`, `generation_config`,
            and values of the model's configuration, such as `num_experts_per_tok=1` or `output_router_logits=True`.
            What offmoe cannot honor is refused.

    Raises:
        ConfigError: An option cannot be used. Raised before anything is downloaded, quantized or loaded.
        CheckpointError: The checkpoint is damaged, incomplete, or of a kind that offmoe does not run.
        CapacityError: The model does not fit; the message says how much would be enough.
    """
    arguments = locals()  # first, while there is nothing else in it
    options = {f.name: arguments[f.name] for f in fields(OffloadConfig) if f.name in arguments}
    if not isinstance(offload_config, OffloadConfig | None):
        raise ConfigError(
            f"offload_config={offload_config!r} must be an OffloadConfig; give single options by keyword: device='cpu'."
        )
    config = (offload_config or OffloadConfig()).overridden(**options)
    hub = {name: hf_kwargs.pop(name) for name in HUB_OPTIONS if name in hf_kwargs}
    asked = sort_options(hf_kwargs, known=(*options, "offload_config", "trace", "dtype", *HUB_OPTIONS))
    if trace is not None:
        check_writable(trace)
    inspected = inspect(model, config, dtype=asked.dtype if dtype is None else dtype, asked=asked, **hub)
    announce(inspected)
    return load(inspected, name=str(model), trace=trace)


def fetch(inspected: Inspected) -> Inspected:
    """The same model with every shard on this machine and its experts quantized, if `experts=` asks for that.

    Quantized experts go into a temporary folder. It is removed when the loaded model is closed, or by `release`.
    """
    local = replace(inspected, checkpoint=inspected.source.fetch(inspected.checkpoint))
    if local.quantize is None:
        return local
    written = write(local.catalog, local.folder, local.quantize, str(local.folder))
    return replace(
        local,
        folder=written.checkpoint.folder,
        checkpoint=written.checkpoint,
        catalog=written.catalog,
        quantize=None,
        temporary=written.folder,
    )


def load(inspected: Inspected, *, name: str = "", trace: str | os.PathLike[str] | None = None) -> OffloadedModel:
    """Load an inspected model.

    Args:
        inspected: what `inspect` gave; shards that are not on this machine are fetched first.
        name: of the model, as a recording states it.
        trace: the file to record the routing into, written when `model.offload` is closed.

    Raises:
        CheckpointError: a shard is damaged, or changed since `inspect`.
        CapacityError: the system does not give the memory.
    """
    inspected = fetch(inspected)
    catalog = inspected.catalog
    with ExitStack() as closing:
        closing.callback(inspected.release)
        warm = WarmStart(name, inspected.checkpoint, catalog, inspected.config)
        config = warm.config
        planner = build_planner(config.cache(), catalog.shape)
        model, dense = load_dense_part(inspected, closing)
        experts = find_experts(model)
        modules = [experts[layer.name] for layer in catalog.layers]
        layers = expert_layers(catalog.layers, modules)
        on_host = None
        if planner.num_scratch > 0 and config.miss_costs is not None:
            on_host = scratch_layers(layers, [layer.records for layer in catalog.layers])
        slots = _slots(layers, on_host)
        executor, config = _build_executor(inspected, config, layers, on_host, slots, planner, closing, dense)
        executor.trace = None if trace is None else TraceWriter(trace, name, catalog.shape, config.cache())
        for layer, module in zip(layers, modules, strict=True):
            attach(module, executor, layer)
        loaded = Loaded(
            requested=inspected.requested,
            config=config,
            plan=inspected.plan,
            needs=inspected.needs,
            backend=inspected.backend,
            computes_on_host=executor.computes_on_host,
        )
        steps = Steps(executor, modules)
        if dense is not None:
            steps.threads = TorchThreads(kernels_attend=dense.attend)
            steps.layers = attach_layers(model, executor, dense)
        offload = Offload(model, loaded, executor, slots, closing, warm, steps)
        if config.fills:
            offload.fill()
    return cast("OffloadedModel", model)


def _build_executor(
    inspected: Inspected,
    config: OffloadConfig,
    layers: Sequence[ExpertLayer],
    on_host: Sequence[ExpertLayer] | None,
    slots: SlotsOf,
    planner: Planner,
    closing: ExitStack,
    dense: DenseKernels | None,
) -> tuple[ExpertExecutor, OffloadConfig]:
    """Everything between the experts at rest and their rows. Closed from the compute back to the files.

    Args:
        on_host: the layers as they stand in scratch slots for which the host computes; None: it computes nothing.
        dense: the C kernels of the dense part, whose threads those of the experts share.

    Returns:
        The executor, and the options with the host's times where these were measured now.
    """
    backend = inspected.backend
    store = ExpertStore(inspected.checkpoint.shards, inspected.catalog.records)
    closing.callback(store.close)
    inspected.checkpoint.check_unchanged()
    on_device, in_ram = slots(config, inspected.plan, planner.num_scratch)
    arena = SlotArena(backend.allocate, on_device, in_ram=in_ram)
    closing.callback(arena.close)
    stats = CacheStats.for_layers(len(layers))
    slot_writer = SlotWriter(store, arena, backend, layers, on_host)
    transfer = TransferEngine(slot_writer, host_slots=planner.num_host_slots, on_stall=stats.stalled)
    closing.callback(transfer.close)
    compute = host_compute(
        layers,
        arena,
        inspected.dtype,
        config.activations == "int8",
        in_ram=backend.unified_memory and not backend.has_device_kernels,
        sharing=None if dense is None else dense.kernels,
    )
    closing.callback(compute.close)
    host = None
    if on_host is not None:
        by_host = host_compute(on_host, arena, inspected.dtype, config.activations == "int8", in_ram=True)
        closing.callback(by_host.close)
        config = _with_host_times(inspected, config, by_host, on_host, arena)
        planner = build_planner(config.cache(), inspected.shape)
        exchange = HostExchange(backend)
        closing.callback(exchange.close)
        host = HostExperts(by_host, exchange, transfer, on_host)
    if config.is_numeric and backend.has_device_kernels:
        uploads = Uploads(backend)
        closing.callback(uploads.close)
        compute = device_compute(layers, arena, compute, uploads, compile_for=(inspected.dtype, inspected.shape.top_k))
        closing.callback(compute.close)
    decode = build_device_decode(config, inspected.shape, layers, compute, transfer, inspected.dtype)
    if decode is not None:
        closing.callback(decode.close)
    executor = ExpertExecutor(planner, transfer, compute, backend, stats, host, decode)
    closing.callback(executor.resident.slots_moved)
    return executor, config


def _with_host_times(
    inspected: Inspected,
    config: OffloadConfig,
    compute: ExpertCompute,
    layers: Sequence[ExpertLayer],
    arena: SlotArena,
) -> OffloadConfig:
    """The options with the host's times as they are here, unless a profile has them or they are as assumed."""
    profile = config.profile
    if isinstance(profile, Profile) and profile.costs is not None and profile.costs.expert_us_host is not None:
        return config
    assert config.miss_costs is not None
    largest = max(layers, key=lambda layer: layer.layout.nbytes)
    slot, text = largest.cpu_slot, inspected.hf_config.get_text_config()
    x = torch.zeros(1, slot.weights[0].cols if slot else text.hidden_size, dtype=inspected.dtype)
    scratch = range(arena.num_on_device, len(arena))
    with torch.no_grad():
        return config.resolved(miss_costs=probed_costs(config.miss_costs, compute, largest, scratch, x))


def _slots(layers: Sequence[ExpertLayer], on_host: Sequence[ExpertLayer] | None) -> SlotsOf:
    """The layouts of all slots. Scratch slots are slots like the others, unless the host computes with them.

    on_host: the layers as they stand in scratch slots then.
    """
    layouts = [layer.largest for layer in layers]
    scratch_layouts = layouts if on_host is None else [layer.largest for layer in on_host]
    largest = max(scratch_layouts, key=lambda layout: layout.nbytes)

    def slots(config: OffloadConfig, plan: MemoryPlan, num_scratch: int) -> Slots:
        on_device = slot_layouts(layouts, plan.slots_per_layer, config.scope)
        scratch = [largest] * num_scratch
        return (on_device, scratch) if config.miss_costs is not None else (on_device + scratch, [])

    return slots
