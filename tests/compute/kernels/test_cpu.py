"""The contract of every variant and format: fp32 with the dequantized weights is right, up to what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch

from offmoe.compute.kernels.cpu import (
    CpuKernels,
    GatedExpert,
    Glu,
    PreparedExpert,
    PreparedWeight,
    Weight,
    kernel_threads,
)
from offmoe.compute.kernels.library import MAX_MULTIPLIED, MAX_TOKENS
from offmoe.device.cores import usable_cores
from offmoe.errors import ConfigError
from offmoe.pack.quantizer import TorchQuantizer
from offmoe.quant.packed_weight import INT8, MXFP4, PackedWeight, WeightFormat, fp8, int4, pack_words
from tests import packed
from tests.native import VARIANTS, library, library_with

Format = WeightFormat | None
"""None: bf16."""

FORMATS: list[Format] = [
    int4(32),
    int4(64),
    int4(128),
    int4(32, zero_points=True),
    INT8,
    WeightFormat("int8", 32),
    WeightFormat("int8", 128),
    MXFP4,
    fp8(128),
    fp8(32),
    None,
]
BF16_ERROR = 2**-8
"""Of the largest output: one rounding to bf16."""
INT8_ACTIVATIONS_ERROR, FLOAT_ERROR = 0.02, 1e-5
"""Relative L2 allowed: 2 % where activations are rounded to 8 bits; elsewhere nothing but sums is rounded."""


@cache
def random_weight(how: Format, rows: int, cols: int, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(1000 * rows + cols + seed)
    if how is not None and how.kind == "mxfp4":
        words = torch.randint(-(2**31), 2**31 - 1, (rows, cols // 8), dtype=torch.int32, generator=generator)
        exponents = torch.randint(118, 124, (rows, cols // 32), dtype=torch.uint8, generator=generator)
        return PackedWeight(how, words, exponents).tiled()
    if how is not None and how.kind == "fp8":
        if how.group == 32:  # as weights are: few words have a subnormal
            codes = (torch.randn(rows, cols, generator=generator) * 100).to(torch.float8_e4m3fn).view(torch.uint8)
        else:  # in every word, and all other bytes but 0x7f and 0xff, which are not numbers
            codes = torch.randint(0, 254, (rows, cols), dtype=torch.uint8, generator=generator)
            codes += (codes >= 127).to(torch.uint8)
        scales = torch.rand(rows, how.groups(cols), generator=generator) * 1e-3
        return PackedWeight(how, pack_words(codes, how), scales).tiled()
    values = torch.randn(rows, cols, generator=generator) * 0.05
    if how is not None and how.kind == "int8" and how.group:
        grouped = values.view(rows, -1, how.group)
        scales = (grouped.abs().amax(-1) / 127).bfloat16()
        codes = (grouped / scales.float().unsqueeze(-1)).round().clamp(-128, 127).to(torch.int8)
        return PackedWeight(how, pack_words(codes.view(rows, cols), how), scales).tiled()
    return values.bfloat16() if how is None else TorchQuantizer()(values, how).tiled()


@cache
def random_expert(how: Format, hidden: int, ff: int, seed: int = 0) -> GatedExpert:
    gate, up = random_weight(how, ff, hidden, 3 * seed + 1), random_weight(how, ff, hidden, 3 * seed + 2)
    return GatedExpert(gate, up, random_weight(how, hidden, ff, 3 * seed + 3))


def inputs(tokens: int, cols: int) -> torch.Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens))


KNOWN: dict[int, tuple[Weight, torch.Tensor]] = {}


def values(weight: Weight) -> torch.Tensor:
    """float32; remembered, because unpacking takes longer than what is tested."""
    if id(weight) not in KNOWN:
        KNOWN[id(weight)] = weight, packed.values(weight) if isinstance(weight, PackedWeight) else weight.float()
    return KNOWN[id(weight)][1]


def reference(expert: GatedExpert, glu: Glu, x: torch.Tensor) -> torch.Tensor:
    gate, up = x @ values(expert.gate).T, x @ values(expert.up).T
    gate = gate if expert.gate_bias is None else gate + expert.gate_bias
    up = up if expert.up_bias is None else up + expert.up_bias
    down = glu(gate, up) @ values(expert.down).T
    return down if expert.down_bias is None else down + expert.down_bias


def error(got: torch.Tensor, right: torch.Tensor) -> float:
    return ((got - right).norm() / right.norm()).item()


@pytest.fixture(params=[f"{v}-{a}" for v in VARIANTS for a in ("int8", "float")])
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    variant, activations = request.param.split("-")
    with CpuKernels(library_with(variant), 2, variant, activations == "int8") as native:
        yield native


def allowed(kernels: CpuKernels, how: Format) -> float:
    rounds = how is not None and how.kind != "fp8" and kernels.int8_activations
    return INT8_ACTIVATIONS_ERROR if rounds else FLOAT_ERROR


@pytest.mark.parametrize("how", FORMATS, ids=str)
class TestEveryFormat:
    def test_an_expert_on_any_number_of_tokens(self, kernels: CpuKernels, how: Format) -> None:
        expert = random_expert(how, 256, 384)
        run = kernels.expert(expert, Glu())
        for tokens in (1, 2, 3, 4, 5, 8, 9, 15, MAX_TOKENS, MAX_TOKENS + 3):
            x = inputs(tokens, 256)
            got, right = run(x), reference(expert, Glu(), x)
            assert error(got, right) < allowed(kernels, how), tokens
            for a, b in zip(got, right, strict=True):  # a wrong one must not hide among many
                assert error(a, b) < 2 * allowed(kernels, how), tokens

    def test_a_weight_of_any_number_of_tiles(self, kernels: CpuKernels, how: Format) -> None:
        for tiles in (1, 2, 3, 11):
            weight, bias = random_weight(how, 16 * tiles, 128), torch.linspace(-1, 1, 16 * tiles)
            for x in (inputs(3, 128), inputs(13, 128)):
                right = x @ values(weight).T + bias
                assert error(kernels.linear(weight, bias)(x), right) < allowed(kernels, how), tiles

    def test_activations_and_biases(self, kernels: CpuKernels, how: Format) -> None:
        plain = random_expert(how, 128, 256)
        biases = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (256, 256, 128)]
        expert = GatedExpert(plain.gate, plain.up, plain.down, *biases)
        for x in (inputs(5, 128), inputs(20, 128)):
            for glu in (Glu("gelu_tanh"), Glu("clamped", limit=1.0, alpha=1.702)):
                assert error(kernels.expert(expert, glu)(x), reference(expert, glu, x)) < allowed(kernels, how), glu

    def test_experts_of_one_call_have_the_bits_of_calls_of_their_own(self, kernels: CpuKernels, how: Format) -> None:
        experts = [random_expert(how, 256, 384, seed) for seed in range(5)]
        prepared = [PreparedExpert(expert, Glu()) for expert in experts]
        alone = [kernels.expert(expert, Glu()) for expert in experts]
        counts = (1, 9, 3, 1, MAX_TOKENS - 14)
        x = inputs(MAX_TOKENS, 256)
        rows = [run(part) for run, part in zip(alone, x.split(counts), strict=True)]
        assert torch.equal(kernels.experts(prepared, x, counts), torch.cat(rows))
        one = kernels.experts(prepared, x[:1])
        assert torch.equal(one, torch.cat([run(x[:1]) for run in alone]))


@pytest.mark.parametrize(("gate_and_up", "down"), [(int4(32), None), (None, int4(32)), (INT8, int4(128))])
def test_down_in_another_format(kernels: CpuKernels, gate_and_up: Format, down: Format) -> None:
    gate, up = (random_weight(gate_and_up, 384, 256, seed) for seed in (1, 2))
    expert = GatedExpert(gate, up, random_weight(down, 256, 384))
    for tokens in (2, 11, 12, 40):
        x = inputs(tokens, 256)
        bound = max(allowed(kernels, gate_and_up), allowed(kernels, down))
        assert error(kernels.expert(expert, Glu())(x), reference(expert, Glu(), x)) < bound, tokens


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(16, 32), (80, 288), (176, 512)])  # a tile; five, and less than two depths
@pytest.mark.parametrize("tokens", [1, 5, 6, 7, 64, MAX_MULTIPLIED + 3])
def test_many_inputs_of_a_bf16_weight(variant: str, rows: int, cols: int, tokens: int, biased: bool) -> None:
    weight, bias = random_weight(None, rows, cols), torch.linspace(-1, 1, rows) if biased else None
    x = inputs(tokens, cols).bfloat16()
    with CpuKernels(library_with(variant), 2, variant) as native:
        run = native.product_of(PreparedWeight(weight, bias))
        out = run(x)
        assert torch.equal(run(torch.stack((x, x), 1)[:, 1]), out)  # rows that stand apart
    exact = x.double() @ values(weight).double().T + (0 if bias is None else bias.double())
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() <= BF16_ERROR * exact.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_many_inputs_that_are_not_numbers(variant: str) -> None:
    """Each stays within its row, in whatever group of rows it is computed."""
    weight, x = random_weight(None, 32, 64), inputs(13, 64).bfloat16()
    x[4, 3], x[12, 0] = torch.nan, torch.inf
    with CpuKernels(library_with(variant), 2, variant) as native:
        finite = native.product_of(PreparedWeight(weight))(x).isfinite().all(1)
    assert finite.tolist() == [row not in (4, 12) for row in range(13)]


def test_many_inputs_by_any_number_of_threads() -> None:
    weight, x = PreparedWeight(random_weight(None, 176, 512)), inputs(70, 512).bfloat16()
    results = []
    for threads in (1, 2, 5):
        with CpuKernels(library(), threads) as native:
            results += [native.product_of(weight)(x) for _ in range(5)]
    assert all(torch.equal(r, results[0]) for r in results)


def test_experts_of_one_call_may_differ(kernels: CpuKernels) -> None:
    """In format, in width and in activation; what they share is laid out once."""
    hows = [int4(), int4(32), int4(32, zero_points=True), INT8, int4(), None]
    glus = [Glu(), Glu("gelu_tanh"), Glu(), Glu("clamped", 1.0), Glu(), Glu()]
    experts = [random_expert(how, 128, 128 * (1 + i % 3)) for i, how in enumerate(hows)]
    prepared = [PreparedExpert(expert, glu) for expert, glu in zip(experts, glus, strict=True)]
    x = inputs(1, 128)
    alone = [kernels.expert(expert, glu)(x) for expert, glu in zip(experts, glus, strict=True)]
    assert torch.equal(kernels.experts(prepared, x), torch.cat(alone))


def test_most_experts_of_one_call(kernels: CpuKernels) -> None:
    expert = random_expert(int4(), 128, 128)
    x = inputs(MAX_TOKENS, 128)
    prepared = [PreparedExpert(expert, Glu())] * MAX_TOKENS
    alone = [kernels.expert(expert, Glu())(row) for row in x.split(1)]
    assert torch.equal(kernels.experts(prepared, x, [1] * MAX_TOKENS), torch.cat(alone))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_scales_of_other_dtypes(kernels: CpuKernels, scale_dtype: torch.dtype) -> None:
    """Half precision down to its subnormals, which AWQ and GPTQ checkpoints have."""
    how = WeightFormat("int4", 32, scale_dtype=scale_dtype)
    bf16 = random_weight(int4(32), 32, 128)
    assert isinstance(bf16, PackedWeight)
    for factor in (1.0, 1e-4):  # scales around 7e-3 and 7e-7
        scales = (bf16.scales.float() * factor).to(scale_dtype)
        weight = PackedWeight(how, bf16.words, scales)
        x = inputs(2, 128)
        assert error(kernels.linear(weight)(x), x @ values(weight).T) < allowed(kernels, how)


def test_int8_in_groups_that_divide_the_row(kernels: CpuKernels) -> None:
    for cols in (16, 48, 96, 320):  # activations in groups of 16, 16, 32, 64
        weight = random_weight(INT8, 48, cols)
        x = inputs(3, cols)
        assert error(kernels.linear(weight)(x), x @ values(weight).T) < allowed(kernels, INT8)


def test_extreme_levels_do_not_saturate(kernels: CpuKernels) -> None:
    """All weights at one end of their range, all activations at 127 or -127: the largest sums there can be."""
    for how, word in ((int4(128), -1), (int4(128), 0), (MXFP4, 0x77777777), (MXFP4, -1), (INT8, -(2**31) + 0x808080)):
        scales = torch.full((16, how.groups(256)), 1, dtype=how.scale_dtype)
        scales = scales * 127 if how.kind == "mxfp4" else scales
        weight = PackedWeight(how, torch.full((16, 256 // how.word_values), word, dtype=torch.int32), scales).tiled()
        for x in (torch.ones(1, 256), -torch.ones(4, 256)):
            torch.testing.assert_close(kernels.linear(weight)(x), x @ values(weight).T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_strides_of_the_input(kernels: CpuKernels, dtype: torch.dtype) -> None:
    expert = random_expert(int4(), 128, 128)
    x = inputs(6, 256)[:, ::2].to(dtype)
    got = kernels.expert(expert, Glu())(x)
    assert got.dtype == dtype
    assert error(got.float(), reference(expert, Glu(), x.float())) < 0.03


def test_what_is_not_a_number_is_not_hidden(kernels: CpuKernels) -> None:
    for how in (int4(), INT8, None):
        run = kernels.expert(random_expert(how, 128, 128), Glu())
        x = inputs(3, 128)
        for bad in (float("nan"), float("inf")):
            x[1, 77] = bad
            assert torch.isfinite(run(x)).all(dim=1).tolist() == [True, False, True]


def test_every_byte_of_fp8(kernels: CpuKernels) -> None:
    """Each is what torch makes of it; the two that are not a number show, even times zero, in their row alone."""
    how = fp8(32)
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat_interleave(2, dim=1)  # [16, 32], a byte twice
    scales = torch.linspace(0.5, 2, 16).view(16, 1)
    run = kernels.linear(PackedWeight(how, pack_words(codes, how), scales).tiled())
    weight = codes.view(torch.float8_e4m3fn).float() * scales
    for tokens in (1, 2, 4, 32):
        x = torch.eye(32)[:tokens]
        torch.testing.assert_close(run(x), x @ weight.T, rtol=1e-6, atol=0, equal_nan=True)
        assert run(x).isnan().any(dim=0).tolist() == [i in (7, 15) for i in range(16)]
    finite = run(torch.eye(32))[:, :7]
    assert torch.equal(finite, weight[:7].T)


def test_no_tokens(kernels: CpuKernels) -> None:
    assert kernels.expert(random_expert(int4(), 128, 128), Glu())(torch.empty(0, 128)).shape == (0, 128)


def test_zeros_stay_zeros(kernels: CpuKernels) -> None:
    assert not kernels.expert(random_expert(int4(), 128, 128), Glu())(torch.zeros(3, 128)).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_does_not_depend_on_its_neighbors(variant: str) -> None:
    """Sums of int8 products are exact and groups are added in order: how tokens are cut into blocks cannot show."""
    with CpuKernels(library_with(variant), 1, variant) as native:
        run = native.expert(random_expert(int4(), 128, 192), Glu())
        x = inputs(7, 128)
        together = run(x)
        for i in range(7):
            assert torch.equal(run(x[i : i + 1])[0], together[i])


def test_threads_do_not_change_a_bit() -> None:
    expert, x = random_expert(int4(), 512, 1024), inputs(4, 512)
    results = []
    for threads in (1, 2, 5):
        with CpuKernels(library(), threads) as native:
            run = native.expert(expert, Glu())
            results += [run(x) for _ in range(20)]
    assert all(torch.equal(r, results[0]) for r in results)


def test_callers_take_turns() -> None:
    """Many short calls of several threads: every one gets its own result."""
    experts = [random_expert(how, 128, 128) for how in (int4(), INT8, None)]
    xs = [inputs(n, 128) for n in (1, 2, 3)]
    with CpuKernels(library(), 3) as native, ThreadPoolExecutor(3) as pool:
        runs = [native.expert(expert, Glu()) for expert in experts]
        expected = [run(x) for run, x in zip(runs, xs, strict=True)]

        def caller(i: int) -> bool:
            return all(torch.equal(runs[i](xs[i]), expected[i]) for _ in range(200))

        assert all(pool.map(caller, range(3)))


def test_close_twice_and_use_after() -> None:
    native = CpuKernels(library(), 2)
    run = native.linear(random_weight(int4(), 16, 64))
    native.close()
    native.close()
    with pytest.raises(AssertionError, match="used after close"):
        run(inputs(1, 64))


def test_the_weights_live_as_long_as_the_function() -> None:
    weight = torch.ones(16, 64, dtype=torch.bfloat16)
    expected = inputs(1, 64).sum(1, keepdim=True).expand(1, 16)
    with CpuKernels(library(), 1) as native:
        run = native.linear(weight)
        del weight
        junk = [torch.zeros(16, 64, dtype=torch.bfloat16) for _ in range(100)]
        assert error(run(inputs(1, 64)), expected) < FLOAT_ERROR
        del junk


def test_variant_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="kernel variant 'sse9' does not run here; there are portable"):
        CpuKernels(library(), 1, "sse9")


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(16, 64),
        torch.zeros(24, 64, dtype=torch.bfloat16),
        torch.zeros(16, 80, dtype=torch.bfloat16),
        PackedWeight(WeightFormat("int4", None), torch.zeros(1, 8, 16, dtype=torch.int32), torch.zeros(1, 1, 16)),
        PackedWeight(WeightFormat("int4", 256), torch.zeros(1, 32, 16, dtype=torch.int32), torch.zeros(1, 1, 16)),
    ],
    ids=["float32", "rows", "columns", "int4 per row", "large group"],
)
def test_weights_that_no_kernel_has(weight: Weight) -> None:
    with CpuKernels(library(), 1) as native, pytest.raises(AssertionError, match="kernels have no"):
        native.linear(weight)


def test_reading_memory() -> None:
    with CpuKernels(library(), 2) as native:
        native.read(torch.zeros(10_000_001, dtype=torch.uint8))
        native.read(torch.zeros(3, dtype=torch.uint8))


def test_threads() -> None:
    assert 1 <= kernel_threads() <= usable_cores() <= 4096
