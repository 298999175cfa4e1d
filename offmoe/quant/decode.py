"""Decodes one expert: the raw tensors in its slot become the parameters that its module computes with.

A slot holds the expert as it is at rest. Its parameters exist only while its tokens are computed, which costs a few
passes over one expert per step. The result depends on the slot's bytes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from offmoe.quant.codec import Codec
from offmoe.storage.layout import Assembly, Destination, ExpertLayout

WORKING_BYTES = 10
"""Temporary bytes per weight while a matrix is decoded: its codes as bytes and as indices, its products in float32."""


Decoder = Callable[[Codec, Mapping[str, torch.Tensor], torch.Tensor], bool]
"""decoder(codec, raw, out) decodes a weight into `out`, to the bits of codec.decode, or returns False."""


@dataclass(frozen=True)
class Leaf:
    """One tensor of an expert in a slot.

    Args:
        codec: decodes it; None if it is not quantized.
        params: component -> name of its parameter in the slot. A tensor that is not quantized has one, "weight".
        shape: the tensor's shape once decoded.
    """

    codec: Codec | None
    params: Mapping[str, str]
    shape: tuple[int, ...]

    def decode(
        self, views: Mapping[str, torch.Tensor], dtype: torch.dtype, decoder: Decoder | None = None
    ) -> torch.Tensor:
        """The dense tensor in `dtype`.

        Args:
            views: the slot's parameters by name.
            dtype: dtype of the result.
            decoder: tried before the codec.
        """
        raw = {component: views[param] for component, param in self.params.items()}
        if self.codec is None:
            return raw["weight"].to(dtype)
        if decoder is not None:
            out = torch.empty(self.shape, dtype=dtype)
            if decoder(self.codec, raw, out):
                return out
        return self.codec.decode(raw, dtype)

    def decode_into(
        self,
        views: Mapping[str, torch.Tensor],
        out: torch.Tensor,
        decoder: Decoder | None,
        scratch: torch.Tensor | None = None,
    ) -> None:
        """Write the dense tensor to `out`, a view of the parameter that it belongs to.

        Args:
            views: the slot's parameters by name.
            out: where the tensor goes; in RAM if there is a decoder.
            decoder: tried before the codec.
            scratch: uint8 [bytes of the tensor in `out`'s dtype, or more], contiguous: the tensor is decoded there if
                its place is not contiguous.
        """
        if self.codec is not None and decoder is not None:
            raw = {component: views[param] for component, param in self.params.items()}
            if decoder(self.codec, raw, out):
                return
            if scratch is not None:
                whole = scratch[: out.numel() * out.itemsize].view(out.dtype).view(self.shape)
                if decoder(self.codec, raw, whole):
                    out.copy_(whole.view(out.shape))
                    return
        out.copy_(self.decode(views, out.dtype))


@dataclass(frozen=True)
class ExpertDecoding:
    """Decodes the expert in one slot; all experts of a layer share one.

    Args:
        leaves: the expert's tensors, in the order that `assembly` takes them.
        assembly: makes parameters out of decoded tensors.
        shapes: the parameters' shapes by name.
    """

    leaves: tuple[Leaf, ...]
    assembly: Assembly
    shapes: Mapping[str, tuple[int, ...]]

    def __call__(
        self,
        views: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        decoder: Decoder | None = None,
        memory: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Decode one expert.

        Args:
            views: the slot's parameters, from `ExpertLayout.views`.
            dtype: dtype of the result.
            decoder: tried before each codec; only for slots in RAM.
            memory: uint8 [memory_bytes(dtype) or more], aligned to PARAM_ALIGNMENT: the result may stand in it. None:
                in new memory.

        Returns:
            The expert's parameters by name, contiguous.
        """
        if self.assembly.convert is not None:
            params = self.assembly.convert([leaf.decode(views, dtype, decoder) for leaf in self.leaves])
            return {name: tensor.to(dtype).contiguous() for name, tensor in params.items()}
        scratch = None
        if memory is None:
            device = next(iter(views.values())).device
            out = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in self.shapes.items()}
        else:
            layout = self.layout(dtype)
            out, scratch = layout.views(memory), memory[layout.nbytes :]
        for leaf, part in zip(self.leaves, self.assembly.destinations, strict=True):
            leaf.decode_into(views, part.block(out, leaf.shape), decoder, scratch if _is_apart(part) else None)
        return out

    def layout(self, dtype: torch.dtype) -> ExpertLayout:
        """The parameters of an expert that is decoded into memory of the caller's."""
        return ExpertLayout.of({name: (dtype, shape) for name, shape in self.shapes.items()})

    def memory_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the memory that a call may decode into.

        Those of the parameters, and of the largest tensor that does not stay together on its way to its place, such as
        gpt-oss' gate, whose rows become every other column.
        """
        moved = zip(self.leaves, self.assembly.destinations, strict=False)  # a conversion has no destinations
        apart = (torch.Size(leaf.shape).numel() for leaf, part in moved if leaf.codec is not None and _is_apart(part))
        return self.layout(dtype).nbytes + max(apart, default=0) * dtype.itemsize

    def nbytes(self, dtype: torch.dtype) -> int:
        """The most bytes that a call holds at a time: the parameters, and the largest tensor while it is decoded."""
        whole = sum(torch.Size(shape).numel() for shape in self.shapes.values()) * dtype.itemsize
        largest = max(torch.Size(leaf.shape).numel() for leaf in self.leaves)
        kept = whole if self.assembly.convert is not None else 0
        return whole + kept + largest * (WORKING_BYTES + dtype.itemsize)


def _is_apart(part: Destination) -> bool:
    """Whether a tensor with this destination is not contiguous there."""
    return part.transposed or part.step != 1 or part.dim > 0
