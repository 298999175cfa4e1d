"""The C decoders give the bits of torch's definition, for every type and instruction set. The numeric kernels, on what
the re-tiler made of the blocks, give what fp32 with the decoded weights gives, up to what is allowed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from offmoe.compute.kernels import gguf
from offmoe.compute.kernels.cpu import CpuKernels, GatedExpert, Glu
from offmoe.compute.kernels.gguf import GgufDecoder, retiling
from offmoe.compute.kernels.library import MAX_TOKENS
from offmoe.compute.kernels.place import carry_out
from offmoe.quant.float_formats import Mxfp4
from offmoe.quant.gguf_formats import BLOCKS, GgufBlocks
from offmoe.quant.kernel_words import GGUF_FORMATS
from offmoe.quant.packed_weight import PackedWeight
from offmoe.storage.gguf_types import BLOCK_TYPES
from tests import native
from tests.packed import empty_tiles, values
from tests.quant.test_gguf_formats import HALVES, random_blocks, same_bits


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


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: BLOCK_TYPES[kind].name)
def test_bits_written_past_the_caches(decoder: GgufDecoder, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    """At any address, also with blocks that vectors leave to the definition."""
    monkeypatch.setattr(gguf, "CACHED_BYTES", 0)
    blocks = random_blocks(kind, rows=5, per_row=4, seed=kind, tame=False)
    codec = GgufBlocks(kind)
    wanted = codec.decode({BLOCKS: blocks}, torch.bfloat16)
    memory = torch.full((wanted.numel() + 32,), 7, dtype=torch.bfloat16)
    for start in (0, 1, 8, 16):
        assert decoder(codec, {BLOCKS: blocks}, memory[start : start + wanted.numel()].view(wanted.shape))
        assert same_bits(memory[start : start + wanted.numel()].float(), wanted.flatten().float())


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


GGUF_KINDS = pytest.mark.parametrize("kind", GGUF_FORMATS, ids=lambda kind: BLOCK_TYPES[kind].name)
INT8_ACTIVATIONS_ERROR, FLOAT_ERROR = 0.02, 1e-5
"""Relative L2 allowed, as for the other formats of the kernels."""


def model_blocks(kind: int, rows: int, per_row: int, seed: int = 0) -> torch.Tensor:
    """Random blocks with scales as models have them: exponents of MXFP4 are near 0."""
    blocks = random_blocks(kind, rows, per_row, seed)
    if kind == 39:
        blocks.view(rows, per_row, 17)[:, :, 0].clamp_(120, 124)
    return blocks


def tiled(kind: int, blocks: torch.Tensor) -> PackedWeight:
    block = BLOCK_TYPES[kind]
    tiles = empty_tiles(GGUF_FORMATS[kind], blocks.shape[0], blocks.shape[1] // block.nbytes * block.values)
    carry_out(native.library(), retiling(GgufBlocks(kind), blocks, tiles))
    return tiles


def decoded(kind: int, blocks: torch.Tensor) -> torch.Tensor:
    return GgufBlocks(kind).decode({BLOCKS: blocks}, torch.float32)


def inputs(tokens: int, cols: int) -> torch.Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens))


@GGUF_KINDS
def test_tiles_hold_exactly_the_decoded_values(kind: int) -> None:
    for per_row in (1, 5):
        blocks = random_blocks(kind, rows=48, per_row=per_row, seed=kind)
        if kind == 39:
            blocks.view(48, per_row, 17)[:, :, 0].clamp_(1, 250)  # what float32 holds
        assert torch.equal(values(tiled(kind, blocks)), decoded(kind, blocks))


def test_tiles_take_at_most_five_percent_more_than_the_file() -> None:
    for kind, how in GGUF_FORMATS.items():
        cols = 3 * how.multiple
        raw = cols // BLOCK_TYPES[kind].values * BLOCK_TYPES[kind].nbytes
        in_slot = sum(dtype.itemsize * entries for dtype, entries in how.planes(cols).values())
        assert in_slot <= 1.05 * raw, BLOCK_TYPES[kind].name


@pytest.fixture(params=[f"{v}-{a}" for v in native.VARIANTS for a in ("int8", "float")])
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    variant, activations = request.param.split("-")
    with CpuKernels(native.library_with(variant), 2, variant, activations == "int8") as kernels:
        yield kernels


@GGUF_KINDS
class TestKernels:
    def test_an_expert_on_any_number_of_tokens(self, kernels: CpuKernels, kind: int) -> None:
        """Odd numbers of tiles and groups, and every size of a block of tokens."""
        allowed = INT8_ACTIVATIONS_ERROR if kernels.int8_activations else FLOAT_ERROR
        values = BLOCK_TYPES[kind].values
        per_row, wide = (1, 1) if values == 256 else (3, 5)
        hidden, ff = per_row * values, wide * values
        raw = [model_blocks(kind, ff, per_row, 1), model_blocks(kind, ff, per_row, 2), model_blocks(kind, hidden, wide)]
        gate, up, down = (decoded(kind, blocks) for blocks in raw)
        in_tiles = [tiled(kind, blocks) for blocks in raw]
        run = kernels.expert(GatedExpert(in_tiles[0], in_tiles[1], in_tiles[2]), Glu())
        for tokens in (1, 2, 3, 5, 8, 15, MAX_TOKENS + 1):
            x = inputs(tokens, hidden)
            right = Glu()(x @ gate.T, x @ up.T) @ down.T
            for a, b in zip(run(x), right, strict=True):  # a wrong one must not hide among many
                assert (a - b).norm() < 2 * allowed * b.norm(), tokens

    def test_extreme_codes_do_not_saturate(self, kernels: CpuKernels, kind: int) -> None:
        """All bits of codes, scales and minima 0 or 1, all activations 127 or -127: the largest sums there can be."""
        block = BLOCK_TYPES[kind]
        for octet in (0, 255, 0x80, 0x7F):
            blocks = torch.full((32, 2, block.nbytes), octet, dtype=torch.uint8)
            for at in HALVES[kind]:
                blocks[..., at : at + 2] = torch.tensor([1.0]).half().view(torch.uint8)
            if kind == 39:
                blocks[..., 0] = 127
            run = kernels.linear(tiled(kind, blocks.flatten(1)))
            weight = decoded(kind, blocks.flatten(1))
            for x in (torch.ones(1, weight.shape[1]), -torch.ones(4, weight.shape[1])):
                near = 1e-6 * float(weight.abs().max()) * weight.shape[1]
                torch.testing.assert_close(run(x), x @ weight.T, rtol=1e-5, atol=near)


@pytest.mark.parametrize("kind", [8, 12, 14], ids=lambda kind: BLOCK_TYPES[kind].name)
@pytest.mark.parametrize("variant", native.VARIANTS)
def test_a_token_does_not_depend_on_its_neighbors(variant: str, kind: int) -> None:
    with CpuKernels(native.library_with(variant), 1, variant) as kernels:
        run = kernels.linear(tiled(kind, model_blocks(kind, 48, 2)))
        x = inputs(7, 2 * BLOCK_TYPES[kind].values)
        together = run(x)
        for i in range(7):
            assert torch.equal(run(x[i : i + 1])[0], together[i])


def test_a_scale_that_is_not_finite_shows_in_its_row(kernels: CpuKernels) -> None:
    for kind in (8, 12, 14):
        blocks = model_blocks(kind, 32, 1)
        at = HALVES[kind][0]
        blocks[5, at : at + 2] = torch.tensor([float("nan")]).half().view(torch.uint8)
        rows = kernels.linear(tiled(kind, blocks))(inputs(1, BLOCK_TYPES[kind].values))[0]
        assert rows.isnan().nonzero().flatten().tolist() == [5]
