"""Which compute each MoE layer of a model gets: chosen once, when the model is loaded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import torch

from offmoe.compute.compute import ComputeByLayer, ExpertCompute
from offmoe.compute.cpu_compute import CpuCompute
from offmoe.compute.expert_layer import ExpertLayer
from offmoe.compute.gpu_compute import GpuCompute
from offmoe.compute.gpu_slot import gpu_slot
from offmoe.compute.kernels.cpu import CpuKernels, physical_cores
from offmoe.compute.kernels.device import DeviceKernels, available
from offmoe.compute.kernels.library import status
from offmoe.compute.torch_compute import TorchCompute
from offmoe.device.arena import SlotArena
from offmoe.errors import UnsupportedModelError

logger = logging.getLogger(__name__)


def host_compute(
    layers: Sequence[ExpertLayer], arena: SlotArena, dtype: torch.dtype, int8_activations: bool
) -> ExpertCompute:
    """The C kernels for layers whose slots were made for them, torch's operators for the rest.

    The kernels get as many threads as torch has now, but no more than there are physical cores: more do not read memory
    faster.

    Args:
        dtype: the model's.
        int8_activations: whether the C kernels round activations to 8 bits.
    """
    by_torch = TorchCompute(arena, dtype)
    if all(layer.cpu_slot is None for layer in layers):
        return by_torch
    threads = min(torch.get_num_threads(), physical_cores())
    library = status().library
    assert library is not None, "without the library, no layer has a cpu_slot"
    by_kernels = CpuCompute(CpuKernels(library, threads, int8_activations=int8_activations), arena)
    return ComputeByLayer([by_torch if layer.cpu_slot is None else by_kernels for layer in layers])


def device_compute(layers: Sequence[ExpertLayer], arena: SlotArena, otherwise: ExpertCompute) -> ExpertCompute:
    """The GPU kernels for layers whose slots they read, `otherwise` for the rest; logs which are the rest, and why."""
    if not available():
        logger.warning("Triton is not installed: experts are computed by torch's operators, on decoded weights")
        return otherwise
    kernels: dict[int, DeviceKernels] = {}
    reasons: Counter[str] = Counter()
    for layer in layers:
        try:
            operands, glu = gpu_slot(layer.layout, layer.decode, layer.math)
        except UnsupportedModelError as error:
            reasons[str(error)] += 1
        else:
            kernels[layer.index] = DeviceKernels(operands, glu, arena.memory, arena.starts)
    for reason, count in reasons.items():
        logger.warning("%d MoE layers are computed by torch's operators: %s", count, reason)
    by_kernels = GpuCompute(kernels)
    return ComputeByLayer([by_kernels if layer.index in kernels else otherwise for layer in layers])
