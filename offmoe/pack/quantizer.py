"""Float weights to int4 and int8: scales and zero points that minimize the squared error of each group.

What moves: one weight at a time, through a few passes per candidate scale over values that stay in the nearest cache;
arithmetic bounds it. Rounding to nearest with a scale of max|w| / 7 wastes the sixteenth level and stretches the step
to one outlier. Here the scale is signed, so that the largest value, whatever its sign, lies on level -8; a few narrower
and wider scales are tried beside it; then the scale that fits the chosen levels best (least squares) is taken, twice.
On Gaussian weights in groups of 64 the squared error falls to 0.70 of that of rounding to nearest, 0.66 with zero
points; forty candidates instead of six gain 0.005 more.

The C encoder (kernels/native/encode.h) does the work where it was built. What it gives is defined here, in torch's
operators and in an order of sums that both keep, so the bits are the same with and without a compiler, on every
instruction set and with any number of threads.

What it must never do: pass on a weight that is not finite, or depend on how the rows were cut into blocks.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NamedTuple

import torch

from offmoe.compute.kernels.cpu import physical_cores
from offmoe.compute.kernels.library import SCALE_TYPES, EncodedStruct, EncodingStruct, Library, Threads, status
from offmoe.errors import CapacityError, CheckpointError
from offmoe.pack.loss import Loss, loss_of
from offmoe.quant.packed_weight import SYMMETRIC_ZERO, TILE_ROWS, PackedWeight, WeightFormat, pack_words

BLOCK_VALUES = 1 << 18
"""Values that torch quantizes at once: their intermediates stay in a core's cache."""

FACTORS = (1.0, 8 / 7, 0.94, 0.88, 0.82, 0.76)
"""Scales tried, relative to the one that maps the largest value to the last level. With the first two, what already is
on sixteen or on fifteen levels stays as it is.
"""

REFITS = 2
"""Rounds of fitting the scale to the levels by least squares and rounding again."""

INT8_FACTORS = (1.0, 0.96)
"""One step of int8 is small beside the largest value, so little is gained by cutting it."""

SPAN = 128
"""Values whose sixteen partial sums are added up before the next ones begin; encode.h."""

MAX_FACTORS = 16
"""Of `struct encoding`."""

NOT_FINITE = 3
"""What the encoder answers for such a weight; encode.c."""


