"""The attention of one layer for one new token by two calls of the C kernels, between which its key is cached.

transformers' modules take some forty operators for it, about 0.5 ms of one core however few bytes move.

Moves: the projections' weights, and the layer's keys and values, once.
Bound: memory bandwidth.
Must never: read a weight that changed since it was prepared, or be called after the kernels were closed.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import NamedTuple

import torch

from offmoe.compute.kernels.cpu import CpuKernels, PreparedWeight
from offmoe.compute.kernels.library import AttentionStruct
from offmoe.errors import CapacityError

WIDTH_MULTIPLE = 32
"""The width of a head is a multiple of it."""
MAX_ROTARY = 1024


class Norm(IntEnum):
    """How an RMS norm of bf16 rounds; `enum norm` of offmoe.h."""

    ROUNDS_TWICE = 0
    """x / rms to bf16, then times the weight."""
    ROUNDS_ONCE = 1
    OF_ONE_MORE = 2
    """Times 1 + weight, rounded once."""


class HeadNorms(NamedTuple):
    """RMS norms of the heads of queries and keys. Weights: bf16 [width]."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float
    kind: Norm


class Projections(NamedTuple):
    """Weights [heads * width, hidden], [groups * width, hidden] twice, [hidden, heads * width]."""

    q: PreparedWeight
    k: PreparedWeight
    v: PreparedWeight
    out: PreparedWeight

    def fit(self, width: int) -> bool:
        """Whether these are projections of one input to heads of this width, and of all heads to one output."""
        (queries, hidden), (keys, _), *others, (_, attended) = [(w.struct.rows, w.struct.cols) for w in self]
        is_attention = (self.k.struct.cols, *others, attended) == (hidden, (keys, hidden), queries)
        return is_attention and width % WIDTH_MULTIPLE == queries % width == keys % width == queries % keys == 0


class Heads(NamedTuple):
    """One token's queries, as the kernels keep them, and its key and value: bf16 [1, groups, 1, width]."""

    queries: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class TokenAttention:
    """The attention of one layer, prepared."""

    def __init__(
        self,
        kernels: CpuKernels,
        projections: Projections,
        *,
        width: int,
        rotary: int,
        scale: float,
        norms: HeadNorms | None = None,
    ) -> None:
        """Prepare the calls.

        Args:
            kernels: whose threads compute.
            projections: the weights.
            width: numbers of a head.
            rotary: those of them that are rotated, from the first on; number i goes with number rotary / 2 + i.
            scale: of scores.
            norms: of heads, before they are rotated.
        """
        assert projections.fit(width), width
        assert rotary <= min(width, MAX_ROTARY)
        assert rotary % 2 == 0
        if norms is not None:
            assert all(weight.dtype == torch.bfloat16 and weight.shape == (width,) for weight in norms[:2])
        pointers = [ctypes.pointer(weight.struct) for weight in projections]
        self._struct = AttentionStruct(
            *pointers,
            q_norm=None if norms is None else norms.q.data_ptr(),
            k_norm=None if norms is None else norms.k.data_ptr(),
            width=width,
            rotary=rotary,
            norm=0 if norms is None else norms.kind,
            eps=0.0 if norms is None else norms.eps,
            scale=scale,
        )
        self._alive = projections, norms
        self._heads, self._attend = kernels.function("offmoe_heads"), kernels.function("offmoe_attend")
        self._reference, self._precision = ctypes.byref(self._struct), kernels.precision
        self._floats = kernels.attention_floats(self._struct)
        self._key_shape = (1, projections.k.struct.rows // width, 1, width)
        self.hidden, self.rotary = projections.q.struct.cols, rotary
        self.like_states = tuple(torch.empty(self._key_shape, dtype=torch.bfloat16) for _ in range(2))
        """A key and a value as a token has them, without content."""
        self.address = ctypes.addressof(self._struct)

    def heads(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Heads:
        """The heads of one token.

        Args:
            x: bf16 [1, 1, hidden], contiguous.
            cos, sin: bf16 [1, 1, rotary], contiguous.

        Raises:
            CapacityError: there is no memory.
        """
        key = torch.empty(self._key_shape, dtype=torch.bfloat16)
        value = torch.empty(self._key_shape, dtype=torch.bfloat16)
        queries = torch.empty(self._floats)
        _check(
            self._heads(
                self._reference,
                self._precision,
                x.data_ptr(),
                cos.data_ptr(),
                sin.data_ptr(),
                queries.data_ptr(),
                key.data_ptr(),
                value.data_ptr(),
            )
        )
        return Heads(queries, key, value)

    def attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The layer's output, bf16 [1, 1, hidden].

        Args:
            queries: of `heads`; used up.
            keys, values: bf16 [1, groups, T, width] of all tokens up to this one; a group's are contiguous.

        Raises:
            CapacityError: there is no memory.
        """
        out = torch.empty((1, 1, self._struct.out.contents.rows), dtype=torch.bfloat16)
        _check(
            self._attend(
                self._reference,
                self._precision,
                keys.data_ptr(),
                values.data_ptr(),
                keys.shape[2],
                keys.stride(1),
                values.stride(1),
                queries.data_ptr(),
                out.data_ptr(),
            )
        )
        return out


class RowNorm:
    """The RMS norm of rows of bf16, by the kernels of one library."""

    def __init__(self, kernels: CpuKernels, kind: Norm, eps: float) -> None:
        self._norm, self.kind, self.eps = kernels.norm, kind, eps

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The norm of x bf16 [..., n], contiguous; weight bf16 [n], n a multiple of 16."""
        out, width = torch.empty_like(x), len(weight)
        rows = x.numel() // width
        self._norm(x.data_ptr(), weight.data_ptr(), rows, width, self.eps, self.kind, out.data_ptr())
        return out


def _check(code: int) -> None:
    if code:
        raise CapacityError("no memory for the attention of one token; free some")
