"""Weights in 8-bit or 4-bit floating point with scales: FP8 (DeepSeek-V3, vLLM) and MXFP4 (gpt-oss).

Products are formed in float32 and rounded once, as when transformers 5.23 dequantizes (integrations/finegrained_fp8.py
Fp8Dequantize, integrations/mxfp4.py convert_moe_packed_tensors). The size of an FP8 block comes from the config, never
from the size of the scale grid: 192 rows have two rows of scales in blocks of 128 and in blocks of 96 (transformers
5.23 assumes the latter on a CPU).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offmoe.quant.codec import Spec, expect, nibbles

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
"""The dtypes that scales may have. uint8 holds exponents of two, as float8_e8m0fnu does."""


@dataclass(frozen=True)
class ScaledFloat:
    """FP8 weights [rows, cols] with one scale per block, per row or for the whole matrix.

    Components: weight (FP8), scale.

    Args:
        block: (rows, cols) of a block; blocks at the end may be smaller. None: scales per block are refused.
    """

    block: tuple[int, int] | None = None
    name = "fp8"
    required = frozenset({"weight", "scale"})

    def shape(self, specs: Mapping[str, Spec]) -> tuple[int, ...]:
        weight, scale = specs["weight"], specs["scale"]
        expect(weight.dtype in FP8, f"its weight is {weight.dtype}, not FP8")
        expect(len(weight.shape) == 2, f"its weight has {len(weight.shape)} dimensions")
        expect(scale.dtype in SCALES, f"its scale is {scale.dtype}")
        fits = self._by_block(weight.shape, scale.shape) or _by_row(weight.shape, scale.shape)
        blocks = "rows" if self.block is None else f"blocks of {list(self.block)}"
        expect(fits, f"its scale has shape {list(scale.shape)}, the weight {list(weight.shape)} in {blocks}")
        return weight.shape

    def decode(self, raw: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        scale = _float_scales(raw["scale"])
        weight = raw["weight"].float()  # [rows, cols]
        if not self._by_block(weight.shape, scale.shape):
            return weight.mul_(scale.reshape(-1, 1)).to(dtype)
        assert self.block is not None
        (rows, cols), (high, wide) = weight.shape, self.block
        scale = scale.repeat_interleave(high, dim=0)[:rows]  # [rows, cols / wide]
        whole = cols // wide * wide
        weight[:, :whole].view(rows, -1, wide).mul_(scale[:, : cols // wide, None])
        weight[:, whole:].mul_(scale[:, cols // wide :])
        return weight.to(dtype)

    def scales_of_groups(self, weight: tuple[int, ...], scale: torch.Tensor, group: int) -> torch.Tensor:
        """The scale of every row and group of columns.

        Args:
            weight: the weight's shape, (rows, cols).
            scale: the component.
            group: columns per group; divides the blocks' columns and cols.

        Returns:
            float32 [rows, cols / group]; a view where all groups of a row share one scale.
        """
        rows, cols = weight
        scale = _float_scales(scale)
        if not self._by_block(weight, scale.shape):
            return scale.reshape(-1, 1).expand(rows, cols // group)
        assert self.block is not None
        high, wide = self.block
        scale = scale.repeat_interleave(wide // group, dim=1)[:, : cols // group]
        return scale.repeat_interleave(high, dim=0)[:rows]

    def _by_block(self, weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
        return self.block is not None and tuple(scale) == tuple(
            -(-size // step) for size, step in zip(weight, self.block, strict=True)
        )


def _float_scales(scale: torch.Tensor) -> torch.Tensor:
    return scale.view(torch.float8_e8m0fnu).float() if scale.dtype == torch.uint8 else scale.float()


def _by_row(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    return scale in ((), (1,), (1, 1), weight[:1], (weight[0], 1))


@dataclass(frozen=True)
class Mxfp4:
    """MXFP4 as gpt-oss stores it. Decodes to [in, out], the order in which its experts multiply.

    Components: blocks uint8 [out, groups, 16] (two weights per byte, the low half first), scales uint8 [out, groups]
    (exponents of two, bias 127).
    """

    name = "mxfp4"
    required = frozenset({"blocks", "scales"})

    def shape(self, specs: Mapping[str, Spec]) -> tuple[int, ...]:
        blocks, scales = specs["blocks"], specs["scales"]
        expect(blocks.dtype == scales.dtype == torch.uint8, f"its blocks are {blocks.dtype}, its scales {scales.dtype}")
        expect(
            len(blocks.shape) == 3 and blocks.shape[2] == 16 and scales.shape == blocks.shape[:2],
            f"its blocks have shape {list(blocks.shape)}, its scales {list(scales.shape)}",
        )
        out, groups, _ = blocks.shape
        return groups * 32, out

    def decode(self, raw: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        codes = nibbles(raw["blocks"])  # [out, groups, 32]
        # E2M1 has the same fields as float16 in other places, and an exponent bias that is smaller by 14.
        half = ((codes.short() & 8) << 12) | ((codes.short() & 7) << 9)
        weight = half.view(torch.float16).float().mul_(2**14)
        exponents = raw["scales"].int() - 127
        powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)  # as in transformers
        weight = weight.mul_(powers.unsqueeze(-1)).to(dtype)  # [out, groups, 32]
        return weight.flatten(1).mT.contiguous()
