"""Experts computed on the CPU by the C kernels.

Sums run in another order than torch's, so this is for `exactness="numeric"` only. With int8 activations, every group
of inputs is rounded to 8 bits first, which changes the output by about 1 % of its norm in int4.

Moves: the bytes of the experts of a call through the cores' caches, once per call of up to 64 rows.
Bound: memory bandwidth for one token, arithmetic for many. A call takes some microseconds besides.
Must never: read weights that change. They are read where they stand, in RAM, pinned or mapped; a function that was
prepared for one slot serves no other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from offmoe.compute.kernels.library import (
    KINDS,
    MAX_MULTIPLIED,
    MAX_TOKENS,
    SCALE_TYPES,
    AttentionStruct,
    ExpertStruct,
    Library,
    Threads,
    WeightStruct,
)
from offmoe.device.cores import usable_cores
from offmoe.device.openmp import release_threads
from offmoe.errors import CapacityError
from offmoe.quant.packed_weight import TILE_ROWS, PackedWeight

Weight = PackedWeight | torch.Tensor
"""A weight in tiles, or bf16 [rows, cols]."""

Rows = Callable[[torch.Tensor], torch.Tensor]
"""rows(x [n, in]) -> [n, out] of x's dtype: a prepared weight or expert."""

NativeCall = Callable[[int, int, int], int]
"""call(address of x, number of tokens, address of the output) -> 0, or an error number of expert.c."""

ACTIVATION_GROUPS = (128, 64, 32, 16)
"""Inputs that share a scale, for the activations of int8 weights: the largest number that divides a row."""

SEVERAL_ROWS = 12
"""Rows that torch's threads may have converted. Those are ended then, in 0.1 ms: they would spin for ms on the cores of
the kernels' threads."""

TOO_MANY = 1
"""Error number of expert.c for more rows or experts than a call takes."""

BF16_GROUP = 32
"""A row of bf16 weights is a multiple of so many columns."""


@dataclass(frozen=True)
class Glu:
    """The function that combines gate and up."""

    kind: str = "silu"
    """"silu" or "gelu_tanh" of the gate, times up; or "clamped", the function of gpt-oss: gate clamped to at most
    `limit`, times sigmoid(alpha * gate), times (up clamped to +-limit, + 1)."""
    limit: float = 7.0
    alpha: float = 1.702

    KINDS = ("silu", "gelu_tanh", "clamped")

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The definition, in torch."""
        if self.kind == "silu":
            return F.silu(gate) * up
        if self.kind == "gelu_tanh":
            return F.gelu(gate, approximate="tanh") * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)


@dataclass(frozen=True)
class GatedExpert:
    """Weights of one expert: gate and up [I, H], down [H, I]; biases float32 or None."""

    gate: Weight
    up: Weight
    down: Weight
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


class PreparedExpert:
    """An expert as the C kernels are given it. It keeps the memory of its weights alive."""

    def __init__(self, weights: GatedExpert, glu: Glu) -> None:
        gate = _struct(weights.gate, weights.gate_bias)
        up = _struct(weights.up, weights.up_bias)
        down = _struct(weights.down, weights.down_bias)
        assert (gate.kind, gate.rows, gate.cols) == (up.kind, up.rows, up.cols), "gate and up differ"
        assert (down.rows, down.cols) == (up.cols, up.rows), "down does not take what up gives"
        self.struct = ExpertStruct(gate, up, down, Glu.KINDS.index(glu.kind), glu.limit, glu.alpha)
        self._weights = weights
        self.hidden: int = down.rows
        """Numbers of an input row and of an output row."""
        self.address = ctypes.addressof(self.struct)


class PreparedWeight:
    """A linear layer's weight as the C kernels are given it. It keeps the memory of the weight alive."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None = None) -> None:
        self.struct = _struct(weight, bias)
        self._alive = weight, bias


