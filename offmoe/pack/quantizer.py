"""Quantizes float weights to int4 and int8, and measures what that changed.

`fit` defines the result in torch's operators. The C encoder (compute/kernels/native/encode.h) gives the same bits about
forty times as fast where it was built. The loss is measured on the tensors that will be written, so that a mistake on
the way to them shows too. A weight that is not finite is refused.
"""

from __future__ import annotations

import ctypes
import math
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from offmoe.compute.kernels.library import SCALE_TYPES, EncodedStruct, EncodingStruct, Library, Threads, status
from offmoe.device.cores import usable_cores
from offmoe.errors import CapacityError, CheckpointError
from offmoe.pack.fit import FACTORS, INT8_FACTORS, REFITS, Fitting, fit_asymmetric, fit_symmetric
from offmoe.quant.int_formats import PackedInt
from offmoe.quant.packed_weight import SYMMETRIC_ZERO, TILE_ROWS, PackedWeight, WeightFormat, pack_words

BLOCK_VALUES = 1 << 18
"""Weights that torch quantizes or compares at once, so that intermediates stay in a core's cache."""

MAX_FACTORS = 16
"""The most scales that `struct encoding` of the C encoder holds."""

NOT_FINITE = 3
"""The C encoder's status for a weight that is not finite (encode.c)."""


@dataclass(frozen=True)
class Loss:
    """What quantizing changed.

    Args:
        max_error: the largest |error|.
        total_error: sum of |error|.
        total_squared: sum of error^2.
        total_square: sum of weight^2.
        values: number of weights.
    """

    max_error: float = 0.0
    total_error: float = 0.0
    total_squared: float = 0.0
    total_square: float = 0.0
    values: int = 0

    def __add__(self, other: Loss) -> Loss:
        return Loss(
            max(self.max_error, other.max_error),
            self.total_error + other.total_error,
            self.total_squared + other.total_squared,
            self.total_square + other.total_square,
            self.values + other.values,
        )

    @property
    def mean_error(self) -> float:
        """Mean |error|."""
        return self.total_error / max(1, self.values)

    @property
    def relative_error(self) -> float:
        """The norm of the error divided by the norm of the weights."""
        return math.sqrt(self.total_squared / self.total_square) if self.total_square else 0.0


class Quantizer(AbstractContextManager["Quantizer"]):
    """Quantizes weights one at a time, and measures the loss. A context manager; threads that call it take turns."""

    @abstractmethod
    def __call__(self, weight: torch.Tensor, how: WeightFormat, name: str = "weight") -> PackedWeight:
        """Quantize one weight.

        Args:
            weight: [N, K], any float dtype.
            how: an int4 or int8 format.
            name: the weight's name for messages.

        Returns:
            The weight row by row.

        Raises:
            UnsupportedModelError: the format cannot hold the shape.
            CheckpointError: the weight holds NaN or infinity.
        """

    @abstractmethod
    def loss(self, weight: torch.Tensor, how: WeightFormat, raw: Mapping[str, torch.Tensor]) -> Loss:
        """Compare a weight with what its file will decode to.

        Args:
            weight: the original, [N, K], any float dtype.
            how: the format it was quantized to.
            raw: the quantized weight as `PackedInt` takes it: packed, scale and, with zero points, zero.
        """

    def close(self) -> None:
        """End the quantizer's threads, if it has any. Idempotent."""

    def __exit__(self, *error: object) -> None:
        self.close()


