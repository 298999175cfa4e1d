"""A probe of this machine that takes a fraction of a second, for predictions where nothing was calibrated.

It measures memory, dispatch, copies and, where the model's shards are here, the disk. `offmoe calibrate` measures the
model itself and takes half a minute. Other work on the machine makes every figure worse while it lasts.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import closing
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from offmoe.budget.inspect import Inspected, Survey
from offmoe.budget.predict import (
    DECODE_BYTES,
    DECODE_NS,
    OPERATIONS_PER_EXPERT,
    Rates,
)
from offmoe.compute.kernels.cpu import CpuKernels, kernel_threads
from offmoe.compute.kernels.library import status
from offmoe.device.backend import Backend, CpuBackend
from offmoe.device.machines import DEFAULT_DISK, parse_machine
from offmoe.hf.adapters.find import find_experts, require_adapter
from offmoe.measure.probes import DiskProbe, copy_gb_s, median_s
from offmoe.simulate.decode_prices import OPERATIONS_PER_LAYER, STOCK_MOE_OPERATIONS
from offmoe.storage.store import ExpertStore

LEAST_BYTES, MOST_BYTES = 1 << 20, 32 << 20
"""Bytes of a matrix that is multiplied; others get more or fewer rows. Starting a smaller one would take longer than
reading it, and is counted elsewhere."""
COPIES = 8
"""Matrices that a device with memory of its own multiplies in turn."""
SHAPES = 3
"""Shapes of matrices that are measured, those with the most bytes in the model. The speed of a product depends on its
shape: of bf16 with one row, torch read 0.7 GB/s of 2048 x 4096 and 2.7 GB/s of 14336 x 4096 on one machine."""
READ_BYTES = 64 << 20
LAYERS = 4
"""Layers of the model whose time is that of dispatching alone."""
STOCK_OPERATIONS = OPERATIONS_PER_LAYER + STOCK_MOE_OPERATIONS + 2 * OPERATIONS_PER_EXPERT
"""Operations of one of its layers."""
COPY_BYTES = 32 << 20
DISK_S = 0.1
"""Seconds of reading."""
KERNEL_SHARE = 0.85
"""Speed of the C kernels relative to reading memory: 0.83 to 0.95 (docs/measurements.md)."""
ROUNDS = 5


def probe(survey: Survey) -> Rates:
    """Measure the rates of this machine.

    Args:
        survey: the model, for the shapes of its matrices, its dtype and device, and its shards if they are here.
    """
    began = time.perf_counter()
    backend = survey.backend
    unified = backend.unified_memory
    dense = _products_gb_s(backend, survey.dtype, _dense_shapes(survey.meta))
    experts = _products_gb_s(backend, survey.dtype, _expert_shapes(survey.meta)) or dense
    by_kernels = _kernels_gb_s()
    disk_gb_s, assumed = _disk_gb_s(survey)
    operation_us = _operation_us(backend, survey.dtype)
    link = None if unified else copy_gb_s(backend, COPY_BYTES, ROUNDS)
    copy = copy_gb_s(CpuBackend(), COPY_BYTES, ROUNDS) if unified else None
    return Rates(
        source=f"a probe of this machine in {time.perf_counter() - began:.1f} s",
        dense_gb_s=dense,
        torch_gb_s=experts,
        kernel_gb_s=(by_kernels or experts) if unified else max(dense, experts),
        disk_gb_s=disk_gb_s,
        link_gb_s=link,
        host_gb_s=None if unified else by_kernels,
        copy_gb_s=copy,
        decode_ns=DECODE_NS if unified else DECODE_BYTES / experts,
        operation_us=operation_us,
        assumed=assumed,
    )


def _dense_shapes(meta: PreTrainedModel) -> Counter[torch.Size]:
    """Shapes of the matrices outside the routed experts, with the number of each."""
    inside = tuple(f"{name}." for name in find_experts(meta))
    linear = ((name, m) for name, m in meta.named_modules() if isinstance(m, nn.Linear))
    return Counter(module.weight.shape for name, module in linear if not name.startswith(inside))


def _expert_shapes(meta: PreTrainedModel) -> Counter[torch.Size]:
    """Shapes of the matrices of one expert of every MoE layer."""
    shapes = (require_adapter(module).shapes(module) for module in find_experts(meta).values())
    return Counter(torch.Size(shape) for layer in shapes for shape in layer.values() if len(shape) == 2)


def _products_gb_s(backend: Backend, dtype: torch.dtype, shapes: Counter[torch.Size]) -> float:
    """GB/s at which products of one row read matrices of these shapes, in proportion to their bytes."""
    largest = sorted(shapes, key=lambda shape: shapes[shape] * shape.numel(), reverse=True)[:SHAPES]
    nbytes = seconds = 0.0
    for shape in largest or [torch.Size((4096, 4096))]:
        row_bytes = shape[1] * dtype.itemsize
        rows = max(1, min(max(shape[0], LEAST_BYTES // row_bytes), MOST_BYTES // row_bytes))
        weight = torch.ones(rows, shape[1], dtype=dtype, device=backend.device)
        times = shapes[shape] * shape[0] / rows
        seconds += times * _product_s(backend, weight)
        nbytes += times * weight.nbytes
    return nbytes / 1e9 / seconds


def _product_s(backend: Backend, weight: torch.Tensor) -> float:
    """Seconds of a product of one row with a matrix. A device multiplies many, so that starting them does not count."""
    weights = [weight] if backend.unified_memory else [weight.clone() for _ in range(COPIES)]
    x = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    done = backend.event()

    def work() -> None:
        for each in weights:
            F.linear(x, each)
        done.record(backend.compute)
        done.synchronize()

    with torch.no_grad():
        return median_s(work, ROUNDS) / len(weights)


def _kernels_gb_s() -> float | None:
    """GB/s at which the C kernels compute; None without them."""
    library = status().library
    if library is None:
        return None
    memory = torch.ones(READ_BYTES, dtype=torch.uint8)
    with CpuKernels(library, kernel_threads()) as kernels:
        return KERNEL_SHARE * READ_BYTES / 1e9 / median_s(lambda: kernels.read(memory), ROUNDS)


def _operation_us(backend: Backend, dtype: torch.dtype) -> float:
    """Microseconds of one operation of a decoder layer, Python included: a model too small for anything else to count.

    It is stock Mixtral, whatever the model: layers of other families take about as many operations.
    """
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    with torch.random.fork_rng(devices=[]):
        model: Any = MixtralForCausalLM(config).eval()
    model.to(device=backend.device, dtype=dtype)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=backend.device)
    done = backend.event()

    def work() -> None:
        model(input_ids=ids)
        done.record(backend.compute)
        done.synchronize()

    with torch.no_grad():
        return median_s(work, ROUNDS) / (LAYERS * STOCK_OPERATIONS) * 1e6


def _disk_gb_s(survey: Survey) -> tuple[float, tuple[str, ...]]:
    """GB/s of reading the model's experts, and what was assumed: a disk, if its shards are not on this machine."""
    if not isinstance(survey, Inspected) or survey.checkpoint.shards_absent or survey.quantize is not None:
        return parse_machine(DEFAULT_DISK).disk_gb_s, (f"a disk of kind {DEFAULT_DISK}",)
    shards, records = survey.checkpoint.shards, survey.catalog.records
    with closing(ExpertStore(shards, records)) as store, closing(DiskProbe(store, records, shards)) as disk:
        return disk.gb_s(DISK_S), ()
