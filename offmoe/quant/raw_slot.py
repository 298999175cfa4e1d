"""Gives a quantized expert a slot that holds it as it is at rest: the layout, the copies, and the way to decode it.

Every component is copied unchanged. The one exception is the JSON of bitsandbytes, whose length differs from expert to
expert: the host reads from it the one number that decoding needs, and refuses an expert that is quantized otherwise
than the others of its layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from offmoe.errors import CheckpointError
from offmoe.quant.bitsandbytes import read_state
from offmoe.quant.codec import Codec, Kind, Spec
from offmoe.quant.decode import ExpertDecoding, Leaf
from offmoe.storage.layout import Assembly, Destination, ExpertLayout

STATE = "offset"
"""The component of bitsandbytes that is JSON at rest. Only the number "nested_offset" in it reaches a slot."""
OFFSET = Spec((), torch.float32)
"""Shape and dtype of that number in a slot."""


def offset_of(state: torch.Tensor, codec: Codec, name: str) -> torch.Tensor:
    """The offset in one weight's JSON of bitsandbytes, float32 [].

    Args:
        state: the JSON's bytes, uint8 [n].
        codec: the codec of the other weights of this kind.
        name: the weight's name for messages.

    Raises:
        CheckpointError: the JSON is damaged, or describes another codec.
    """
    try:
        actual, offset = read_state(state.numpy().tobytes())
    except ValueError as error:
        raise CheckpointError(f"quantized weight {name!r} cannot be decoded: {error}; download it again") from error
    if actual != codec:
        raise CheckpointError(
            f"quantized weight {name!r} is {actual}, others of its kind are {codec}; quantize the model anew"
        )
    return torch.tensor(offset, dtype=torch.float32)


class RawSlot(NamedTuple):
    """How the experts of a layer stand in slots.

    Args:
        layout: the slot's layout.
        assembly: copies an expert's segments into a slot.
        decode: makes the expert's parameters out of a slot; None if the slot holds them as they are.
    """

    layout: ExpertLayout
    assembly: Assembly
    decode: ExpertDecoding | None


def raw_slot(tensors: Sequence[Kind], assembly: Assembly, shapes: Mapping[str, tuple[int, ...]]) -> RawSlot:
    """A slot that holds one expert as it is stored.

    Args:
        tensors: the expert's tensors, in the order that `assembly` takes them.
        assembly: makes parameters out of decoded tensors.
        shapes: the parameters' shapes by name.
    """
    params: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    states: dict[str, Codec] = {}  # by parameter that is JSON at rest, the codec that it must describe
    leaves = []
    for i, tensor in enumerate(tensors):
        encoding = tensor.encoding
        components = (("weight", Spec(tensor.shape, tensor.dtype)),) if encoding is None else encoding.components
        names = {component: f"{i}.{component}" for component, _ in components}
        for component, spec in components:
            if encoding is not None and component == STATE:
                states[names[component]] = encoding.codec
            params[names[component]] = spec.dtype, spec.shape
        leaves.append(Leaf(None if encoding is None else encoding.codec, names, tensor.shape))

    def read_states(raw: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        pairs = zip(params, raw, strict=True)
        return {name: offset_of(part, states[name], name) if name in states else part for name, part in pairs}

    if states:
        copies = Assembly(convert=read_states)
    else:
        copies = Assembly(destinations=tuple(Destination(param, 0, 0) for param in params))
    return RawSlot(ExpertLayout.of(params), copies, ExpertDecoding(tuple(leaves), assembly, dict(shapes)))
