import pytest
import torch

import offmoe.runtime.quantise
from offmoe.errors import CheckpointError, UnsupportedModelError
from offmoe.runtime.packing import INT8, WeightFormat, int4, unpack_words
from offmoe.runtime.quantise import quantise

FORMATS = [INT8, int4(32), int4(64), int4(128), int4(64, zero_points=True)]


def gaussian(rows: int = 64, cols: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def error(weight: torch.Tensor, how: WeightFormat, **options: bool) -> float:
    """Squared error relative to the weight's own square."""
    return ((quantise(weight, how, **options).values() - weight).square().sum() / weight.square().sum()).item()


@pytest.mark.parametrize(
    ("how", "at_most"), [(int4(32), 0.74), (int4(64), 0.73), (int4(128), 0.72), (INT8, 1.0)], ids=str
)
def test_the_search_beats_rounding_to_nearest(how: WeightFormat, at_most: float) -> None:
    """The baseline is plain symmetric absmax: max|w| on level 7."""
    weight = gaussian()
    assert error(weight, how) < at_most * error(weight, how, search=False)


def test_zero_points_help_where_values_lie_to_one_side() -> None:
    weight = gaussian() + 0.03
    assert error(weight, int4(64, zero_points=True)) < 0.6 * error(weight, int4(64))
    assert error(gaussian(), int4(64, zero_points=True)) < error(gaussian(), int4(64))


def test_rounding_to_nearest_is_the_textbooks() -> None:
    weight = gaussian(16, 64)
    packed = quantise(weight, int4(32), search=False)
    groups = weight.view(16, 2, 32)
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    assert torch.equal(packed.scales, scales)
    levels = (groups / scales.float()[..., None]).round().clamp(-8, 7).view(16, 64)
    assert torch.equal(unpack_words(packed.words, int4(32)), (levels + 8).to(torch.uint8))


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_what_is_on_the_grid_stays(how: WeightFormat) -> None:
    """Values that are exactly levels of a scale come back as they were: quantising twice changes nothing."""
    once = quantise(gaussian(), how).values()
    assert error(once, how) < 1e-10


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_rows_do_not_depend_on_each_other(how: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(48, 256)
    whole = quantise(weight, how)
    monkeypatch.setattr(offmoe.runtime.quantise, "BLOCK_VALUES", 7 * 256)
    in_blocks = quantise(weight, how)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.params("w").values(), in_blocks.params("w").values(), strict=True)
    )
    assert torch.equal(quantise(weight[16:32], how).words, whole.words[16:32])


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_zeros_constants_and_tiny_values(how: WeightFormat) -> None:
    weight = torch.zeros(16, 256)
    weight[1] = 3.0
    weight[2] = -3.0
    weight[3] = 1e-42  # below what a bf16 scale can say
    weight[4, 5] = 100.0  # one outlier among zeros
    values = quantise(weight, how).values()
    assert torch.isfinite(values).all()
    torch.testing.assert_close(values, weight, rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    weight = gaussian(16, 64).to(dtype)
    assert torch.equal(quantise(weight, int4()).words, quantise(weight.float(), int4()).words)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(bad: float) -> None:
    weight = gaussian(16, 64)
    weight[15, 63] = bad
    with pytest.raises(CheckpointError, match="layer 3 w2 holds NaN or infinity"):
        quantise(weight, int4(), "layer 3 w2")


def test_shape() -> None:
    with pytest.raises(UnsupportedModelError, match=r"weight is \[16, 100\]"):
        quantise(torch.zeros(16, 100), int4())
