"""Weights as 4-bit or 8-bit integers in int32 words: compressed-tensors (pack-quantized), GPTQ and AWQ (gemm).

A weight is (code - zero) * scale, computed in the dtype of the scales, rounded once, then cast. The difference is exact
in every dtype of scales, because codes have at most 8 bits. The reference implementations do the same:
compressed-tensors 0.20 (compressors/pack_quantized, lifecycle/forward_helpers.py), GPTQModel 7.7
(nn_modules/qlinear/torch.py, utils/model.py for the zeros of format v1), AutoAWQ 0.2.9 (utils/packing_utils.py). Where
an index (g_idx) gives the group of every column, it is followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offmoe.quant.codec import Spec, codes_of_words, expect
from offmoe.quant.packed_weight import SCALES as SCALE_PLANE
from offmoe.quant.packed_weight import TILE_ROWS, TILES, ZEROS, to_rows

SCALES = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that scales may have."""
TILES_FORMAT = "offmoe-tiles-v1"
"""The `format` of a compressed-tensors config whose weights are `TiledInt`. compressed-tensors itself, and an offmoe
that does not know it, refuse the name."""
SIGN_BITS = -0x7F7F7F80
"""0x80808080 as int32. Bytes at rest have 128 added; kernels read signed ones."""


def _apply(
    codes: torch.Tensor, zeros: torch.Tensor | int, scales: torch.Tensor, groups: torch.Tensor | None
) -> torch.Tensor:
    """(codes - zeros) * scales in the scales' dtype: codes [out, in], zeros and scales [out, groups] -> [out, in].

    groups: int [in], the group of every column. None: every group is a run of equally many columns.
    """
    out = codes.shape[0]
    if groups is not None:
        if isinstance(zeros, torch.Tensor):
            zeros = zeros.index_select(1, groups)
        return (codes.to(scales.dtype) - zeros).mul_(scales.index_select(1, groups))
    grouped = codes.to(scales.dtype).view(out, scales.shape[1], -1)
    grouped -= zeros.unsqueeze(-1) if isinstance(zeros, torch.Tensor) else zeros
    return grouped.mul_(scales.unsqueeze(-1)).view(out, -1)


