import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offmoe.errors import ConfigError, UnsupportedModelError
from offmoe.quant.kernel_words import GGUF_FORMATS
from offmoe.quant.packed_weight import (
    HIGH,
    INT8,
    MXFP4,
    ZEROS,
    PackedWeight,
    WeightFormat,
    fp8,
    int4,
    pack_words,
    to_tiles,
)
from offmoe.storage.layout import PARAM_ALIGNMENT, ExpertLayout
from tests.packed import IQ4, by_row, to_rows, unpack_words, values

FORMATS = [
    *(INT8, int4(32), int4(64), int4(128), int4(32, zero_points=True), MXFP4, fp8(128)),
    *(GGUF_FORMATS[kind] for kind in (3, 6, 8, 10, 11, 12, 14, 20)),
]


def random_weight(how: WeightFormat, rows: int, cols: int) -> PackedWeight:
    """A weight of random bits, with finite scales."""
    g = torch.Generator().manual_seed(rows * 1000 + cols)
    words = torch.randint(-(2**31), 2**31 - 1, (rows, cols // how.word_values), dtype=torch.int32, generator=g)
    if how.kind == "fp8":
        words &= -0x40404041  # bytes that are not a number have all of 0x7f
    planes = {"": words}
    for plane, (dtype, entries) in how.planes(cols).items():
        shape = (rows, entries)
        if dtype.is_floating_point:
            planes[plane] = torch.randn(shape, generator=g).to(dtype)
        elif plane:
            low, high = {ZEROS: (0, 17), HIGH: (-(2**31), 2**31 - 1)}.get(plane, (90, 160))
            planes[plane] = torch.randint(low, high, shape, dtype=torch.int32, generator=g).to(dtype)  # int8 wraps
    return PackedWeight.of(how, "", planes)


def in_turns(words: torch.Tensor, row: int, k: int, bits: int) -> int:
    """The field of input k in words whose bytes have those of inputs 2b, 2b + 1, 8 + 2b, 8 + 2b + 1, and so on."""
    inputs = 32 // bits  # of a word
    at = 8 * (k % 8 // 2) + bits * (k % inputs // 8 * 2 + k % 2)
    return (int(words[row, k // inputs].item()) >> at) % 2**bits


def one_by_one(weight: PackedWeight) -> torch.Tensor:
    """The weight by definition, value by value in plain integers."""
    how, out = weight.format, torch.empty(weight.rows, weight.cols)
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    zeros = {"int2": 0, "int3": 4, "int4": 8, "int5": 16, "int6": 32}
    for n in range(weight.rows):
        for k in range(weight.cols):
            bits = int(weight.words[n, k // how.word_values].item()) >> 32 // how.word_values * (k % how.word_values)
            g = 0 if how.group is None else k // how.group
            if how.kind == "int8":
                out[n, k] = ((bits + 128) % 256 - 128) * weight.scales[n, g].float()
            elif how.kind == "fp8":
                exponent, mantissa = bits >> 3 & 15, bits & 7
                magnitude = (mantissa + 8) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
                out[n, k] = (-magnitude if bits & 128 else magnitude) * weight.scales[n, g]
            elif how.kind == "iq4":
                out[n, k] = IQ4[bits % 16] * weight.scales[n, g].float()
            elif how.kind in zeros:
                held = 2 if how.bits < 4 else 4  # bits of a code in its word
                code = bits % 16 if held == 4 else in_turns(weight.words, n, k, 2)
                if weight.high is not None:
                    code += 2**held * in_turns(weight.high, n, k, how.bits - held)
                scale, least = weight.scales[n, g].float(), torch.zeros(())
                if weight.minima is not None:
                    least = weight.minima[n, g].float()
                if how.kind == "int2":  # the halves of a byte
                    both = int(weight.scales[n, g].item()) % 256
                    scale, least = torch.tensor(both % 16.0), torch.tensor(both // 16.0)
                if weight.supers is not None:
                    per = 2 if how.minima else 1
                    scale, least = (
                        scale * weight.supers[n, k // 256 * per],
                        least * weight.supers[n, (k // 256 + 1) * per - 1],
                    )
                zero = 0 if how.minima else zeros[how.kind]
                zero = zero if weight.zeros is None else int(weight.zeros[n, g].item())
                out[n, k] = (code - zero) * scale - least
            else:
                magnitude = e2m1[bits % 8] * 2.0 ** (weight.scales[n, g].item() - 127)
                out[n, k] = -magnitude if bits & 8 else magnitude
    return out


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_values_are_what_the_format_says(how: WeightFormat) -> None:
    weight = random_weight(how, 16, max(how.multiple, 64))
    assert torch.equal(values(weight), one_by_one(weight))


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_tiles_are_the_same_words(how: WeightFormat) -> None:
    weight = random_weight(how, 48, 3 * how.multiple)
    tiled = weight.tiled()
    assert (tiled.rows, tiled.cols, tiled.is_tiled) == (48, weight.cols, True)
    for n, c in ((0, 0), (17, 1), (47, weight.words.shape[1] - 1)):
        assert tiled.words[n // 16, c, n % 16] == weight.words[n, c]
    back = by_row(tiled)
    assert all(torch.equal(a, b) for a, b in zip(back.params("w").values(), weight.params("w").values(), strict=True))
    assert torch.equal(values(tiled), values(weight))


def test_words_are_those_of_compressed_tensors() -> None:
    """compressed-tensors' pack_to_int32: value i of a word is bits 4i to 4i + 3."""
    q = torch.arange(16, dtype=torch.uint8).view(1, 16)
    assert [hex(w & 0xFFFFFFFF) for w in pack_words(q, int4()).flatten().tolist()] == ["0x76543210", "0xfedcba98"]
    bytes_ = torch.tensor([[1, -2, 3, -128]], dtype=torch.int8)
    assert int(pack_words(bytes_, INT8).item()) & 0xFFFFFFFF == 0x8003FE01


@given(st.integers(1, 4), st.integers(1, 9), st.sampled_from([INT8, int4()]))
def test_packing_and_tiling_can_be_undone(tiles: int, words: int, how: WeightFormat) -> None:
    dtype, limits = (torch.int8, (-128, 128)) if how.bits == 8 else (torch.uint8, (0, 16))
    q = torch.randint(*limits, (16 * tiles, words * how.word_values), dtype=dtype)
    packed = pack_words(q, how)
    assert torch.equal(unpack_words(packed, how), q)
    assert torch.equal(to_rows(to_tiles(packed)), packed)


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_a_record_has_the_same_bytes_in_both_orders(how: WeightFormat) -> None:
    """Row by row as on the disk, and in tiles as in RAM: the same offsets and sizes, the same values."""
    rows, cols = 32, max(2 * (how.group or 32), how.multiple)

    def layout(tiled: bool) -> ExpertLayout:
        gate_up, down = how.params("gate_up_proj", 64, cols, tiled), how.params("down_proj", rows, cols, tiled)
        return ExpertLayout.of(gate_up | down | {"bias": (torch.bfloat16, (64,))})

    disk, ram = layout(tiled=False), layout(tiled=True)
    assert [(p.name, p.offset, p.nbytes) for p in disk.params] == [(p.name, p.offset, p.nbytes) for p in ram.params]
    assert all(p.offset % PARAM_ALIGNMENT == 0 for p in ram.params)

    weight = random_weight(how, rows, cols)
    for order, packed in ((disk, weight), (ram, weight.tiled())):
        views = order.views(torch.zeros(order.nbytes, dtype=torch.uint8))
        for name, tensor in packed.params("down_proj").items():
            assert (views[name].shape, views[name].dtype) == (tensor.shape, tensor.dtype)
            views[name].copy_(tensor)
        assert torch.equal(values(PackedWeight.of(how, "down_proj", views)), values(weight))


@pytest.mark.parametrize(
    ("how", "shape", "needs", "instead"),
    [
        (int4(64), (40, 128), "[16, 64]", "experts='native'"),
        (int4(64), (32, 96), "[16, 64]", "--group 32"),
        (int4(64), (32, 48), "[16, 64]", "experts='int8', which fits"),
        (int4(64), (32, 40), "[16, 64]", "experts='native'"),
        (int4(128), (32, 64), "[16, 128]", "--group 64"),
        (INT8, (32, 24), "[16, 16]", "experts='native'"),
        (INT8, (0, 32), "[16, 16]", "experts='native'"),
        (MXFP4, (32, 48), "[16, 32]", "experts='native'"),
    ],
)
def test_shapes_that_no_format_holds(how: WeightFormat, shape: tuple[int, int], needs: str, instead: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"down_proj is .*{re.escape(needs)}.*{re.escape(instead)}"):
        how.params("down_proj", *shape, tiled=True)


def test_unknown_group() -> None:
    with pytest.raises(ConfigError, match="int4 group size 48 is not one of 32, 64, 128"):
        int4(48)
