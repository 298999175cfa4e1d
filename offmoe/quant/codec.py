"""What every quantized format is to the rest of offmoe: named raw tensors in, one dense matrix out.

What moves: nothing here; a codec reads raw tensors where they are and writes the matrix beside them, bounded by that
device's memory. Raw bytes stay raw until then, on the disk, on the link and in slots. Decoding is a pure function of
the bytes: the same bits come out whatever was cached. Must never guess: components whose shapes do not describe one
matrix are refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch


class Spec(NamedTuple):
    """Shape and dtype of one raw component."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Codec(Protocol):
    """One format with its parameters; equal codecs decode alike."""

    @property
    def name(self) -> str:
        """What people call the format."""

    @property
    def required(self) -> frozenset[str]:
        """Components without which nothing can be decoded; any other is not this codec's."""

    def shape(self, specs: Mapping[str, Spec]) -> tuple[int, ...]:
        """Of the dense matrix that components of these specs make; ValueError with the reason if they make none."""

    def decode(self, raw: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The dense matrix, contiguous, in `dtype`, on the device of `raw`."""


class Encoding(NamedTuple):
    """How one matrix is stored: equal encodings are decoded alike. components: in the order of a slot."""

    codec: Codec
    components: tuple[tuple[str, Spec], ...]


def codes_of_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes in int32 words, lowest bits first: [..., n] -> uint8 [..., n * 32 / bits]; bits is 4 or 8."""
    octets = words.contiguous().view(torch.uint8)  # [..., 4n], little-endian as in the file
    return octets if bits == 8 else nibbles(octets)


def nibbles(octets: torch.Tensor) -> torch.Tensor:
    """Halves of bytes, the low one first: uint8 [..., n] -> uint8 [..., 2n]."""
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def expect(condition: bool, reason: str) -> None:
    """ValueError(reason) unless `condition`: how codecs refuse what does not fit together."""
    if not condition:
        raise ValueError(reason)