class NativeQuantizer(Quantizer):
    """The C encoder, with a pool of threads of its own.

    Args:
        library: the compiled kernels.
        threads: size of the pool; None: one per physical core.
        variant: instruction set; None: the best that the processor has.
    """

    def __init__(self, library: Library, threads: int | None = None, variant: str | None = None) -> None:
        self._calls, self._variant = library.calls, library.variant(variant)
        self._threads = Threads(library, usable_cores() if threads is None else threads)

    def __call__(self, weight: torch.Tensor, how: WeightFormat, name: str = "weight") -> PackedWeight:
        out, weight = _empty(weight, how, name), _readable(weight)
        tried = FACTORS if how.bits == 4 else INT8_FACTORS
        factors = (ctypes.c_float * MAX_FACTORS)(*tried)
        encoding = EncodingStruct(
            **_fields(weight, how, out.words, out.scales, out.zeros),
            factors=ctypes.addressof(factors),
            candidates=len(tried),
            refits=REFITS,
        )
        result = self._calls.offmoe_encode(self._threads.handle, self._variant, ctypes.byref(encoding))
        if result == NOT_FINITE:
            raise _not_finite(name)
        if result:
            raise CapacityError(f"no memory to quantize {name}; use fewer threads")
        return out

    def loss(self, weight: torch.Tensor, how: WeightFormat, raw: Mapping[str, torch.Tensor]) -> Loss:
        weight, (rows, cols) = _readable(weight), weight.shape
        assert all(part.is_contiguous() for part in raw.values())
        assert raw["packed"].shape == (rows, cols // how.word_values)
        assert raw["scale"].shape == (rows, how.groups(cols))
        out = torch.empty(rows, 4)
        fields = _fields(weight, how, raw["packed"], raw["scale"], raw["zero"] if how.zero_points else None)
        encoded = EncodedStruct(**fields, out=out.data_ptr())
        self._calls.offmoe_compare(self._threads.handle, self._variant, ctypes.byref(encoded))
        total, squared, square = out[:, 1:].double().sum(0).tolist()
        return Loss(float(out[:, 0].max()), total, squared, square, rows * cols)

    def close(self) -> None:
        self._threads.close()


class TorchQuantizer(Quantizer):
    """torch's operators: the definition, at about a fortieth of the C encoder's speed.

    Args:
        fitting: how groups are quantized; None: by the fit of least error that the format has.
    """

    def __init__(self, fitting: Fitting | None = None) -> None:
        self._fitting = fitting

    def __call__(self, weight: torch.Tensor, how: WeightFormat, name: str = "weight") -> PackedWeight:
        fitting = self._fitting or (fit_asymmetric if how.zero_points else fit_symmetric)
        rows, cols = weight.shape
        out, groups = _empty(weight, how, name), how.groups(cols)
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

    def loss(self, weight: torch.Tensor, how: WeightFormat, raw: Mapping[str, torch.Tensor]) -> Loss:
        codec = PackedInt(how.bits, how.group, symmetric=not how.zero_points)
        total, (count, cols) = Loss(), weight.shape
        rows = max(TILE_ROWS, BLOCK_VALUES // cols // TILE_ROWS * TILE_ROWS)
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            part = {"packed": raw["packed"][start:stop], "scale": raw["scale"][start:stop]}
            if "zero" in raw:
                part["zero"] = raw["zero"][start // how.word_values : stop // how.word_values]
            block = weight[start:stop].float().reshape(-1)
            error = codec.decode(part, torch.float32).view(-1).sub_(block).abs_()
            total += Loss(
                max_error=float(error.max()),
                total_error=float(error.sum()),
                total_squared=float(error.dot(error)),
                total_square=float(block.dot(block)),
                values=block.numel(),
            )
        return total


def quantizer(threads: int | None = None) -> Quantizer:
    """The fastest quantizer that this installation has. threads: as `NativeQuantizer`."""
    library = status().library
    return TorchQuantizer() if library is None else NativeQuantizer(library, threads)


def _empty(weight: torch.Tensor, how: WeightFormat, name: str) -> PackedWeight:
    """The packed weight to fill; an error if the format cannot hold it."""
    rows, cols = weight.shape
    how.check(name, rows, cols)
    assert how.kind in ("int4", "int8"), how
    groups = how.groups(cols)
    words = torch.empty(rows, cols // how.word_values, dtype=torch.int32)
    zeros = torch.empty(rows, groups, dtype=torch.uint8) if how.zero_points else None
    return PackedWeight(how, words, torch.empty(rows, groups, dtype=how.scale_dtype), zeros)


def _readable(weight: torch.Tensor) -> torch.Tensor:
    """The weight, contiguous, in a dtype that the library reads."""
    return (weight if weight.dtype in (torch.bfloat16, torch.float16) else weight.float()).contiguous()


def _fields(
    weight: torch.Tensor, how: WeightFormat, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> dict[str, Any]:
    """The fields that the C encoder's two structs share."""
    rows, cols = weight.shape
    weight_type, scale_type = (SCALE_TYPES[str(t.dtype).removeprefix("torch.")] for t in (weight, scales))
    return {
        "weight": weight.data_ptr(),
        "words": words.data_ptr(),
        "scales": scales.data_ptr(),
        "zeros": None if zeros is None else zeros.data_ptr(),
        **{"rows": rows, "cols": cols, "group": how.group or cols, "bits": how.bits},
        **{"weight_type": weight_type, "scale_type": scale_type},
    }


def _not_finite(name: str) -> CheckpointError:
    return CheckpointError(f"{name} holds NaN or infinity: the checkpoint is damaged, download it again")
