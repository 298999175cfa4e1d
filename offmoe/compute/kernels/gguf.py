"""GGUF weights on the CPU, in C: decoded to the bits of `GgufBlocks.decode`, or put into the kernels' tiles.

Moves: the blocks of one weight once in, the dense weight once out, divided among threads.
Bound: memory bandwidth, or 1 to 6 GB/s of blocks per core by type.
Must never: decode a tensor that is not in RAM, or to other bits than torch's definition.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch

from offmoe.compute.kernels.library import SCALE_TYPES, DecodingStruct, Library, RetilingStruct, Threads
from offmoe.quant.codec import Codec
from offmoe.quant.gguf_formats import BLOCKS, GgufBlocks
from offmoe.quant.kernel_words import GGUF_FORMATS
from offmoe.quant.packed_weight import PackedWeight

OUT_TYPES = (torch.bfloat16, torch.float32)
"""The dtypes that the decoders write."""


CACHED_BYTES = 16 << 20
"""Outputs above it are written past the caches: Q4_K of 14336 x 4096 at 2.1 to 3.5 instead of 1.5 to 2.0 GB/s."""


def retiling(codec: GgufBlocks, blocks: torch.Tensor, into: PackedWeight) -> RetilingStruct:
    """The step (place.py) that puts a weight into the tiles of its type's format in `GGUF_FORMATS`.

    Args:
        codec: its codec.
        blocks: uint8 [rows, bytes of a row], contiguous in RAM; rows are a multiple of 16.
        into: in tiles, contiguous in RAM, of the type's format and the weight's shape. Nothing else is allocated: fresh
            pages took two to eight times as long as the tiles.
    """
    rows, per_row = blocks.shape[0], blocks.shape[1] // codec.block.nbytes
    planes = into.params("")
    assert blocks.is_contiguous()
    assert into.format == GGUF_FORMATS[codec.type]
    wanted = into.format.params("", rows, per_row * codec.block.values, tiled=True)
    assert {plane: (part.dtype, tuple(part.shape)) for plane, part in planes.items()} == wanted, "another shape"
    assert all(part.is_contiguous() for part in planes.values())
    return RetilingStruct(
        blocks=blocks.data_ptr(),
        **{plane.strip(".") or "words": part.data_ptr() for plane, part in planes.items()},
        rows=rows,
        blocks_per_row=per_row,
        type=codec.type,
    )


class GgufDecoder:
    """Decodes weights in RAM; other formats and dtypes are left to their codecs."""

    def __init__(self, library: Library, threads: int, variant: str | None = None) -> None:
        """Start the threads.

        Args:
            library: the C kernels.
            threads: their number.
            variant: one of `library.variants`; None: the fastest.
        """
        self._calls, self._variant = library.calls, library.variant(variant)
        self._threads = Threads(library, threads)

    def __call__(self, codec: Codec, raw: Mapping[str, torch.Tensor], out: torch.Tensor) -> bool:
        """Decode one weight into `out`, [rows, cols] in RAM.

        Returns:
            Whether it was decoded. False: the codec has to do it.
        """
        if not isinstance(codec, GgufBlocks) or out.dtype not in OUT_TYPES or not out.is_contiguous():
            return False
        blocks = raw[BLOCKS]
        if not blocks.is_contiguous():
            return False
        count = blocks.numel() // codec.block.nbytes
        assert count * codec.block.values == out.numel(), "the output has another size than the weight"
        struct = DecodingStruct(
            blocks=blocks.data_ptr(),
            out=out.data_ptr(),
            count=count,
            block_bytes=codec.block.nbytes,
            type=codec.type,
            out_type=SCALE_TYPES[str(out.dtype).removeprefix("torch.")],
            streams=out.nbytes > CACHED_BYTES,
        )
        self._calls.offmoe_decode(self._threads.handle, self._variant, ctypes.byref(struct))
        return True

    def close(self) -> None:
        """End the threads; idempotent."""
        self._threads.close()
