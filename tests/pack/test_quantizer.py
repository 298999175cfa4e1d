"""The quantizer loses little, and the C encoder gives the bits that torch's operators define."""

from collections.abc import Callable, Iterator

import pytest
import torch

import offmoe.pack.quantizer
from offmoe.errors import CapacityError, CheckpointError, UnsupportedModelError
from offmoe.pack.fit import round_to_nearest
from offmoe.pack.quantizer import Loss, NativeQuantizer, Quantizer, TorchQuantizer, quantizer
from offmoe.quant.int_formats import PackedInt
from offmoe.quant.packed_weight import INT8, PackedWeight, WeightFormat, int4
from tests.native import VARIANTS, library, library_with
from tests.packed import unpack_words, values

FORMATS = [INT8, int4(32), int4(64), int4(128), int4(64, zero_points=True)]


def gaussian(rows: int = 64, cols: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def quantize(weight: torch.Tensor, how: WeightFormat) -> PackedWeight:
    with quantizer() as best:
        return best(weight, how)


def error(weight: torch.Tensor, how: WeightFormat, by: Callable[..., PackedWeight] = quantize) -> float:
    """The squared error divided by the squared weight."""
    return ((values(by(weight, how)) - weight).square().sum() / weight.square().sum()).item()


def same(a: PackedWeight, b: PackedWeight) -> None:
    """Assert that two weights have the same bits, signs of zeros included."""
    for x, y in zip(a.params("w").values(), b.params("w").values(), strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def at_rest(packed: PackedWeight) -> dict[str, torch.Tensor]:
    """The tensors that compressed-tensors stores for a packed weight."""
    raw = {"packed": packed.words ^ (0 if packed.format.bits == 4 else -0x7F7F7F80), "scale": packed.scales}
    if packed.zeros is not None:
        nibbles = packed.zeros.view(-1, 8, packed.zeros.shape[1]).int()  # [rows / 8, 8, groups]
        raw["zero"] = sum((nibbles[:, i] << 4 * i for i in range(8)), torch.zeros((), dtype=torch.int32))
    return raw


@pytest.fixture(params=["torch", *VARIANTS])
def each(request: pytest.FixtureRequest) -> Iterator[Quantizer]:
    if request.param == "torch":
        yield TorchQuantizer()
        return
    with NativeQuantizer(library_with(request.param), 2, request.param) as native:
        yield native


@pytest.mark.parametrize(
    ("how", "at_most"), [(int4(32), 0.74), (int4(64), 0.73), (int4(128), 0.72), (INT8, 1.0)], ids=str
)
def test_the_search_beats_rounding_to_nearest(how: WeightFormat, at_most: float) -> None:
    """The baseline is plain symmetric absmax: max|w| on level 7."""
    weight = gaussian()
    assert error(weight, how) < at_most * error(weight, how, TorchQuantizer(round_to_nearest))


def test_zero_points_help_where_values_lie_to_one_side() -> None:
    weight = gaussian() + 0.03
    assert error(weight, int4(64, zero_points=True)) < 0.6 * error(weight, int4(64))
    assert error(gaussian(), int4(64, zero_points=True)) < error(gaussian(), int4(64))


def test_rounding_to_nearest_is_the_textbooks() -> None:
    weight = gaussian(16, 64)
    packed = TorchQuantizer(round_to_nearest)(weight, int4(32))
    groups = weight.view(16, 2, 32)
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    assert torch.equal(packed.scales, scales)
    levels = (groups / scales.float()[..., None]).round().clamp(-8, 7).view(16, 64)
    assert torch.equal(unpack_words(packed.words, int4(32)), (levels + 8).to(torch.uint8))


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_what_is_on_the_grid_stays(how: WeightFormat) -> None:
    """Values that are exactly levels of a scale come back as they were: quantizing twice changes nothing."""
    once = values(quantize(gaussian(), how))
    assert error(once, how) < 1e-10


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_rows_do_not_depend_on_each_other(how: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, by_torch = gaussian(48, 256), TorchQuantizer()
    whole = by_torch(weight, how)
    monkeypatch.setattr(offmoe.pack.quantizer, "BLOCK_VALUES", 7 * 256)
    same(by_torch(weight, how), whole)
    assert torch.equal(by_torch(weight[16:32], how).words, whole.words[16:32])


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_zeros_constants_and_tiny_values(how: WeightFormat) -> None:
    weight = torch.zeros(16, 256)
    weight[1] = 3.0
    weight[2] = -3.0
    weight[3] = 1e-42  # below what a bf16 scale can say
    weight[4, 5] = 100.0  # one outlier among zeros
    decoded = values(quantize(weight, how))
    assert torch.isfinite(decoded).all()
    torch.testing.assert_close(decoded, weight, rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    weight = gaussian(16, 64).to(dtype)
    assert torch.equal(quantize(weight, int4()).words, quantize(weight.float(), int4()).words)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(each: Quantizer, bad: float) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = gaussian(16, 64).to(dtype)
        weight[15, 63] = bad
        with pytest.raises(CheckpointError, match="layer 3 w2 holds NaN or infinity"):
            each(weight, int4(), "layer 3 w2")


def test_shape(each: Quantizer) -> None:
    with pytest.raises(UnsupportedModelError, match=r"weight is \[16, 100\]"):
        each(torch.zeros(16, 100), int4())


# --- the C encoder against its definition


def hard(rows: int, cols: int, scale: float) -> torch.Tensor:
    """Gaussian rows, and some special ones: constants, zeros, outliers, one sign."""
    weight = gaussian(rows, cols) * 50 * scale
    weight[0], weight[1], weight[2], weight[3] = 0, scale, -scale, 1e-42
    weight[4, 5] = 100 * scale  # one outlier
    weight[5], weight[6] = weight[5].abs(), -weight[6].abs()
    weight[7, ::2], weight[7, 1::2] = scale, -scale  # the largest value has both signs
    return weight


ENCODED = [
    *(int4(group, zeros) for group in (32, 64, 128) for zeros in (False, True)),
    *(WeightFormat("int4", 64, zeros, dtype) for dtype in (torch.float16, torch.float32) for zeros in (False, True)),
    *(WeightFormat("int8", None, scale_dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
]


@pytest.mark.parametrize("how", ENCODED, ids=lambda how: f"{how} {how.zero_points} {how.scale_dtype}")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_encoder_gives_the_bits_that_torch_defines(variant: str, how: WeightFormat) -> None:
    widths = (16, 48, 96, 320, 1152) if how.bits == 8 else (how.group or 0, 640)
    with NativeQuantizer(library_with(variant), 2, variant) as native:
        for cols in widths:
            for scale in (0.02, 1e-6, 3e-9, 500.0):  # scales in half precision are subnormal, or zero
                for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
                    weight = hard(16, cols, scale).to(dtype)
                    same(native(weight, how), TorchQuantizer()(weight, how))


def test_threads_do_not_change_a_bit() -> None:
    weight = gaussian(2048, 512).bfloat16()
    packed = []
    for threads in (1, 2, 5):
        with NativeQuantizer(library(), threads) as native:
            packed += [native(weight, int4()) for _ in range(3)]
    for other in packed[1:]:
        same(other, packed[0])


def test_weights_that_lie_otherwise() -> None:
    weight = gaussian(128, 64)
    with NativeQuantizer(library(), 1) as native:
        same(native(weight.mT, int4()), TorchQuantizer()(weight.mT, int4()))


def test_memory_that_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = library()
    monkeypatch.setattr(compiled.calls, "offmoe_encode", lambda *arguments: 2)
    with NativeQuantizer(compiled, 1) as native, pytest.raises(CapacityError, match="no memory to quantize w2"):
        native(gaussian(16, 64), int4(), "w2")


def test_close_twice_and_use_after() -> None:
    native = quantizer()
    native.close()
    native.close()
    if isinstance(native, NativeQuantizer):
        with pytest.raises(AssertionError, match="used after close"):
            native(gaussian(16, 64), int4())


# --- what was lost


@pytest.mark.parametrize("how", ENCODED, ids=lambda how: f"{how} {how.zero_points} {how.scale_dtype}")
def test_the_loss_is_that_of_what_is_written(each: Quantizer, how: WeightFormat) -> None:
    weight = gaussian(48, 384).to(how.scale_dtype)
    raw = at_rest(each(weight, how))
    loss = each.loss(weight, how, raw)
    error = (PackedInt(how.bits, how.group, symmetric=not how.zero_points).decode(raw, torch.float64) - weight).abs()
    assert loss.values == weight.numel()
    assert loss.max_error == float(error.max())
    assert loss.total_error == pytest.approx(float(error.sum()), rel=1e-5)
    assert loss.total_squared == pytest.approx(float(error.square().sum()), rel=1e-5)
    assert loss.total_square == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    raw["packed"][47, -1] ^= 0x11 << 24  # one wrong code shows
    assert each.loss(weight, how, raw).total_squared > loss.total_squared + 1e-8


def test_losses_add_up() -> None:
    parts = [Loss(1.0, 2.0, 3.0, 4.0, 2), Loss(0.5, 1.0, 9.0, 8.0, 4)]
    assert sum(parts, Loss()) == Loss(1.0, 3.0, 12.0, 12.0, 6)
    assert sum(parts, Loss()).mean_error == 0.5
    assert sum(parts, Loss()).relative_error == 1.0
    assert Loss().mean_error == Loss().relative_error == 0.0
