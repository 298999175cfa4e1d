"""Experts in the order that the CPU's kernels read: `offmoe pack --layout tiles`.

Each expert is one extent of its shard that begins and ends on a page, its matrices' planes (`TILES`) one behind the
other, each aligned as a slot aligns it. So an extent has the bytes of a slot: it is read at once, and nothing is put in
order. What aligns a plane is a tensor too, because safetensors allows no gaps; its name ends in "_pad".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from offmoe.quant.packed_weight import TILE_ROWS, TILES, PackedWeight, WeightFormat, to_rows
from offmoe.storage.layout import PARAM_ALIGNMENT, aligned
from offmoe.storage.read_plan import ALIGNMENT
from offmoe.storage.shard_writer import NewTensor

PAD = "_pad"


def tile_tensors(name: str, rows: int, cols: int, how: WeightFormat) -> tuple[NewTensor, ...]:
    """The tensors of one matrix [rows, cols], each with what aligns the next behind it."""
    out: list[NewTensor] = []
    for plane, (dtype, n) in how.planes(cols).items():
        tensor = NewTensor(f"{name}_{TILES[plane]}", dtype, (rows // TILE_ROWS, n, TILE_ROWS))
        out += [tensor, *_pad(tensor.name, tensor.nbytes, PARAM_ALIGNMENT)]
    return tuple(out)


def end_on_page(tensors: Sequence[NewTensor], nbytes: int) -> tuple[NewTensor, ...]:
    """The tensors of an expert's last matrix, the last of which ends on a page.

    nbytes: of all tensors of the expert.
    """
    kept = tensors[:-1] if tensors[-1].name.endswith(PAD) else tensors
    nbytes -= sum(tensor.nbytes for tensor in tensors[len(kept) :])
    return (*kept, *_pad(kept[-1].name, nbytes, ALIGNMENT))


def encode_tiles(packed: PackedWeight, name: str, tensors: Sequence[NewTensor]) -> dict[str, torch.Tensor]:
    """What is written of one matrix, by name.

    Args:
        packed: the matrix, row by row.
        name: its name, of which `tensors` are called.
        tensors: what `tile_tensors` or `end_on_page` gave for it.
    """
    planes = {f"{name}_{TILES[plane]}": part for plane, part in packed.tiled().params("").items()}
    return {
        tensor.name: planes[tensor.name] if tensor.name in planes else torch.zeros(tensor.shape, dtype=tensor.dtype)
        for tensor in tensors
    }


def decode_tiles(written: Mapping[str, torch.Tensor], name: str, how: WeightFormat) -> PackedWeight:
    """The matrix, row by row, of what `encode_tiles` gave."""
    names = {plane: f"{name}_{component}" for plane, component in TILES.items()}
    return PackedWeight.of(how, "", {plane: to_rows(written[n]) for plane, n in names.items() if n in written})


def _pad(name: str, nbytes: int, to: int) -> list[NewTensor]:
    """What is missing behind `nbytes` bytes to a multiple of `to`; [] if nothing is. name: of the tensor before it."""
    missing = aligned(nbytes, to) - nbytes
    return [NewTensor(name + PAD, torch.uint8, (missing,))] if missing else []
