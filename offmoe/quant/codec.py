"""The contract of a quantized format: a codec turns named raw tensors into one dense matrix, and nothing else.

Experts stay quantized on the disk, on the link and in slots; a codec decodes them where they stand. Decoding depends on
the bytes alone, so the same bits result whatever was cached. A codec refuses components that do not describe one matrix
before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch


class Spec(NamedTuple):
    """Shape and dtype of one raw tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Codec(Protocol):
    """One quantized format with its parameters. Equal codecs decode alike. A raw tensor is called a component."""

    @property
    def name(self) -> str:
        """The format's usual name, such as "gptq int4"."""

    @property
    def required(self) -> frozenset[str]:
        """The components of one matrix: all are needed, and no other is accepted."""

    def shape(self, specs: Mapping[str, Spec]) -> tuple[int, ...]:
        """The shape of the dense matrix.

        Args:
            specs: shape and dtype of each component.

        Raises:
            ValueError: the components do not describe one matrix; the message gives the reason.
        """

    def decode(self, raw: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Decode one matrix.

        Args:
            raw: the components, all on one device.
            dtype: dtype of the result.

        Returns:
            The dense matrix of shape `shape(...)`, contiguous, on the device of `raw`.
        """


class Encoding(NamedTuple):
    """How one matrix is stored: its codec, and its components in the order in which they stand in a slot."""

    codec: Codec
    components: tuple[tuple[str, Spec], ...]


class Kind(NamedTuple):
    """What the same tensor of all experts of a layer has in common.

    Args:
        shape: for one expert; of a quantized tensor, the decoded shape.
        dtype: the dtype; of a quantized tensor, a placeholder.
        encoding: how the tensor is quantized; None if it is not.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    encoding: Encoding | None = None


def codes_of_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack unsigned codes, lowest bits first: words int32 [..., n] -> uint8 [..., n * 32 / bits]. bits: 4 or 8."""
    octets = words.contiguous().view(torch.uint8)  # [..., 4n], little-endian as in the file
    return octets if bits == 8 else nibbles(octets)


def nibbles(octets: torch.Tensor) -> torch.Tensor:
    """Split bytes into halves, the low one first: uint8 [..., n] -> uint8 [..., 2n]."""
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def expect(condition: bool, reason: str) -> None:
    """Raise ValueError(reason) unless `condition` holds."""
    if not condition:
        raise ValueError(reason)