class Quantizer(ABC):
    """Quantizes one weight after the other, and says what that lost; a context manager. Threads take turns."""

    @abstractmethod
    def __call__(self, weight: torch.Tensor, how: WeightFormat, name: str = "weight") -> PackedWeight:
        """As `quantize`."""

    @abstractmethod
    def loss(self, weight: torch.Tensor, how: WeightFormat, raw: Mapping[str, torch.Tensor]) -> Loss:
        """As `loss_of`: of weight [N, K] once it is decoded from `raw`."""

    @abstractmethod
    def close(self) -> None:
        """End its threads; idempotent."""

    def __enter__(self) -> Quantizer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class NativeQuantizer(Quantizer):
    """The C encoder with a pool of threads of its own, one per core unless told."""

    def __init__(self, library: Library, threads: int | None = None, variant: str | None = None) -> None:
        self._calls, self._variant = library.calls, library.variant(variant)
        self._threads = Threads(library, physical_cores() if threads is None else threads)

    def __call__(self, weight: torch.Tensor, how: WeightFormat, name: str = "weight") -> PackedWeight:
        rows, cols = _checked(weight, how, name)
        weight = _readable(weight)
        out = _empty(rows, cols, how)
        tried = FACTORS if how.bits == 4 else INT8_FACTORS
        factors = (ctypes.c_float * MAX_FACTORS)(*tried)
        encoding = EncodingStruct(
            weight=weight.data_ptr(),
            words=out.words.data_ptr(),
            scales=out.scales.data_ptr(),
            zeros=None if out.zeros is None else out.zeros.data_ptr(),
            factors=ctypes.addressof(factors),
            rows=rows,
            cols=cols,
            group=how.group or cols,
            bits=how.bits,
            weight_type=_type_number(weight.dtype),
            scale_type=_type_number(how.scale_dtype),
            candidates=len(tried),
            refits=REFITS,
        )
        said = self._calls.offmoe_encode(self._threads.handle, self._variant, ctypes.byref(encoding))
        if said == NOT_FINITE:
            raise _not_finite(name)
        if said:
            raise CapacityError(f"no memory to quantize {name}; use fewer threads")
        return out

    def loss(self, weight: torch.Tensor, how: WeightFormat, raw: Mapping[str, torch.Tensor]) -> Loss:
        weight, (rows, cols) = _readable(weight), weight.shape
        assert all(part.is_contiguous() for part in raw.values())
        assert raw["packed"].shape == (rows, cols // how.word_values)
        assert raw["scale"].shape == (rows, how.groups(cols))
        out = torch.empty(rows, 4)
        encoded = EncodedStruct(
            weight=weight.data_ptr(),
            words=raw["packed"].data_ptr(),
            scales=raw["scale"].data_ptr(),
            zeros=raw["zero"].data_ptr() if how.zero_points else None,
            out=out.data_ptr(),
            rows=rows,
            cols=cols,
            group=how.group or cols,
            bits=how.bits,
            weight_type=_type_number(weight.dtype),
            scale_type=_type_number(raw["scale"].dtype),
        )
        self._calls.offmoe_compare(self._threads.handle, self._variant, ctypes.byref(encoded))
        total, squared, square = out[:, 1:].double().sum(0).tolist()
        return Loss(float(out[:, 0].max()), total, squared, square, rows * cols)

    def close(self) -> None:
        self._threads.close()


class TorchQuantizer(Quantizer):
    """torch's operators, by definition right; about a fortieth of the C encoder's speed."""

    def __call__(self, weight: torch.Tensor, how: WeightFormat, name: str = "weight") -> PackedWeight:
        return _by_blocks(weight, how, name, _fit_asymmetric if how.zero_points else _fit_symmetric)

    def loss(self, weight: torch.Tensor, how: WeightFormat, raw: Mapping[str, torch.Tensor]) -> Loss:
        return loss_of(weight, how, raw)

    def close(self) -> None:
        pass


def quantizer(threads: int | None = None) -> Quantizer:
    """The fastest that this installation and processor have."""
    library = status().library
    return TorchQuantizer() if library is None else NativeQuantizer(library, threads)


def quantize(weight: torch.Tensor, how: WeightFormat, name: str = "weight", search: bool = True) -> PackedWeight:
    """weight [N, K], any float dtype -> words row by row.

    search=False rounds to nearest with symmetric absmax scales, the baseline that benchmarks compare with.
    UnsupportedModelError if the shape is no multiple of tiles and groups; CheckpointError for NaN or infinity.
    """
    if not search:
        return _by_blocks(weight, how, name, _round_to_nearest)
    with quantizer() as one:
        return one(weight, how, name)


class _Fit(NamedTuple):
    """A way to write groups: scale, zero, error [B, 1]; level [B, G]; all float32."""

    scale: torch.Tensor
    zero: torch.Tensor
    level: torch.Tensor
    error: torch.Tensor


Fitting = Callable[[torch.Tensor, WeightFormat], _Fit]
"""Groups [B, G], float32 -> how they are written."""


def _by_blocks(weight: torch.Tensor, how: WeightFormat, name: str, fitting: Fitting) -> PackedWeight:
    rows, cols = _checked(weight, how, name)
    out, groups = _empty(rows, cols, how), how.groups(cols)
    step = max(1, BLOCK_VALUES // cols)
    for start in range(0, rows, step):
        block = weight[start : start + step].float()
        if not torch.isfinite(block).all():
            raise _not_finite(name)
        fit = fitting(block.reshape(-1, cols // groups), how)  # [B, G]
        part = slice(start, start + step)
        out.scales[part] = fit.scale.view(-1, groups)
        if out.zeros is not None:
            out.zeros[part] = fit.zero.view(-1, groups)
        level = fit.level if how.zero_points or how.bits == 8 else fit.level + SYMMETRIC_ZERO
        out.words[part] = pack_words(level.to(torch.uint8 if how.bits == 4 else torch.int8).view(-1, cols), how)
    return out


def _round_to_nearest(w: torch.Tensor, how: WeightFormat) -> _Fit:
    assert not how.zero_points
    top = 2 ** (how.bits - 1)
    return _evaluate(w, w.abs().amax(-1, keepdim=True) / (top - 1), w.new_zeros(()), -top, top - 1, how)


def _fit_symmetric(w: torch.Tensor, how: WeightFormat) -> _Fit:
    top = 2 ** (how.bits - 1)  # levels -top .. top - 1
    high, low = w.amax(-1, keepdim=True), w.amin(-1, keepdim=True)
    step = torch.where(high >= -low, high, low) / -top
    zero = w.new_zeros(())

    def at(scale: torch.Tensor) -> _Fit:
        return _evaluate(w, scale, zero, -top, top - 1, how)

    best = _best(at, [step * factor for factor in (FACTORS if how.bits == 4 else INT8_FACTORS)])
    for _ in range(REFITS):
        best = _better(best, at(_slope(best.level, w)))
    return best


def _fit_asymmetric(w: torch.Tensor, how: WeightFormat) -> _Fit:
    """Levels 0 .. 15 around an integer zero point."""
    high, low = w.amax(-1, keepdim=True).clamp_min(0), w.amin(-1, keepdim=True).clamp_max(0)
    middle, mean, count = (high + low) / 2, _total(w) / w.shape[-1], w.shape[-1]

    def at(scale: torch.Tensor, zero: torch.Tensor) -> _Fit:
        return _evaluate(w, scale, zero.round().clamp(0, 15), 0, 15, how)

    best = _best(lambda scale: at(scale, 7.5 - middle / _usable(scale)), [(high - low) / 15 * f for f in FACTORS])
    for _ in range(REFITS):
        # Scale and zero together, then the scale alone for the zero that was rounded.
        levels = _total(best.level) / count
        scale = _slope(best.level - levels, w - mean)
        best = _better(best, at(scale, levels - mean / _usable(scale)))
        best = _better(best, at(_slope(best.level - best.zero, w), best.zero))
    return best


def _evaluate(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, low: int, high: int, how: WeightFormat) -> _Fit:
    scale = _usable(scale.to(how.scale_dtype).float())  # as it will be read back
    level = (w * (1 / scale)).add_(zero).clamp_(low, high).round_()
    error = _total((level - zero).mul_(scale).sub_(w).square_())
    return _Fit(scale, zero, level, error)


def _best(at: Callable[[torch.Tensor], _Fit], scales: list[torch.Tensor]) -> _Fit:
    best = at(scales[0])
    for scale in scales[1:]:
        best = _better(best, at(scale))
    return best


def _better(a: _Fit, b: _Fit) -> _Fit:
    """Group by group the one with the smaller error; a where they are equal, or b's is not a number."""
    return _Fit(*(torch.where(b.error < a.error, y, x) for x, y in zip(a, b, strict=True)))


def _slope(level: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Of w over the levels, by least squares: [B, G] each -> [B, 1]."""
    return _total(level * w) / _total(level.square()).clamp_min(1.0)


def _total(x: torch.Tensor) -> torch.Tensor:
    """[B, G] -> [B, 1]: sixteen partial sums per span, their halves added, then span by span.

    torch's own sum has another order on every instruction set.
    """
    groups, count = x.shape
    span = next(n for n in (SPAN, 64, 32, TILE_ROWS) if count % n == 0)
    lanes = x.view(groups, count // span, -1, TILE_ROWS)  # [B, spans, chunks, 16]
    sums = lanes[:, :, 0]
    for chunk in range(1, span // TILE_ROWS):
        sums = sums + lanes[:, :, chunk]
    while (half := sums.shape[-1] // 2) > 0:
        sums = sums[..., :half] + sums[..., half:]
    total = sums[:, 0]  # [B, 1]
    for i in range(1, count // span):
        total = total + sums[:, i]
    return total


def _usable(scale: torch.Tensor) -> torch.Tensor:
    """Scales with an inverse: a group of zeros, or of numbers too small for a scale, becomes zeros of scale 1."""
    return torch.where(scale.abs() < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)


def _checked(weight: torch.Tensor, how: WeightFormat, name: str) -> tuple[int, int]:
    rows, cols = weight.shape
    how.check(name, rows, cols)
    assert how.kind in ("int4", "int8"), how
    return rows, cols


def _empty(rows: int, cols: int, how: WeightFormat) -> PackedWeight:
    groups = how.groups(cols)
    words = torch.empty(rows, cols // how.word_values, dtype=torch.int32)
    zeros = torch.empty(rows, groups, dtype=torch.uint8) if how.zero_points else None
    return PackedWeight(how, words, torch.empty(rows, groups, dtype=how.scale_dtype), zeros)


def _readable(weight: torch.Tensor) -> torch.Tensor:
    """Rows of a dtype that the library reads."""
    return (weight if weight.dtype in (torch.bfloat16, torch.float16) else weight.float()).contiguous()


def _type_number(dtype: torch.dtype) -> int:
    return SCALE_TYPES[str(dtype).removeprefix("torch.")]


def _not_finite(name: str) -> CheckpointError:
    return CheckpointError(f"{name} holds NaN or infinity: the checkpoint is damaged, download it again")
