"""C puts rows into tiles as torch's definition does, from whatever memory rows are read into, and all in one call."""

from __future__ import annotations

import pytest
import torch

from offmoe.compute.kernels.gguf import retiling
from offmoe.compute.kernels.place import Placing, Step, carry_out, tiling
from offmoe.quant.gguf_formats import GgufBlocks
from offmoe.quant.kernel_words import GGUF_FORMATS
from offmoe.quant.packed_weight import TILE_ROWS, PackedWeight, to_tiles
from offmoe.storage.layout import ExpertLayout
from tests import native
from tests.packed import empty_tiles
from tests.quant.test_gguf_formats import random_blocks

Q4_0 = GGUF_FORMATS[2]
DTYPES = (torch.int32, torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def random(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, 256, (rows, width * dtype.itemsize), dtype=torch.uint8).view(dtype)


def tile(rows: torch.Tensor, into: torch.Tensor, flip: int = 0) -> None:
    step = tiling(rows, into, flip)
    assert step is not None
    carry_out(native.library(), step)


def tiled(rows: torch.Tensor, flip: int = 0) -> torch.Tensor:
    count, width = rows.shape
    out = random(count, width, rows.dtype).view(count // TILE_ROWS, width, TILE_ROWS)
    tile(rows, out, flip)
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
    tile(rows, memory[1:-1].view(1, 9, TILE_ROWS))
    assert memory[[0, -1]].tolist() == [7, 7]


def test_columns_are_left_to_torch() -> None:
    out = torch.zeros(2, 16, TILE_ROWS, dtype=torch.int32)
    assert tiling(random(16, 32, torch.int32).mT, out) is None
    assert tiling(random(32, 1, torch.int32).expand(32, 16), out) is None


def test_one_call_fills_any_slot_from_any_tensors_as_the_steps_do() -> None:
    def tensors() -> list[torch.Tensor]:
        return [random(32, 24, torch.int32), random(16, 6, torch.bfloat16), random_blocks(2, 16, 3)]

    def slot() -> dict[str, torch.Tensor]:
        words, scales = torch.zeros(2, 24, TILE_ROWS, dtype=torch.int32), torch.zeros(1, 6, TILE_ROWS).bfloat16()
        blocks = {name: (part.dtype, tuple(part.shape)) for name, part in empty_tiles(Q4_0, 16, 96).params("b").items()}
        plain = {"words": (words.dtype, tuple(words.shape)), "scales": (scales.dtype, tuple(scales.shape))}
        layout = ExpertLayout.of(plain | blocks)
        return layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8))

    def steps(of: list[torch.Tensor], views: dict[str, torch.Tensor]) -> list[tuple[int, Step]]:
        first, second = tiling(of[0][:16], views["words"][:1], 5), tiling(of[0][16:], views["words"][1:])
        scales = tiling(of[1], views["scales"])
        assert first is not None
        assert second is not None
        assert scales is not None
        return [
            (0, first),
            (0, second),
            (1, scales),
            (2, retiling(GgufBlocks(2), of[2], PackedWeight.of(Q4_0, "b", views))),
        ]

    learned_from, learned_on = tensors(), slot()
    placing = Placing.of(steps(learned_from, learned_on), learned_from, learned_on["words"].data_ptr())
    assert placing is not None
    of, by_steps, at_once = tensors(), slot(), slot()
    for _, step in steps(of, by_steps):
        carry_out(native.library(), step)
    placing(native.library(), of, at_once["words"].data_ptr())
    assert all(same(at_once[name], by_steps[name]) for name in by_steps)
    assert at_once["words"].any()
    assert not learned_on["words"].any()


def test_what_was_made_of_a_tensor_is_not_put_in_one_call() -> None:
    rows, into = random(16, 8, torch.int32), torch.zeros(1, 8, TILE_ROWS, dtype=torch.int32)
    doubled = rows * 2
    step = tiling(doubled, into)
    assert step is not None
    assert Placing.of([(0, step)], [rows], into.data_ptr()) is None