@dataclass(frozen=True)
class PackedInt:
    """compressed-tensors, format pack-quantized. Decodes to [out, in].

    Components: packed int32 [out, in * bits / 32]; scale [out, groups], [out] (per row) or [1] (for all); unless
    symmetric, zero int32 [out * bits / 32, groups], packed along columns; if ordered, g_idx int [in]. Codes and zeros
    are stored with 2**(bits - 1) added.

    Args:
        bits: 4 or 8.
        group: columns per scale; None: one scale per row.
        symmetric: whether the format has no zero points.
        ordered: whether an index says which group a column belongs to.
    """

    bits: int
    group: int | None
    symmetric: bool = True
    ordered: bool = False

    @property
    def name(self) -> str:
        return f"compressed-tensors int{self.bits}"

    @property
    def required(self) -> frozenset[str]:
        more = (() if self.symmetric else ("zero",)) + (("g_idx",) if self.ordered else ())
        return frozenset({"packed", "scale", *more})

    def shape(self, specs: Mapping[str, Spec]) -> tuple[int, ...]:
        packed, scale, per_word = specs["packed"], specs["scale"], 32 // self.bits
        expect(packed.dtype == torch.int32 and len(packed.shape) == 2, f"its words are {packed}")
        expect(scale.dtype in SCALES, f"its scale is {scale.dtype}")
        rows, words = packed.shape
        cols = words * per_word
        if self.group is not None:
            cols = self.group * scale.shape[1] if len(scale.shape) == 2 else 0
            expect(
                scale.shape[:1] == (rows,) and -(-cols // per_word) == words,
                f"{list(packed.shape)} words of {self.bits} bits with scales {list(scale.shape)} are no groups of "
                f"{self.group} columns",
            )
        else:
            expect(scale.shape in ((), (1,), (1, 1), (rows,), (rows, 1)), f"its scale has shape {list(scale.shape)}")
        if not self.symmetric:
            wanted = (-(-rows // per_word), scale.shape[1] if len(scale.shape) == 2 else 1)
            expect(specs["zero"] == (wanted, torch.int32), f"its zero points are {specs['zero']}, not {wanted} int32")
        if self.ordered:
            index = specs["g_idx"]
            expect(index.shape == (cols,) and not index.dtype.is_floating_point, f"its g_idx is {index}")
        return rows, cols

    def decode(self, raw: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        codes = codes_of_words(raw["packed"], self.bits)  # [out, in]
        rows = len(codes)
        scale = self.scales(raw["scale"], rows)  # [out, groups]
        if self.group is not None:
            codes = codes[:, : self.group * scale.shape[1]]
        zeros: torch.Tensor | int = 1 << (self.bits - 1)
        if not self.symmetric:
            zeros = self.zeros(raw["zero"], rows).to(scale.dtype)
        groups = None
        if self.ordered:
            assert self.group is not None
            groups = raw["g_idx"].long()
            in_turn = torch.arange(len(groups), device=groups.device) // self.group
            groups = torch.where(groups < 0, in_turn, groups)  # an index of -1 means that columns are in order
        return _apply(codes.contiguous(), zeros, scale, groups).to(dtype)

    @property
    def flip(self) -> int:
        """What words at rest are xored with to be those of `PackedWeight`, as int32."""
        return SIGN_BITS if self.bits == 8 else 0

    def scales(self, scale: torch.Tensor, rows: int) -> torch.Tensor:
        """The scales, [out, groups], from the component. rows: outputs."""
        return scale if scale.ndim == 2 and len(scale) == rows else scale.reshape(-1, 1).expand(rows, 1)

    def zeros(self, zero: torch.Tensor, rows: int) -> torch.Tensor:
        """The zero points of a format that has them, uint8 [out, groups], from the component. rows: outputs."""
        return codes_of_words(zero.mT, self.bits).mT[:rows]


@dataclass(frozen=True)
class TiledInt:
    """What `offmoe pack --layout tiles` writes: the codes of `PackedInt` in the order that kernels read. [out, in].

    Components: tiles int32 [out / 16, words of a row, 16]; tiles_scale [out / 16, groups, 16]; unless symmetric,
    tiles_zero uint8 [out / 16, groups, 16]. Codes of 4 bits have 8 added, those of 8 bits are signed.

    Args:
        bits: 4 or 8.
        group: columns per scale; None: one scale per row.
        symmetric: whether the format has no zero points.
    """

    bits: int
    group: int | None
    symmetric: bool = True

    @property
    def name(self) -> str:
        return f"offmoe tiles int{self.bits}"

    @property
    def required(self) -> frozenset[str]:
        return frozenset(TILES.values()) - (frozenset({TILES[ZEROS]}) if self.symmetric else frozenset())

    def shape(self, specs: Mapping[str, Spec]) -> tuple[int, ...]:
        words, scale = specs[TILES[""]], specs[TILES[SCALE_PLANE]]
        expect(words.dtype == torch.int32 and len(words.shape) == 3, f"its words are {words}")
        expect(scale.dtype in SCALES and len(scale.shape) == 3, f"its scale is {scale}")
        count, width, lanes = words.shape
        rows, cols, groups = count * TILE_ROWS, width * (32 // self.bits), scale.shape[1]
        expect(
            lanes == TILE_ROWS and scale.shape == (count, groups, lanes) and groups * (self.group or cols) == cols,
            f"tiles {list(words.shape)} with scales {list(scale.shape)} are no groups of {self.group or cols} columns",
        )
        if not self.symmetric:
            zero = specs[TILES[ZEROS]]
            expect(zero == (scale.shape, torch.uint8), f"its zero points are {zero}, not {scale.shape} uint8")
        return rows, cols

    def decode(self, raw: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        words, scale = to_rows(raw[TILES[""]]), to_rows(raw[TILES[SCALE_PLANE]])  # [out, words], [out, groups]
        codes = codes_of_words(words if self.bits == 4 else words ^ SIGN_BITS, self.bits)
        zeros: torch.Tensor | int = 1 << (self.bits - 1)
        if not self.symmetric:
            zeros = to_rows(raw[TILES[ZEROS]]).to(scale.dtype)
        return _apply(codes, zeros, scale, None).to(dtype)


@dataclass(frozen=True)
class Gptq:
    """GPTQ, stored transposed and packed along columns. Decodes to [out, in].

    Components: qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales [groups, out]; if
    ordered, g_idx int [in].

    Args:
        bits: 4 or 8.
        group: columns per scale where there is no index; None: all of them.
        ordered: whether an index says which group a column belongs to.
        minus_one: format v1, which stores zeros less one. It subtracted from whole words; adding to whole words undoes
            that even where a zero of 0 had borrowed from its neighbor.
        reordered: whether the index may say anything else than runs of `group` columns.
    """

    bits: int
    group: int | None
    ordered: bool
    minus_one: bool = True
    reordered: bool = True

    @property
    def name(self) -> str:
        return f"gptq int{self.bits}"

    @property
    def required(self) -> frozenset[str]:
        return frozenset({"qweight", "qzeros", "scales", *(("g_idx",) if self.ordered else ())})

    def shape(self, specs: Mapping[str, Spec]) -> tuple[int, ...]:
        weight, zeros, scales, per_word = specs["qweight"], specs["qzeros"], specs["scales"], 32 // self.bits
        expect(weight.dtype == zeros.dtype == torch.int32 and len(weight.shape) == 2, f"its words are {weight}")
        expect(scales.dtype in SCALES and len(scales.shape) == 2, f"its scales are {scales}")
        cols, rows = weight.shape[0] * per_word, weight.shape[1]
        groups = scales.shape[0]
        expect(
            scales.shape[1] == rows and zeros.shape == (groups, -(-rows // per_word)) and groups > 0,
            f"qweight {list(weight.shape)}, qzeros {list(zeros.shape)} and scales {list(scales.shape)} in {self.bits} "
            "bits are not of one matrix",
        )
        if self.ordered:
            expect(specs["g_idx"].shape == (cols,), f"its g_idx has shape {list(specs['g_idx'].shape)}, not [{cols}]")
            expect(not specs["g_idx"].dtype.is_floating_point, f"its g_idx is {specs['g_idx'].dtype}")
        else:
            group = self.group or cols
            expect(groups * group == cols, f"it has {groups} groups of {group} columns for {cols} columns")
        return rows, cols

    def decode(self, raw: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        scales = raw["scales"].mT.contiguous()  # [out, groups]
        zeros = self.zeros(raw["qzeros"], len(scales)).to(scales.dtype)
        codes = codes_of_words(raw["qweight"].mT, self.bits)  # [out, in]
        return _apply(codes, zeros, scales, raw["g_idx"].long() if self.ordered else None).to(dtype)

    def zeros(self, words: torch.Tensor, rows: int) -> torch.Tensor:
        """The zero points, without the one that format v1 subtracts, uint8 [out, groups].

        Args:
            words: the component "qzeros".
            rows: outputs.
        """
        if self.minus_one:
            words = words + (0x11111111 if self.bits == 4 else 0x01010101)
        return codes_of_words(words, self.bits)[:, :rows].mT


@dataclass(frozen=True)
class Awq:
    """AWQ in 4 bits, layout "gemm". Decodes to [out, in].

    Components: qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]. A word holds columns
    0 2 4 6 1 3 5 7, lowest bits first.

    Args:
        group: inputs per scale; None: all of them.
    """

    group: int | None
    name = "awq int4"
    required = frozenset({"qweight", "qzeros", "scales"})

    def shape(self, specs: Mapping[str, Spec]) -> tuple[int, ...]:
        weight, zeros, scales = specs["qweight"], specs["qzeros"], specs["scales"]
        expect(weight.dtype == zeros.dtype == torch.int32 and len(weight.shape) == 2, f"its words are {weight}")
        expect(scales.dtype in SCALES and len(scales.shape) == 2, f"its scales are {scales}")
        cols, rows = weight.shape[0], weight.shape[1] * 8
        groups = cols // (self.group or cols)
        expect(
            groups * (self.group or cols) == cols
            and zeros.shape == (groups, weight.shape[1])
            and scales.shape == (groups, rows),
            f"qweight {list(weight.shape)}, qzeros {list(zeros.shape)} and scales {list(scales.shape)} are not of one "
            f"matrix in groups of {self.group or cols}",
        )
        return rows, cols

    def decode(self, raw: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        scales = raw["scales"].mT.contiguous()  # [out, groups]
        zeros = in_order(raw["qzeros"]).mT.to(scales.dtype)  # [out, groups]
        codes = in_order(raw["qweight"]).mT.contiguous()  # [out, in]
        return _apply(codes, zeros, scales, None).to(dtype)


def in_order(words: torch.Tensor) -> torch.Tensor:
    """The codes in AWQ's words, in the order of columns: int32 [n, out / 8] -> uint8 [n, out]."""
    codes = codes_of_words(words, 4).view(len(words), -1, 2, 2, 2)  # position in a word, in binary: h m l
    return codes.permute(0, 1, 3, 4, 2).reshape(len(words), -1)  # is column m l h