class CpuKernels:
    """The C kernels, with a pool of threads of their own; a context manager.

    Functions that it has prepared must not be called after `close`.
    """

    def __init__(
        self,
        library: Library,
        threads: int | CpuKernels | None = None,
        variant: str | None = None,
        int8_activations: bool = True,
    ) -> None:
        """Start the threads.

        Args:
            threads: their number; None: as many as there are cores; or kernels whose threads these share, and
                which are closed after them. Two pools would take cores from each other while they wait for work.
            variant: one of `library.variants`; None: the fastest.
            int8_activations: whether activations are rounded to 8 bits; otherwise they stay float32.
        """
        self._calls, self._variant = library.calls, library.variant(variant)
        self.many_rows: int | None = library.calls.offmoe_many_tokens(self._variant) or None
        """From how many rows on bf16 weights are faster by `product_of` than by `linear_of`; None: never."""
        self.int8_activations = int8_activations
        self.precision = 0 if int8_activations else 1
        self._owns_threads = not isinstance(threads, CpuKernels)
        self._threads: Threads = (
            threads._threads
            if isinstance(threads, CpuKernels)
            else Threads(library, usable_cores() if threads is None else threads)
        )

    def experts(
        self, experts: Sequence[PreparedExpert], x: torch.Tensor, counts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Experts of one width on their inputs, all in one call.

        Args:
            experts: 1 to MAX_TOKENS of them.
            x: float32 [n, H], the inputs of one expert behind those of the other, at most MAX_TOKENS. Without counts
                it is one row, which every expert gets.
            counts: per expert, the number of its inputs, 1 or more.

        Returns:
            float32 [n, H], in the order of the inputs; without counts a row per expert.

        Raises:
            CapacityError: There is no memory for the activations.
        """
        hidden, num_experts = experts[0].hidden, len(experts)
        assert x.dtype == torch.float32
        assert x.shape == (1 if counts is None else sum(counts), hidden), (x.shape, counts)
        x = x.contiguous()
        out = torch.empty(num_experts if counts is None else len(x), hidden)
        code = self._calls.offmoe_experts(
            self._threads.handle,
            self._variant,
            (ctypes.c_void_p * num_experts)(*[expert.address for expert in experts]),
            None if counts is None else (ctypes.c_int32 * num_experts)(*counts),
            num_experts,
            self.precision,
            x.data_ptr(),
            out.data_ptr(),
        )
        assert code != TOO_MANY, (num_experts, counts)
        if code:
            raise CapacityError("no memory for the activations of a layer's experts; run fewer tokens at once")
        return out

    def expert(self, weights: GatedExpert, glu: Glu) -> Rows:
        """A function that computes down(glu(gate(x), up(x))). It keeps the weights' memory alive."""
        return self.rows_of(PreparedExpert(weights, glu))

    def rows_of(self, expert: PreparedExpert) -> Rows:
        """A function that computes one expert on any number of inputs."""
        experts, native, variant = (ctypes.c_void_p * 1)(expert.address), self._calls.offmoe_experts, self._variant

        def call(x: int, tokens: int, out: int) -> int:
            count = ctypes.byref(ctypes.c_int32(tokens))
            return native(self._threads.handle, variant, experts, count, 1, self.precision, x, out)  # type: ignore[no-any-return]

        return _rows(call, expert.hidden, expert.hidden, expert)

    def linear(self, weight: Weight, bias: torch.Tensor | None = None) -> Rows:
        """A function that computes x w^T + bias. It keeps the weight's memory alive."""
        return self.linear_of(PreparedWeight(weight, bias))

    def linear_of(self, weight: PreparedWeight) -> Rows:
        """A function that computes x w^T + bias."""
        struct, pointer = weight.struct, ctypes.byref(weight.struct)
        native, variant = self._calls.offmoe_linear, self._variant

        def call(x: int, tokens: int, out: int) -> int:
            return native(self._threads.handle, variant, pointer, self.precision, x, tokens, out)  # type: ignore[no-any-return]

        return _rows(call, struct.cols, struct.rows, weight)

    def product_of(self, weight: PreparedWeight) -> Rows:
        """A function that computes x w^T + bias for a bf16 weight and bf16 inputs, for `many_rows` of them or more."""
        struct, pointer = weight.struct, ctypes.byref(weight.struct)
        assert struct.kind == KINDS["bf16"], struct.kind
        native, variant = self._calls.offmoe_multiply, self._variant

        def run(x: torch.Tensor, alive: object = weight) -> torch.Tensor:
            assert x.ndim == 2 and x.shape[1] == struct.cols and x.dtype == torch.bfloat16, x.shape  # noqa: PT018
            inputs, out = x.contiguous(), torch.empty(len(x), struct.rows, dtype=x.dtype)
            source, destination = inputs.data_ptr(), out.data_ptr()
            release_threads()
            calls = -(-len(x) // MAX_MULTIPLIED)
            for start, end in pairwise(len(x) * i // calls for i in range(calls + 1)):
                at, to = source + 2 * struct.cols * start, destination + 2 * struct.rows * start
                code = native(self._threads.handle, variant, pointer, at, end - start, to)
                assert code != TOO_MANY, end - start
                if code:
                    raise CapacityError("no memory for the inputs of one layer; run fewer tokens at once")
            return out

        return run

    def function(self, name: str) -> Callable[..., Any]:
        """A function of the library that takes threads and a variant first: with these."""
        native, variant = getattr(self._calls, name), self._variant
        return lambda *arguments: native(self._threads.handle, variant, *arguments)

    def norm(self, *arguments: Any) -> None:
        """`offmoe_norm` of the library, in the calling thread."""
        self._calls.offmoe_norm(self._variant, *arguments)

    def attention_floats(self, struct: AttentionStruct) -> int:
        """Floats of the memory that the two calls of a layer's attention share."""
        return int(self._calls.offmoe_attention_floats(ctypes.byref(struct)))

    def layers_bytes(self, layers: int, count: int) -> int:
        """Bytes of the memory that `count` layers at an address compute with."""
        return int(self._calls.offmoe_layers_bytes(layers, count))

    def read(self, memory: torch.Tensor) -> None:
        """Read contiguous memory with all threads as fast as they can: the bound that kernels are compared with."""
        self._calls.offmoe_read(self._threads.handle, self._variant, memory.data_ptr(), memory.nbytes)

    def close(self) -> None:
        """End the threads, unless they are others'; idempotent."""
        if self._owns_threads:
            self._threads.close()

    def __enter__(self) -> CpuKernels:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def kernel_threads() -> int:
    """Threads for the kernels beside a model: as many as torch has now, but no more than there are cores."""
    return min(torch.get_num_threads(), usable_cores())


def _struct(weight: Weight, bias: torch.Tensor | None) -> WeightStruct:
    """The C structure of a weight of a format and shape that the kernels have; `cpu_slot` makes no other slots."""
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
    out = WeightStruct(bias=None if bias is None else bias.data_ptr())
    if isinstance(weight, PackedWeight):
        how = weight.format
        assert how.group is not None or how.kind == "int8", f"kernels have no {how}"
        assert (how.group or 0) <= ACTIVATION_GROUPS[0], f"kernels have no {how}"
        assert weight.is_tiled, "kernels read tiles"
        assert all(part.is_contiguous() for part in weight.params("").values())
        out.words, out.scales = weight.words.data_ptr(), weight.scales.data_ptr()
        for plane in ("zeros", "minima", "high", "supers"):
            part = getattr(weight, plane)
            setattr(out, plane, None if part is None else part.data_ptr())
        kind = "int8 in groups" if how.kind == "int8" and how.group else how.kind
        out.rows, out.cols, out.kind = weight.rows, weight.cols, KINDS[kind]
        out.group = how.group or next(g for g in ACTIVATION_GROUPS if weight.cols % g == 0)
        out.scale_type = SCALE_TYPES[str(how.scale_dtype).removeprefix("torch.")]
        return out
    rows, cols = weight.shape
    assert weight.dtype == torch.bfloat16, f"kernels have no {weight.dtype}"
    assert rows % TILE_ROWS == cols % BF16_GROUP == 0, f"kernels have no bf16 of [{rows}, {cols}]"
    assert weight.is_contiguous()
    out.words, out.rows, out.cols, out.kind, out.group = weight.data_ptr(), rows, cols, KINDS["bf16"], BF16_GROUP
    return out


def _rows(call: NativeCall, cols: int, rows: int, alive: object) -> Rows:
    """A function of any number of tokens, from a call of up to MAX_TOKENS. alive: what the C structures point to.

    A small expert takes 0.1 ms and every torch call some microseconds, so conversions are skipped where possible.
    """

    def run(x: torch.Tensor, alive: object = alive) -> torch.Tensor:
        tokens = x.shape[0]
        assert x.ndim == 2 and x.shape[1] == cols, (x.shape, cols)  # noqa: PT018
        inputs = x if x.dtype == torch.float32 else x.float()
        if not inputs.is_contiguous():
            inputs = inputs.contiguous()
        out = torch.empty(tokens, rows)
        if tokens >= SEVERAL_ROWS:
            release_threads()
        source, destination = inputs.data_ptr(), out.data_ptr()
        for start in range(0, tokens, MAX_TOKENS):
            n = min(MAX_TOKENS, tokens - start)
            if call(source + 4 * cols * start, n, destination + 4 * rows * start):
                raise CapacityError("no memory for the activations of one expert; run fewer tokens at once")
        return out if x.dtype == torch.float32 else out.to(x.dtype)

    return run
