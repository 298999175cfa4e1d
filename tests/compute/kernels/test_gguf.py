"""The C decoders give the bits of torch's definition, for every type and instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from offmoe.compute.kernels.gguf import GgufDecoder, retiled
from offmoe.quant.float_formats import Mxfp4
from offmoe.quant.gguf_formats import BLOCKS, GgufBlocks
from offmoe.quant.kernel_words import GGUF_FORMATS, rows_of
from offmoe.quant.packed_weight import SCALES, PackedWeight, to_tiles
from offmoe.storage.gguf_types import BLOCK_TYPES
from tests import native
from tests.packed import values
from tests.quant.test_gguf_formats import random_blocks, same_bits


@pytest.fixture(params=native.VARIANTS)
def decoder(request: pytest.FixtureRequest) -> Iterator[GgufDecoder]:
    decoder = GgufDecoder(native.library_with(request.param), 2, request.param)
    yield decoder
    decoder.close()


@pytest.mark.parametrize("tame", [True, False], ids=["plausible", "random"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: BLOCK_TYPES[kind].name)
def test_bits_are_those_of_the_definition(decoder: GgufDecoder, kind: int, dtype: torch.dtype, tame: bool) -> None:
    blocks = random_blocks(kind, rows=37, per_row=31, seed=kind + 100, tame=tame)
    codec = GgufBlocks(kind)
    wanted = codec.decode({BLOCKS: blocks}, dtype)
    out = torch.full(wanted.shape, 7, dtype=dtype)
    assert decoder(codec, {BLOCKS: blocks}, out)
    assert same_bits(out.float(), wanted.float())


@pytest.mark.parametrize("kind", [8, 12, 39], ids=lambda kind: BLOCK_TYPES[kind].name)
def test_a_part_of_a_parameter_is_filled_and_nothing_else(decoder: GgufDecoder, kind: int) -> None:
    blocks = random_blocks(kind, rows=5, per_row=3, seed=1)[1:4]
    cols = 3 * BLOCK_TYPES[kind].values
    both = torch.full((9, cols), 7, dtype=torch.bfloat16)
    assert decoder(GgufBlocks(kind), {BLOCKS: blocks}, both[3:6])
    assert torch.equal(both[3:6], GgufBlocks(kind).decode({BLOCKS: blocks}, torch.bfloat16))
    assert (both[:3] == 7).all()
    assert (both[6:] == 7).all()


def test_what_it_does_not_decode_is_left_to_the_codec(decoder: GgufDecoder) -> None:
    blocks = random_blocks(8, rows=4, per_row=1, seed=1)
    out = torch.zeros(4, 32)
    assert not decoder(Mxfp4(), {}, out)
    assert not decoder(GgufBlocks(8), {BLOCKS: blocks}, out.half())
    assert not decoder(GgufBlocks(8), {BLOCKS: blocks}, torch.zeros(32, 4).mT)
    assert not decoder(GgufBlocks(8), {BLOCKS: blocks.mT.contiguous().mT}, out)
    assert not out.any()


@pytest.mark.parametrize("kind", GGUF_FORMATS, ids=lambda kind: BLOCK_TYPES[kind].name)
def test_tiles_hold_exactly_the_decoded_values(kind: int) -> None:
    blocks = random_blocks(kind, rows=48, per_row=5, seed=kind)
    if kind == 39:
        blocks.view(48, 5, 17)[:, :, 0].clamp_(1, 250)  # what float32 holds
    codec, how = GgufBlocks(kind), GGUF_FORMATS[kind]
    rows = rows_of(codec, {BLOCKS: blocks}, how)
    tiles = retiled(native.library(), codec, blocks)
    assert tiles.keys() == rows.keys()
    for name, part in rows.items():
        assert torch.equal(tiles[name], to_tiles(part))
    packed = PackedWeight(how, tiles[""], tiles[SCALES])
    assert torch.equal(values(packed), codec.decode({BLOCKS: blocks}, torch.float32))
