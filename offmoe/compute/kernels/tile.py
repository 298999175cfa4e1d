"""Rows of words, scales and zero points put into tiles by C.

Moves: every entry once, from the buffer that it was read into to the slot, in the calling thread without the GIL.
Bound: the caches.
Must never: write outside `into`.
"""

from __future__ import annotations

import ctypes

import torch

from offmoe.compute.kernels.library import Library, TilingStruct
from offmoe.quant.packed_weight import TILE_ROWS


def tile(library: Library, rows: torch.Tensor, into: torch.Tensor, flip: int = 0) -> bool:
    """Put rows into tiles, as `packed_weight.to_tiles` has them; False, and nothing done, for memory it cannot take.

    Args:
        library: the C kernels.
        rows: [N, C] of 1, 2 or 4 bytes in RAM; N is a multiple of 16. A row is contiguous, rows may be apart.
        into: [N / 16, C, 16] of the same dtype, contiguous in RAM.
        flip: int32 that words of 4 bytes are xored with.
    """
    count, width = rows.shape
    assert into.shape == (count // TILE_ROWS, width, TILE_ROWS), (rows.shape, into.shape)
    assert into.dtype == rows.dtype
    assert into.is_contiguous()
    size = rows.dtype.itemsize
    if size not in (1, 2, 4) or (width > 1 and rows.stride(1) != 1) or rows.stride(0) < width:
        return False
    struct = TilingStruct(
        rows=rows.data_ptr(),
        tiles=into.data_ptr(),
        stride=rows.stride(0) * size,
        count=count,
        width=width,
        entry_bytes=size,
        flip=flip & 0xFFFFFFFF,
    )
    library.calls.offmoe_tile(ctypes.byref(struct))
    return True
