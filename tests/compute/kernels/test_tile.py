"""C puts rows into tiles as torch's definition does, from whatever memory rows are read into."""

from __future__ import annotations

import pytest
import torch

from offmoe.compute.kernels.tile import tile
from offmoe.quant.packed_weight import TILE_ROWS, to_tiles
from tests import native

DTYPES = (torch.int32, torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def random(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, 256, (rows, width * dtype.itemsize), dtype=torch.uint8).view(dtype)


def tiled(rows: torch.Tensor, flip: int = 0) -> torch.Tensor:
    count, width = rows.shape
    out = random(count, width, rows.dtype).view(count // TILE_ROWS, width, TILE_ROWS)
    assert tile(native.library(), rows, out, flip)
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 7, 8, 15, 16, 24, 33, 64])
def test_tiles_are_those_of_the_definition(dtype: torch.dtype, width: int) -> None:
    rows = random(3 * TILE_ROWS, width, dtype)
    assert same(tiled(rows), to_tiles(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_apart_and_at_any_address(dtype: torch.dtype) -> None:
    every_second = random(2 * 2 * TILE_ROWS, 40, dtype)[1::2, 3:36]
    assert same(tiled(every_second), to_tiles(every_second.contiguous()))


@pytest.mark.parametrize("width", [5, 32])
def test_words_are_flipped_on_the_way(width: int) -> None:
    rows, mask = random(TILE_ROWS, width, torch.int32), -0x7F7F7F80
    assert same(tiled(rows, mask), to_tiles(rows ^ mask))


def test_nothing_else_is_written() -> None:
    rows, memory = random(TILE_ROWS, 9, torch.int32), torch.full((9 * TILE_ROWS + 2,), 7, dtype=torch.int32)
    assert tile(native.library(), rows, memory[1:-1].view(1, 9, TILE_ROWS))
    assert memory[[0, -1]].tolist() == [7, 7]


def test_columns_are_left_to_torch() -> None:
    out = torch.zeros(2, 16, TILE_ROWS, dtype=torch.int32)
    assert not tile(native.library(), random(16, 32, torch.int32).mT, out)
    assert not tile(native.library(), random(32, 1, torch.int32).expand(32, 16), out)
    assert not out.any()
