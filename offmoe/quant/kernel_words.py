"""Turns a checkpoint's quantized tensors into the words, scales and zero points that the CPU kernels read.

The values are exactly those of the codecs. Compressed-tensors in 4 bits, MXFP4, FP8 and GPTQ (transposed) store such
words already, so the result is a view. int8 needs its sign bits flipped and AWQ its nibbles reordered, which takes a
few passes over one matrix. GGUF's blocks keep codes, scales and minima of one row together; C puts them in order
(compute/kernels/gguf.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from offmoe.errors import CheckpointError
from offmoe.quant.codec import Codec
from offmoe.quant.float_formats import Mxfp4, ScaledFloat
from offmoe.quant.gguf_formats import GgufBlocks
from offmoe.quant.int_formats import Awq, Gptq, PackedInt, TiledInt, in_order
from offmoe.quant.packed_weight import INT4_GROUPS, MXFP4, SCALES, ZEROS, WeightFormat, fp8


def is_rows_first(codec: Codec) -> bool:
    """Whether the codec decodes to [out, in], the order of its words. MXFP4 decodes to the transpose."""
    return not isinstance(codec, Mxfp4)


def format_of(codec: Codec, cols: int, dtype: torch.dtype) -> WeightFormat | str:
    """The kernels' format for a quantized weight.

    Args:
        codec: the weight's codec.
        cols: inputs of the weight.
        dtype: dtype of the component "weight" if the codec has one, else of its scales.

    Returns:
        The format, whose groups divide the codec's (a larger group's scale is repeated); or the reason why the kernels
        have none.
    """
    if isinstance(codec, Mxfp4):
        return MXFP4
    if isinstance(codec, GgufBlocks):
        return GGUF_FORMATS.get(codec.type, f"kernels have no {codec.name}")
    if isinstance(codec, ScaledFloat):
        return _fp8_format(codec, cols, dtype)
    if isinstance(codec, TiledInt):
        return WeightFormat(f"int{codec.bits}", codec.group, not codec.symmetric, dtype)
    if not isinstance(codec, (PackedInt, Gptq, Awq)):
        return f"kernels have no {codec.name}"
    bits = 4 if isinstance(codec, Awq) else codec.bits
    if isinstance(codec, PackedInt) and bits == 8 and codec.symmetric and not codec.ordered:
        if codec.group is None:
            return WeightFormat("int8", None, scale_dtype=dtype)
    elif bits != 4:
        return f"kernels have no {codec.name}"
    if (isinstance(codec, PackedInt) and codec.ordered) or (isinstance(codec, Gptq) and codec.reordered):
        return f"columns of {codec.name} are in activation order"
    stored = codec.group or cols
    group = next((g for g in reversed(INT4_GROUPS) if stored % g == 0), None)
    if group is None or cols % stored:
        return _no_group(codec)
    has_zeros = not isinstance(codec, PackedInt) or not codec.symmetric
    return WeightFormat(f"int{bits}", group, has_zeros, dtype)


def rows_of(codec: Codec, raw: Mapping[str, torch.Tensor], how: WeightFormat) -> dict[str, torch.Tensor]:
    """The words, scales and zero points of one matrix, row by row. Words of `PackedInt` still lack its `flip`.

    Args:
        codec: the matrix's codec; not one of GGUF.
        raw: its components.
        how: the kernels' format, from `format_of`.

    Returns:
        "" -> words int32 [out, words of a row]; SCALES -> [out, groups]; ZEROS -> [out, groups], if it has them.

    Raises:
        CheckpointError: columns are not in the order of their groups although the config says that they are.
    """
    zeros: torch.Tensor | None = None
    if isinstance(codec, Mxfp4):
        return {"": raw["blocks"].flatten(1).view(torch.int32), SCALES: raw["scales"]}
    if isinstance(codec, ScaledFloat):
        assert how.group is not None
        weight = raw["weight"]
        return {"": weight.view(torch.int32), SCALES: codec.scales_of_groups(weight.shape, raw["scale"], how.group)}
    if isinstance(codec, PackedInt):
        words, scales = raw["packed"], codec.scales(raw)
        if not codec.symmetric:
            zeros = codec.zeros(raw)
    elif isinstance(codec, Awq):
        words, scales, zeros = _words_of_awq(raw["qweight"]).mT, raw["scales"].mT, in_order(raw["qzeros"]).mT
    else:
        assert isinstance(codec, Gptq)
        if codec.ordered:
            _check_order(raw["g_idx"], codec)
        words, scales, zeros = raw["qweight"].mT, raw["scales"].mT, codec.zeros(raw)
    cols = words.shape[1] * how.word_values
    finer = how.groups(cols) // scales.shape[1]
    out = {"": words, SCALES: scales if finer == 1 else scales.repeat_interleave(finer, dim=1)}
    if zeros is not None:
        out[ZEROS] = zeros if finer == 1 else zeros.repeat_interleave(finer, dim=1)
    return out


def _fp8_format(codec: ScaledFloat, cols: int, dtype: torch.dtype) -> WeightFormat | str:
    if dtype != torch.float8_e4m3fn:
        return f"kernels have no {str(dtype).removeprefix('torch.')}"
    wide = cols if codec.block is None else codec.block[1]
    group = next((g for g in reversed(INT4_GROUPS) if wide % g == 0 and cols % g == 0), None)
    return f"kernels have no fp8 in blocks of {wide} columns, {cols} in all" if group is None else fp8(group)


def _no_group(codec: PackedInt | Gptq | Awq) -> str:
    return f"kernels have no {codec.name} in groups of {codec.group}"


def _words_of_awq(qweight: torch.Tensor) -> torch.Tensor:
    """Pack along inputs instead of outputs: int32 [in, out / 8] -> int32 [in / 8, out], 8 inputs per word."""
    codes = in_order(qweight)  # uint8 [in, out]
    pairs = codes.view(-1, 4, 2, codes.shape[1])
    octets = pairs[:, :, 0] | pairs[:, :, 1] << 4  # [in / 8, 4, out], lowest bits first
    return octets.mT.contiguous().view(torch.int32).squeeze(-1)


def _gguf(kind: str, group: int = 32, scale_dtype: torch.dtype = torch.float16, minima: bool = False) -> WeightFormat:
    return WeightFormat(kind, group, scale_dtype=scale_dtype, minima=minima)


GGUF_FORMATS: Mapping[int, WeightFormat] = {
    2: _gguf("int4"),
    3: _gguf("int4", minima=True),
    6: _gguf("int5"),
    7: _gguf("int5", minima=True),
    8: _gguf("int8"),
    10: _gguf("int2", group=16, scale_dtype=torch.int8, minima=True),
    11: _gguf("int3", group=16, scale_dtype=torch.int8),
    12: _gguf("int4", scale_dtype=torch.int8, minima=True),
    13: _gguf("int5", scale_dtype=torch.int8, minima=True),
    14: _gguf("int6", group=16, scale_dtype=torch.int8),
    20: _gguf("iq4"),
    23: _gguf("iq4", scale_dtype=torch.int8),
    39: MXFP4,
}
"""The kernels' formats of GGUF types, by type: the same codes, scales and minima in another order."""


def _check_order(index: torch.Tensor, codec: Gptq) -> None:
    """CheckpointError if the index says anything else than runs of `group` columns."""
    group = codec.group or len(index)
    if not torch.equal(index.long(), torch.arange(len(index)) // group):
        raise CheckpointError(
            f"columns of {codec.name} are not in the order of their groups, although the config's desc_act is off; "
            "use exactness='bitwise', which follows the index"
        )
