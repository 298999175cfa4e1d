"""The linear layers of a loaded model that the C kernels compute on a CPU (`exactness="numeric"`).

Each of them gets a `forward` of its own. Its class, its parameters and its hooks stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel

from offmoe.compute.dense_linear import DenseKernels, KernelLinear, fits_kernels
from offmoe.compute.kernels.cpu import CpuKernels, kernel_threads
from offmoe.compute.kernels.library import status
from offmoe.errors import ConfigError
from offmoe.hf.adapters.find import decoder_layers
from offmoe.hf.load.eager import has_tangent, is_recorded

logger = logging.getLogger(__name__)


class LinearForward:
    """The `forward` of one linear layer. It holds the layer's parameters and not the layer, which holds it."""

    def __init__(self, linear: nn.Linear, kernel: KernelLinear) -> None:
        self._parameters, self._kernel = linear._parameters, kernel

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if torch.compiler.is_compiling() or is_recorded(input) or has_tangent(input):
            return nn.functional.linear(input, weight, bias)
        return self._kernel(input, weight, bias)

    def __reduce_ex__(self, protocol: object) -> str:
        raise ConfigError("the layer cannot be copied or pickled: kernels of this process read its weights.")


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers of the decoder layers and the head, by name."""
    layers = decoder_layers(model)
    head = model.get_output_embeddings()
    inside = tuple(f"{name}." for name in layers)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and (module is head or name.startswith(inside))
    }


def attach_kernels(model: PreTrainedModel, absent: Collection[str] = ()) -> DenseKernels | None:
    """Let the C kernels compute a model's linear layers.

    Args:
        model: a loaded model on the CPU.
        absent: full names of weights that are in memory only while their layer runs.

    Returns:
        The kernels, to be closed when the model does not run any more; None if there is nothing that they compute.
    """
    library = status().library
    fitting = {
        name: module
        for name, module in linears(model).items()
        if f"{name}.weight" not in absent and fits_kernels(module.weight)
    }
    logger.info("the C kernels compute %d linear layers of the dense part", len(fitting) if library else 0)
    if library is None or not fitting:
        return None
    kernels = DenseKernels(CpuKernels(library, kernel_threads()))
    for module in fitting.values():
        object.__setattr__(module, "forward", LinearForward(module, kernels.linear(module.weight, module.bias)))
    return kernels
