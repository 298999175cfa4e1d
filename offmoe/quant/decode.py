"""From the raw tensors in a slot to the parameters that an expert computes with, at the moment of computing.

What moves: one expert's raw bytes are read from its slot and its parameters written beside it, for as long as its
tokens need them; a quantized slot is as large as the expert is at rest. Bounded by the device's memory: it costs a few
passes over one expert, once per expert and step. Must never depend on anything but the slot's bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offmoe.quant.codec import Codec
from offmoe.storage.layout import Assembly

WORKING_BYTES = 10
"""Per weight of the matrix being decoded, beside the result: codes as bytes and as indices, products in float32."""


@dataclass(frozen=True)
class Leaf:
    """One tensor of a checkpoint as it would be without quantization: `params` are its raw tensors in the slot, by
    component; without a codec there is one, "weight". `shape` is the dense one.
    """

    codec: Codec | None
    params: Mapping[str, str]
    shape: tuple[int, ...]

    def decode(self, views: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        raw = {component: views[param] for component, param in self.params.items()}
        return raw["weight"].to(dtype) if self.codec is None else self.codec.decode(raw, dtype)


@dataclass(frozen=True)
class ExpertDecoding:
    """Leaves in the order that `assembly` takes them in; `shapes` are those of the parameters it makes."""

    leaves: tuple[Leaf, ...]
    assembly: Assembly
    shapes: Mapping[str, tuple[int, ...]]

    def __call__(self, views: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """views: of a slot, by the layout's names -> parameters by name, contiguous, in `dtype`."""
        if self.assembly.convert is not None:
            made = self.assembly.convert([leaf.decode(views, dtype) for leaf in self.leaves])
            return {name: tensor.to(dtype).contiguous() for name, tensor in made.items()}
        device = next(iter(views.values())).device
        out = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in self.shapes.items()}
        for leaf, part in zip(self.leaves, self.assembly.destinations, strict=True):
            part.block(out, leaf.shape).copy_(leaf.decode(views, dtype))
        return out

    def nbytes(self, dtype: torch.dtype) -> int:
        """Most bytes that a call holds at a time: the parameters and the largest leaf on its way."""
        whole = sum(torch.Size(shape).numel() for shape in self.shapes.values()) * dtype.itemsize
        largest = max(torch.Size(leaf.shape).numel() for leaf in self.leaves)
        kept = whole if self.assembly.convert is not None else 0
        return whole + kept + largest * (WORKING_BYTES + dtype.itemsize)
