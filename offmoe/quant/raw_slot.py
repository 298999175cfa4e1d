"""How the raw tensors of one quantized expert stand in a slot, and how they get there.

What moves: every component as it is at rest, one copy each; bounded by the link. The exception is the JSON of
bitsandbytes, whose length varies from expert to expert: the number in it that decoding needs is taken out on the host.
Must never let an expert into a slot that is quantized otherwise than its layer's others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from offmoe.errors import CheckpointError
from offmoe.quant.bitsandbytes import read_state
from offmoe.quant.codec import Codec, Encoding, Spec
from offmoe.quant.decode import ExpertDecoding, Leaf
from offmoe.storage.layout import Assembly, Destination, ExpertLayout

STATE = "offset"
"""Component of bitsandbytes that is JSON at rest; of it, only the number that it is named after reaches a slot."""
OFFSET = Spec((), torch.float32)
"""That number."""


def offset_of(state: torch.Tensor, codec: Codec, name: str) -> torch.Tensor:
    """bitsandbytes' JSON -> float32 []; CheckpointError unless it describes what the first weight of its kind was."""
    try:
        found, offset = read_state(state.numpy().tobytes())
    except ValueError as error:
        raise CheckpointError(f"quantized weight {name!r} cannot be decoded: {error}; download it again") from error
    if found != codec:
        raise CheckpointError(
            f"quantized weight {name!r} is {found}, others of its kind are {codec}; quantize the model anew"
        )
    return torch.tensor(offset, dtype=torch.float32)


@dataclass(frozen=True)
class RawPlacement:
    """An `Assembly.convert` that takes segments as they are, except bitsandbytes' JSON.

    params: per segment, its place in the slot. states: segments that are JSON -> the codec they must describe.
    """

    params: tuple[str, ...]
    states: Mapping[int, Codec]

    def __call__(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            param: offset_of(tensor, self.states[i], param) if i in self.states else tensor
            for i, (param, tensor) in enumerate(zip(self.params, tensors, strict=True))
        }


class Source(Protocol):
    """One tensor of an expert: dense shape and dtype, and the encoding if it is quantized."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def encoding(self) -> Encoding | None: ...


class RawSlot(NamedTuple):
    """How experts of a layer stand in slots: the layout, how segments get there, the way back to parameters."""

    layout: ExpertLayout
    assembly: Assembly
    decode: ExpertDecoding | None


def raw_slot(sources: Sequence[Source], assembly: Assembly, shapes: Mapping[str, tuple[int, ...]]) -> RawSlot:
    """A slot that holds one expert as it is stored.

    sources: of `assembly`, which makes parameters of `shapes` out of them decoded.
    """
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    states: dict[int, Codec] = {}
    leaves = []
    for i, source in enumerate(sources):
        encoding = source.encoding
        parts = (("weight", Spec(source.shape, source.dtype)),) if encoding is None else encoding.components
        names = {component: f"{i}.{component}" for component, _ in parts}
        for component, spec in parts:
            if encoding is not None and component == STATE:
                states[len(wanted)] = encoding.codec
            wanted[names[component]] = spec.dtype, spec.shape
        leaves.append(Leaf(None if encoding is None else encoding.codec, names, source.shape))
    if states:
        placing = Assembly(convert=RawPlacement(tuple(wanted), states))
    else:
        placing = Assembly(destinations=tuple(Destination(param, 0, 0) for param in wanted))
    return RawSlot(ExpertLayout.of(wanted), placing, ExpertDecoding(tuple(leaves), assembly, dict(shapes)))
