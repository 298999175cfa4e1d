"""Every GGUF type decodes to the bits of the gguf package, whose decoders are ggml's reference in numpy."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from offmoe.quant.codec import Spec
from offmoe.quant.gguf_formats import BLOCKS, GgufBlocks
from offmoe.storage.gguf_types import BLOCK_TYPES, OTHER_TYPES, PLAIN_TYPES

HALVES = {2: (0,), 3: (0, 2), 6: (0,), 7: (0, 2), 8: (0,), 10: (80, 82), 11: (108,), 12: (0, 2), 13: (0, 2)}
HALVES |= {14: (208,), 20: (0,), 23: (0,), 39: ()}
"""By type, the bytes at which a block has a float16."""


def random_blocks(kind: int, rows: int, per_row: int, seed: int = 0, tame: bool = True) -> torch.Tensor:
    """Random bits, uint8 [rows, bytes]. tame: float16 scales are finite, as in real files."""
    block, rng = BLOCK_TYPES[kind], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * per_row, block.nbytes), dtype=np.uint8)
    if tame:
        for at in HALVES[kind]:
            scales = rng.standard_normal(len(raw)).astype(np.float16) * np.float16(0.1)
            raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(raw.reshape(rows, -1))


def reference(kind: int, blocks: torch.Tensor) -> torch.Tensor:
    with np.errstate(all="ignore"):
        values = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(kind))
    return torch.from_numpy(np.array(values, dtype=np.float32))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits; NaN equals NaN, whose payload differs between instruction sets."""
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("tame", [True, False], ids=["plausible", "random"])
@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: BLOCK_TYPES[kind].name)
def test_values_are_those_of_the_gguf_package(kind: int, tame: bool) -> None:
    blocks = random_blocks(kind, rows=24, per_row=32, seed=kind, tame=tame)
    codec = GgufBlocks(kind)
    wanted = reference(kind, blocks)
    assert codec.shape({BLOCKS: Spec(tuple(blocks.shape), torch.uint8)}) == tuple(wanted.shape)
    assert same_bits(codec.decode({BLOCKS: blocks}, torch.float32), wanted)
    for dtype in (torch.bfloat16, torch.float16):
        decoded = codec.decode({BLOCKS: blocks}, dtype)
        assert decoded.dtype == dtype
        assert decoded.is_contiguous()
        assert same_bits(decoded.float(), wanted.to(dtype).float())


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: BLOCK_TYPES[kind].name)
def test_a_part_of_a_larger_tensor_decodes_alike(kind: int) -> None:
    """Experts are rows of a stacked tensor: their first byte need not be aligned."""
    blocks = random_blocks(kind, rows=6, per_row=3, seed=1)
    whole = GgufBlocks(kind).decode({BLOCKS: blocks}, torch.float32)
    for row in range(6):
        part = GgufBlocks(kind).decode({BLOCKS: blocks[row : row + 1]}, torch.float32)
        assert torch.equal(part[0], whole[row])


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: BLOCK_TYPES[kind].name)
def test_names_and_sizes_are_ggmls(kind: int) -> None:
    theirs = gguf.GGMLQuantizationType(kind)
    assert BLOCK_TYPES[kind].name == theirs.name
    assert BLOCK_TYPES[kind][1:] == gguf.GGML_QUANT_SIZES[theirs]


def test_every_type_of_the_gguf_package_has_a_name() -> None:
    for kind in gguf.GGMLQuantizationType:
        assert (kind in BLOCK_TYPES) + (kind in PLAIN_TYPES) + (kind in OTHER_TYPES) == 1, kind
        if kind in OTHER_TYPES:
            assert OTHER_TYPES[kind] == kind.name


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="not whole blocks of 144"):
        GgufBlocks(12).shape({BLOCKS: Spec((4, 145), torch.uint8)})
    with pytest.raises(ValueError, match="its blocks are"):
        GgufBlocks(12).shape({BLOCKS: Spec((4, 144), torch.int8)})


def test_an_empty_matrix_decodes() -> None:
    assert GgufBlocks(8).decode({BLOCKS: torch.empty((0, 34), dtype=torch.uint8)}, torch.float32).shape == (0, 32)
