"""Rows of words, scales and zero points, and GGUF's blocks, put into tiles by C: an expert in one call where it can.

Moves: every entry once, from the buffer that it was read into to the slot, in the calling thread without the GIL.
Bound: the caches. Every call takes the interpreter lock anew, for which readers wait: with four of them, an expert of
2.7 MB took 0.76 ms of CPU time, reading included, tensor by tensor, and takes 0.58 in one call (docs/log.md).
Must never: write outside the tiles.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch

from offmoe.compute.kernels.library import Library, PlacingStruct, RetilingStruct, TilingStruct
from offmoe.quant.packed_weight import TILE_ROWS

PLANES = ("words", "scales", "minima", "high", "supers")
"""The fields of a RetilingStruct that point into the slot."""

Step = RetilingStruct | TilingStruct
"""What C does in one go; it points at a stored tensor and into a slot."""


def tiling(rows: torch.Tensor, into: torch.Tensor, flip: int = 0) -> TilingStruct | None:
    """The step that puts rows into tiles, as `packed_weight.to_tiles` has them; None for memory that it cannot take.

    Args:
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
        return None
    return TilingStruct(
        rows=rows.data_ptr(),
        tiles=into.data_ptr(),
        stride=rows.stride(0) * size,
        count=count,
        width=width,
        entry_bytes=size,
        flip=flip & 0xFFFFFFFF,
    )


def carry_out(library: Library, step: Step) -> None:
    """Carry out one step by itself. What it points at must live."""
    call = library.calls.offmoe_retile if isinstance(step, RetilingStruct) else library.calls.offmoe_tile
    call(ctypes.byref(step))


class Placing:
    """Steps that fill a slot from the tensors of an expert, in one call.

    They hold offsets, so any expert of a layer and any slot may be given.
    """

    def __init__(self, steps: Sequence[PlacingStruct]) -> None:
        self._steps = (PlacingStruct * len(steps))(*steps)

    @classmethod
    def of(cls, steps: Iterable[tuple[int, Step]], tensors: Sequence[torch.Tensor], slot: int) -> Placing | None:
        """The steps for any expert; None if one of them reads what was made of a tensor, not the tensor itself.

        Args:
            steps: for one expert; each with the index of its tensor.
            tensors: of this expert, contiguous.
            slot: the address of its slot.
        """
        moved = [_moved(step, i, tensors[i], slot) for i, step in steps]
        known = [step for step in moved if step is not None]
        return cls(known) if len(known) == len(moved) else None

    def __call__(self, library: Library, tensors: Sequence[torch.Tensor], slot: int) -> None:
        """Fill a slot.

        Args:
            library: the C kernels.
            tensors: of an expert, contiguous in RAM, of the sizes that the steps were made for.
            slot: the address of its slot.
        """
        pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
        library.calls.offmoe_place(self._steps, len(self._steps), slot, pointers)


def _moved(step: Step, index: int, tensor: torch.Tensor, slot: int) -> PlacingStruct | None:
    """A step with offsets; None if it reads anything else than the tensor."""
    has_blocks = isinstance(step, RetilingStruct)
    source, planes = ("blocks", PLANES) if has_blocks else ("rows", ("tiles",))
    offset = getattr(step, source) - tensor.data_ptr()
    if not 0 <= offset < tensor.nbytes:
        return None
    copy = type(step).from_buffer_copy(step)
    setattr(copy, source, offset)
    for plane in planes:
        address = getattr(step, plane)
        if address is not None:
            assert address >= slot
            setattr(copy, plane, address - slot)
    return PlacingStruct(**{"blocks" if has_blocks else "rows": copy}, tensor=index, has_blocks=has_blocks)
