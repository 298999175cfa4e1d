"""Every decoder gives the bits that the format's own package gives: golden fixtures, and transformers itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers.integrations import finegrained_fp8, mxfp4

from offmoe.quant.bitsandbytes import read_state
from offmoe.quant.codec import Codec, Spec
from offmoe.quant.float_formats import Mxfp4, ScaledFloat
from offmoe.quant.int_formats import Awq, Gptq, PackedInt
from offmoe.quant.kernel_words import format_of, rows_of
from offmoe.quant.packed_weight import SCALES, PackedWeight, WeightFormat
from tests.packed import values

DATA = Path(__file__).parents[1] / "data" / "quantized"
RENAMED = {
    "weight_packed": "packed",
    "weight_scale": "scale",
    "weight_zero_point": "zero",
    "weight_g_idx": "g_idx",
}


def cases() -> list[tuple[str, str]]:
    cases = []
    for file in sorted(DATA.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            cases += [(file.stem, case) for case in json.loads(opened.metadata()["cases"])]
    return cases


def golden(file: str, case: str) -> tuple[Codec, dict[str, torch.Tensor], torch.Tensor]:
    with safe_open(DATA / f"{file}.safetensors", "pt") as opened:
        options = json.loads(opened.metadata()["cases"])[case]
        prefix = f"{case}/raw/"
        raw = {k.removeprefix(prefix): opened.get_tensor(k) for k in opened.keys() if k.startswith(prefix)}  # noqa: SIM118
        dense = opened.get_tensor(f"{case}/dense")
    raw = {RENAMED.get(name, name.removeprefix("weight.")): tensor for name, tensor in raw.items()}
    raw.pop("weight_shape", None)
    if file == "bitsandbytes":
        state = next(name for name in raw if name.startswith("quant_state"))
        codec, offset = read_state(bytes(raw.pop(state).tolist()))
        raw["offset"] = torch.tensor(offset)
        return codec, raw, dense
    kind = {"awq": Awq, "gptqmodel": Gptq}.get(file, PackedInt)
    return kind(**options), raw, dense


def specs(raw: dict[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in raw.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("file", "case"), cases())
def test_decoder_gives_the_bits_of_the_formats_own_package(file: str, case: str, dtype: torch.dtype) -> None:
    codec, raw, dense = golden(file, case)
    assert codec.required == raw.keys()
    assert codec.shape(specs(raw)) == tuple(dense.shape)
    before = {name: tensor.clone() for name, tensor in raw.items()}
    decoded = codec.decode(raw, dtype)
    assert decoded.dtype == dtype
    assert decoded.is_contiguous()
    assert torch.equal(decoded, dense.to(dtype))
    assert all(torch.equal(raw[name], tensor) for name, tensor in before.items()), "the slot was written to"


def fp8(rows: int, cols: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return (torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) * 50).to(dtype)


def ue8m0(rows: int, cols: int) -> torch.Tensor:
    octets = torch.randint(110, 135, (rows, cols), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return octets.view(torch.float8_e8m0fnu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("block", "scale"),
    [
        ((8, 16), torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) * 0.01),
        ((8, 16), torch.rand(4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()),
        ((8, 16), ue8m0(4, 4)),
        ((8, 16), ue8m0(4, 4).view(torch.uint8)),
        (None, torch.tensor(0.0123)),
        (None, torch.rand(32, 1, generator=torch.Generator().manual_seed(0)) * 0.01),
    ],
    ids=["float32", "bfloat16", "ue8m0", "bytes", "one", "rows"],
)
def test_fp8_is_what_transformers_dequantizes(
    block: tuple[int, int] | None, scale: torch.Tensor, dtype: torch.dtype
) -> None:
    weight = fp8(32, 64)
    codec, raw = ScaledFloat(block), {"weight": weight, "scale": scale}
    assert codec.shape(specs(raw)) == (32, 64)
    reference = finegrained_fp8.Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=dtype)
    assert torch.equal(codec.decode(raw, dtype), reference)


@pytest.mark.parametrize("shape", [(30, 64), (32, 60), (30, 60), (4, 10), (24, 48), (1, 1)])
def test_fp8_blocks_may_be_ragged(shape: tuple[int, int]) -> None:
    """transformers' loader takes a ragged grid for another block or refuses it."""
    weight = fp8(*shape)
    scale = torch.rand(-(-shape[0] // 8), -(-shape[1] // 16), generator=torch.Generator().manual_seed(3))
    codec, raw = ScaledFloat((8, 16)), {"weight": weight, "scale": scale}
    assert codec.shape(specs(raw)) == shape
    rows, cols = torch.arange(shape[0]) // 8, torch.arange(shape[1]) // 16
    reference = weight.float() * scale[rows][:, cols]
    assert torch.equal(codec.decode(raw, torch.float32), reference)
    assert torch.equal(codec.decode(raw, torch.bfloat16), reference.bfloat16())


@pytest.mark.parametrize(
    ("block", "grid", "dtype"),
    [
        ((128, 128), (2, 2), torch.float32),
        ((128, 128), (2, 2), torch.float8_e8m0fnu),
        ((48, 64), (4, 3), torch.bfloat16),
        ((128, 128), (160, 1), torch.float32),
        (None, (160,), torch.float32),
        (None, (), torch.bfloat16),
    ],
)
def test_fp8_as_kernels_read_it(block: tuple[int, int] | None, grid: tuple[int, ...], dtype: torch.dtype) -> None:
    """Groups of 64 divide 192 columns and every block; the values are the decoder's, one rounding of a float apart."""
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(160, 192, generator=g) * 60).to(torch.float8_e4m3fn)
    scale = (torch.rand(grid, generator=g) + 0.5).to(dtype)
    codec, raw = ScaledFloat(block), {"weight": weight, "scale": scale}
    how = format_of(codec, 192, weight.dtype)
    assert isinstance(how, WeightFormat)
    assert (how.kind, how.group) == ("fp8", 64)
    rows = rows_of(codec, raw, (160, 192), how)
    assert rows[SCALES].shape == (160, 3)
    assert rows[""].data_ptr() == weight.data_ptr()
    assert torch.equal(values(PackedWeight(how, rows[""], rows[SCALES])), codec.decode(raw, torch.float32))


def test_fp8_that_kernels_do_not_read() -> None:
    assert format_of(ScaledFloat((128, 128)), 256, torch.float8_e5m2) == "kernels have no float8_e5m2"
    assert "blocks of 48 columns" in str(format_of(ScaledFloat((128, 48)), 192, F8))
    assert "200 in all" in str(format_of(ScaledFloat((128, 128)), 200, F8))


def test_fp8_blocks_are_the_configs_even_if_the_grid_divides_the_weight() -> None:
    """12 rows in blocks of 8 have two rows of scales, of 8 and of 4 rows, not of 6 and 6."""
    codec = ScaledFloat((8, 16))
    raw = {"weight": torch.ones(12, 16).to(torch.float8_e4m3fn), "scale": torch.tensor([[1.0], [2.0]])}
    assert codec.decode(raw, torch.float32)[:, 0].tolist() == [1.0] * 8 + [2.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mxfp4_is_what_transformers_dequantizes(dtype: torch.dtype) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).repeat(2).view(1, 4, 8, 16)  # every pair of codes
    scales = torch.randint(0, 255, (1, 4, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    raw = {"blocks": blocks[0], "scales": scales[0]}
    assert Mxfp4().shape(specs(raw)) == (256, 4)
    decoded, reference = Mxfp4().decode(raw, dtype), mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype)[0]
    assert decoded.is_contiguous()
    assert torch.equal(decoded, reference)
    assert torch.equal(torch.signbit(decoded), torch.signbit(reference))


def test_compressed_tensors_index_of_minus_ones_is_none() -> None:
    """compressed-tensors' mark that no activation order was used."""
    codec, raw, _ = golden("compressed-tensors-old", "int4_actorder")
    plain = PackedInt(4, 16).decode({k: raw[k] for k in ("packed", "scale")}, torch.bfloat16)
    raw["g_idx"] = torch.full_like(raw["g_idx"], -1)
    assert torch.equal(codec.decode(raw, torch.bfloat16), plain)


F8, I32, F16, U8 = torch.float8_e4m3fn, torch.int32, torch.float16, torch.uint8
REFUSED: list[tuple[Codec, dict[str, Spec], str]] = [
    (ScaledFloat((8, 8)), {"weight": Spec((16, 16), torch.int8), "scale": Spec((2, 2), torch.float32)}, "not FP8"),
    (
        ScaledFloat((8, 8)),
        {"weight": Spec((16, 16), F8), "scale": Spec((2, 3), torch.float32)},
        r"\[2, 3\].*\[16, 16\] in blocks of \[8, 8\]",
    ),
    (ScaledFloat(None), {"weight": Spec((16, 16), F8), "scale": Spec((2, 2), torch.float32)}, "in rows"),
    (ScaledFloat(None), {"weight": Spec((16, 16), F8), "scale": Spec((), torch.int64)}, "scale is torch.int64"),
    (Mxfp4(), {"blocks": Spec((4, 2, 15), U8), "scales": Spec((4, 2), U8)}, r"\[4, 2, 15\]"),
    (Mxfp4(), {"blocks": Spec((4, 2, 16), torch.int8), "scales": Spec((4, 2), U8)}, "int8"),
    (PackedInt(4, 16), {"packed": Spec((8, 8), I32), "scale": Spec((8, 3), F16)}, "no groups of 16 columns"),
    (PackedInt(4, 16), {"packed": Spec((8, 8), I32), "scale": Spec((8, 4), torch.int8)}, "int8"),
    (
        PackedInt(4, 16, symmetric=False),
        {"packed": Spec((8, 8), I32), "scale": Spec((8, 4), F16), "zero": Spec((8, 4), torch.int8)},
        "zero points",
    ),
    (
        Gptq(4, 16, ordered=False),
        {"qweight": Spec((8, 8), I32), "qzeros": Spec((4, 1), I32), "scales": Spec((3, 8), F16)},
        "not of one matrix",
    ),
    (
        Gptq(8, None, ordered=True),
        {
            "qweight": Spec((8, 8), I32),
            "qzeros": Spec((1, 2), I32),
            "scales": Spec((1, 8), F16),
            "g_idx": Spec((64,), I32),
        },
        r"g_idx has shape \[64\], not \[32\]",
    ),
    (
        Awq(16),
        {"qweight": Spec((8, 32), I32), "qzeros": Spec((2, 1), I32), "scales": Spec((2, 8), F16)},
        "not of one matrix",
    ),
]


@pytest.mark.parametrize(("codec", "specs", "match"), REFUSED)
def test_components_that_make_no_matrix_are_refused(codec: Codec, specs: dict[str, Spec], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        codec.shape(specs)


@pytest.mark.parametrize(
    "octets",
    [b"", b"{}", b"[1]", b'{"shape": [2], "blocksize": 64, "quant_type": "int8", "dtype": "float32"}', b"\xff" * 9],
)
def test_a_damaged_state_of_bitsandbytes_is_refused(octets: bytes) -> None:
    with pytest.raises(ValueError, match="its quant_state"):
        read_state(octets)
