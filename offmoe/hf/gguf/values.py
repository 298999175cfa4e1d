"""Undoes what llama.cpp's converter did to values, one function per change.

Each is the inverse of a change in llama.cpp's conversion scripts. All but two permute values. Norms that were stored
as 1 + w, and decay rates that were stored as -exp(a), are computed back in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Undo = Callable[..., torch.Tensor]
"""Takes the decoded tensors of the file and returns the parameter."""


@dataclass(frozen=True)
class MovedRows:
    """An `Undo` of one tensor that only moves whole rows, so that it moves rows of blocks just as well."""

    move: Callable[[torch.Tensor], torch.Tensor]
    """[rows, ...] -> the same shape."""

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return self.move(weight)


def unpermuted(heads: int) -> MovedRows:
    """Rows of query and key heads from pairs of neighbors back to halves."""

    def undo(weight: torch.Tensor) -> torch.Tensor:
        pairs: torch.Tensor = weight.unflatten(0, (heads, -1, 2))  # [heads, dim / 2, 2, ...]
        return pairs.transpose(1, 2).reshape(weight.shape)

    return MovedRows(undo)


def minus_one(weight: torch.Tensor) -> torch.Tensor:
    """The weight of a norm that is stored as 1 + w."""
    return weight.float() - 1


def log_of_negative(weight: torch.Tensor) -> torch.Tensor:
    """The logarithm of a decay rate that is stored as -exp(a)."""
    return torch.log(-weight.float())


def as_row(weight: torch.Tensor) -> torch.Tensor:
    """A matrix with one row, which is stored as a vector: [cols] -> [1, cols]."""
    return weight.reshape(1, -1)


def as_channels(weight: torch.Tensor) -> torch.Tensor:
    """The kernel of a depthwise convolution, whose dimension of size 1 is not stored: [n, k] -> [n, 1, k]."""
    return weight.unsqueeze(1)


def joined(*weights: torch.Tensor) -> torch.Tensor:
    """Matrices below each other."""
    return torch.cat([weight.float() for weight in weights])


def grouped_heads(
    weight: torch.Tensor, groups: int, per_group: int, size: int, start: int = 0, dim: int = 0
) -> torch.Tensor:
    """Value heads from tiled order back to the order of their key heads.

    Args:
        weight: the tensor, [..., start + groups * per_group * size, ...].
        groups: key heads.
        per_group: value heads of each key head.
        size: rows of a head.
        start: rows before the first value head.
        dim: the dimension that counts rows.
    """
    fixed, heads = weight.split([start, weight.shape[dim] - start], dim)
    grouped = heads.unflatten(dim, (per_group, groups, size)).transpose(dim, dim + 1).flatten(dim, dim + 2)
    return torch.cat([fixed, grouped], dim)
