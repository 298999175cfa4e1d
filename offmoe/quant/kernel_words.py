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


def rows_of(
    codec: Codec, raw: Mapping[str, torch.Tensor], shape: tuple[int, int], how: WeightFormat
) -> dict[str, torch.Tensor]:
    """The words, scales and zero points of one matrix, row by row. Words of `PackedInt` still lack its `flip`.

    Args:
        codec: the matrix's codec; not one of GGUF or of tiles.
        raw: its components.
        shape: (outputs, inputs) of the matrix.
        how: the kernels' format, from `format_of`.

    Returns:
        "" -> words int32 [out, words of a row]; SCALES -> [out, groups]; ZEROS -> [out, groups], if it has them.

    Raises:
        CheckpointError: columns are not in the order of their groups although the config says that they are.
    """
    planes = (plane_of(codec, component, part, shape, how) for component, part in raw.items())
    return dict(plane for plane in planes if plane is not None)


def is_by_rows(codec: Codec, component: tuple[int, ...], rows: int) -> bool:
    """Whether some rows of a component of this shape give, by `plane_of`, the same rows of a plane of `rows` rows."""
    return isinstance(codec, (PackedInt, Mxfp4, ScaledFloat)) and component[:1] == (rows,)


def plane_of(
    codec: Codec, component: str, raw: torch.Tensor, shape: tuple[int, int], how: WeightFormat
) -> tuple[str, torch.Tensor] | None:
    """The plane of a matrix that one of its components gives, as in `rows_of`; None if it gives none.

    Args:
        codec: as in `rows_of`.
        component: its name.
        raw: the component; or, if `is_by_rows`, some rows of it.
        shape: (outputs, inputs) of the matrix, or of these rows.
        how: as in `rows_of`.

    Raises:
        CheckpointError: as `rows_of`.
    """
    rows, groups = shape[0], how.groups(shape[1])
    match codec, component:
        case (Mxfp4(), "blocks"):
            return "", raw.flatten(1).view(torch.int32)
        case (Mxfp4(), "scales"):
            return SCALES, raw
        case (ScaledFloat(), "weight"):
            return "", raw.view(torch.int32)
        case (ScaledFloat(), "scale"):
            assert how.group is not None
            return SCALES, codec.scales_of_groups(shape, raw, how.group)
        case (PackedInt(), "packed"):
            return "", raw
        case (PackedInt(), "scale"):
            return SCALES, _finer(codec.scales(raw, rows), groups)
        case (PackedInt(), "zero"):
            return ZEROS, _finer(codec.zeros(raw, rows), groups)
        case (Awq(), "qweight"):
            return "", _words_of_awq(raw).mT
        case (Awq(), "qzeros"):
            return ZEROS, _finer(in_order(raw).mT, groups)
        case (Gptq(), "qweight"):
            return "", raw.mT
        case (Gptq(), "qzeros"):
            return ZEROS, _finer(codec.zeros(raw, rows), groups)
        case (Awq() | Gptq(), "scales"):
            return SCALES, _finer(raw.mT, groups)
        case (Gptq(), "g_idx"):
            _check_order(raw, codec)
            return None
    raise AssertionError(f"{codec.name} has no {component}")


def _finer(plane: torch.Tensor, groups: int) -> torch.Tensor:
    """[out, groups of the codec] -> [out, groups], each entry repeated."""
    times = groups // plane.shape[1]
    return plane if times == 1 else plane.repeat_interleave(times, dim=1)


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
