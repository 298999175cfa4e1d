"""The linear layers of a loaded model that the C kernels compute on a CPU (`exactness="numeric"`).

Each of them gets a `forward` of its own. Its class and its hooks stay as they are. A weight that the option `dense`
quantizes, or that kernels read as the checkpoint stores it, leaves the model, and a parameter on the meta device stands
for its dtype and shape.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

import torch
from torch import nn
from transformers import PreTrainedModel

from offmoe.compute.dense_linear import DenseKernels, KernelLinear, PackedLinear, fits_kernels
from offmoe.compute.kernels.cpu import CpuKernels, kernel_threads
from offmoe.compute.kernels.library import status
from offmoe.errors import UnsupportedModelError
from offmoe.hf.adapters.find import decoder_layers, find_experts
from offmoe.hf.catalog.stored_dense import StoredWeight
from offmoe.hf.load.dense_layers import router_weights
from offmoe.hf.load.eager import has_tangent, is_recorded, uncompiled
from offmoe.hf.load.own_forward import OwnForward
from offmoe.quant.packed_weight import INT4_GROUPS, INT8, PackedWeight, WeightFormat, int4

logger = logging.getLogger(__name__)


DENSE_GROUP = 64
"""Inputs that share a scale in int4, as `offmoe pack` has them by default; 32 where a row is no multiple of it."""

Pack = Callable[[torch.Tensor, WeightFormat, str], PackedWeight]
"""pack(weight [rows, cols], format, its name)."""


class LinearForward(OwnForward):
    """The `forward` of one linear layer."""

    def __init__(self, linear: nn.Linear, kernel: KernelLinear | PackedLinear) -> None:
        self._parameters, self._kernel = linear._parameters, kernel
        self._eager = uncompiled(kernel)
        self.prepared = kernel.prepared
        """The weight, for kernels that compute more than this layer."""

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if weight.is_meta:
            return (
                self._eager(input, weight, bias) if torch.compiler.is_compiling() else self._kernel(input, weight, bias)
            )
        if torch.compiler.is_compiling() or is_recorded(input) or has_tangent(input):
            return nn.functional.linear(input, weight, bias)
        return self._kernel(input, weight, bias)


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers of the decoder layers, outside the routed experts, and the head, by name."""
    head = model.get_output_embeddings()
    inside = tuple(f"{name}." for name in decoder_layers(model))
    experts = tuple(f"{name}." for name in find_experts(model))
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and (module is head or (name.startswith(inside) and not name.startswith(experts)))
    }


def dense_formats(
    meta_model: PreTrainedModel, form: str, stored: Mapping[str, StoredWeight]
) -> dict[str, WeightFormat]:
    """The linear layers whose weights are packed with `dense=form`, by name, and their formats.

    With "native" these are the ones that kernels read as the checkpoint stores them. Routers keep their weights, so
    that routing stays; so do weights that two modules share, such as a head that is the table of embeddings. With
    "int4" the head is int8: its error is in every logit. A shape that no format holds stays.

    Args:
        meta_model: the model on the meta device, experts included.
        form: a value of the option `dense`.
        stored: `ExpertCatalog.stored`; empty without kernels.
    """
    if form == "native" and not stored:
        return {}
    uses = Counter(id(param) for _, param in meta_model.named_parameters(remove_duplicate=False))
    routers = router_weights(meta_model, find_experts(meta_model))
    head, out = meta_model.get_output_embeddings(), {}
    for name, module in linears(meta_model).items():
        if f"{name}.weight" in routers or uses[id(module.weight)] > 1:
            continue
        if form == "native":
            if f"{name}.weight" in stored:
                out[name] = stored[f"{name}.weight"].format
            continue
        rows, cols = module.weight.shape
        group = next((g for g in (DENSE_GROUP, min(INT4_GROUPS)) if cols % g == 0), None)
        how = INT8 if form == "int8" or module is head or group is None else int4(group)
        with suppress(UnsupportedModelError):
            how.check(name, rows, cols)
            out[name] = how
    return out


def saved_bytes(
    meta_model: PreTrainedModel, form: str, dtype: torch.dtype, stored: Mapping[str, StoredWeight]
) -> dict[str, int]:
    """By full name of a weight, the bytes by which `dense=form` makes it smaller than it is in `dtype`."""
    modules = linears(meta_model)
    return {
        f"{name}.weight": modules[name].weight.numel() * dtype.itemsize - how.nbytes(*modules[name].weight.shape)
        for name, how in dense_formats(meta_model, form, stored).items()
    }


def attach_kernels(
    model: PreTrainedModel,
    formats: Mapping[str, WeightFormat],
    pack: Pack,
    *,
    int8_activations: bool = False,
    absent: Collection[str] = (),
) -> DenseKernels | None:
    """Let the C kernels compute a model's linear layers. Packed weights take the place of the model's, one by one.

    Args:
        model: a loaded model on the CPU.
        formats: the layers whose weights are packed, by name.
        pack: gives a weight in a format.
        int8_activations: whether the inputs of packed layers are rounded to 8 bits.
        absent: full names of weights that are in memory only while their layer runs.

    Returns:
        The kernels, to be closed when the model does not run any more; None if there is nothing that they compute.
    """
    library = status().library
    fitting = {
        name: module
        for name, module in linears(model).items()
        if f"{name}.weight" not in absent and (name in formats or fits_kernels(module.weight))
    }
    logger.info("the C kernels compute %d linear layers of the dense part", len(fitting) if library else 0)
    if library is None or not fitting:
        return None
    kernels = DenseKernels(CpuKernels(library, kernel_threads(), int8_activations=int8_activations))
    for name, module in fitting.items():
        weight: torch.Tensor | PackedWeight = module.weight
        if name in formats:
            weight = pack(module.weight, formats[name], f"{name}.weight").tiled()
            module.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)
        object.__setattr__(module, "forward", LinearForward(module, kernels.linear(weight, module.bias)))
    return kernels
