"""Linear layers by the C kernels: those of torch up to the order of sums, and torch itself for all else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from offmoe.compute.dense_linear import FEW_ROWS, DenseKernels, fits_kernels, max_rows
from offmoe.compute.kernels.cpu import CpuKernels
from offmoe.compute.kernels.library import MAX_TOKENS, status
from offmoe.pack.quantizer import quantizer
from offmoe.quant.packed_values import values
from offmoe.quant.packed_weight import INT8, WeightFormat, int4

ROUNDING = 2**-8
"""bf16 keeps 8 bits: an output is within one rounding of the exact one."""


@pytest.fixture
def kernels() -> Iterator[DenseKernels]:
    library = status().library
    if library is None:
        pytest.skip(status().message)
    dense = DenseKernels(CpuKernels(library, 2, int8_activations=False))
    yield dense
    dense.close()


def weight(rows: int = 48, cols: int = 96) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)).bfloat16()


def rows_of(count: int, cols: int = 96) -> torch.Tensor:
    return torch.randn(count, cols, generator=torch.Generator().manual_seed(2)).bfloat16()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, FEW_ROWS), (2, 2), (FEW_ROWS + 1,), (11,), (12,), (64,), (150,), (3, 50)]
)
def test_the_outputs_are_those_of_torch_in_float32(kernels: DenseKernels, shape: tuple[int, ...], biased: bool) -> None:
    w = weight()
    bias = torch.linspace(-1, 1, 48).bfloat16() if biased else None
    x = rows_of(torch.Size(shape).numel()).view(*shape, 96)
    out = kernels.linear(w, bias)(x, w, bias)
    exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    assert out.dtype == torch.bfloat16
    assert out.shape == (*shape, 48)
    assert (out.double() - exact).abs().max() <= ROUNDING * exact.abs().max()


def test_a_few_rows_do_not_go_through_torch(kernels: DenseKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight()
    calls: list[int] = []
    kernels.max_rows = FEW_ROWS
    linear = kernels.linear(w, None)
    product = F.linear

    def counted(x: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        calls.append(len(x))
        return product(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "linear", counted)
    linear(rows_of(FEW_ROWS), w, None)
    assert not calls
    linear(rows_of(FEW_ROWS + 1), w, None)
    assert len(calls) == 1
    kernels.max_rows = None
    linear(rows_of(MAX_TOKENS), w, None)
    linear(rows_of(MAX_TOKENS + 1), w, None)
    assert len(calls) == 1


def test_torch_computes_many_rows_where_it_has_a_product_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert max_rows() is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert max_rows() == FEW_ROWS


def test_a_weight_that_was_replaced_is_the_one_that_counts(kernels: DenseKernels) -> None:
    w, x = weight(), rows_of(1)
    linear = kernels.linear(w, None)
    assert torch.equal(linear(x, -w, None), F.linear(x, -w))


def test_torch_computes_what_kernels_do_not(kernels: DenseKernels) -> None:
    w = weight()
    linear = kernels.linear(w, None)
    x = rows_of(1)
    differentiable = x.clone().requires_grad_()
    linear(differentiable, w, None).sum().backward()
    assert differentiable.grad is not None
    assert torch.equal(differentiable.grad, F.linear(torch.ones(1, 48).bfloat16(), w.T))
    with torch.autocast("cpu", dtype=torch.float16):
        assert linear(x, w, None).dtype == torch.float16
    assert linear(x[:0], w, None).shape == (0, 48)
    with pytest.raises(RuntimeError):
        linear(x.float(), w, None)  # as torch refuses it


@pytest.mark.parametrize("how", [INT8, int4(32), int4(32, zero_points=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_quantized_weight_is_computed_as_it_is_decoded(
    kernels: DenseKernels, how: WeightFormat, dtype: torch.dtype
) -> None:
    w = weight()
    with quantizer() as quantize:
        packed = quantize(w, how)
    decoded = values(packed)
    assert torch.equal(decoded, values(packed.tiled()))
    assert packed.nbytes == how.nbytes(*w.shape)
    assert ((decoded - w.float()).norm() / w.float().norm()).item() < (0.02 if how.kind == "int8" else 0.15)
    linear, absent = kernels.linear(packed.tiled(), None), torch.empty(w.shape, dtype=dtype, device="meta")
    for count in (1, FEW_ROWS + 1, 150):
        x = rows_of(count).to(dtype)
        out, exact = linear(x, absent, None), F.linear(x.double(), decoded.double())
        assert out.dtype == dtype
        assert (out.double() - exact).abs().max() <= ROUNDING * exact.abs().max()
    x = rows_of(1).to(dtype).requires_grad_()
    linear(x, absent, None).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, F.linear(torch.ones(1, 48, dtype=dtype), decoded.to(dtype).T))


def test_after_closing_torch_computes(kernels: DenseKernels) -> None:
    w, x = weight(), rows_of(1)
    linear = kernels.linear(w, None)
    kernels.close()
    kernels.close()
    assert torch.equal(linear(x, w, None), F.linear(x, w))


@pytest.mark.parametrize(
    ("tensor", "fits"),
    [
        (torch.zeros(32, 64).bfloat16(), True),
        (torch.zeros(24, 64).bfloat16(), False),
        (torch.zeros(32, 80).bfloat16(), False),
        (torch.zeros(32, 64), False),
        (torch.zeros(64, 32).bfloat16().T, False),
        (torch.zeros(32, 64, device="meta").bfloat16(), False),
    ],
)
def test_which_weights_kernels_read(tensor: torch.Tensor, fits: bool) -> None:
    assert fits_kernels(tensor) == fits


def test_kernels_that_share_threads_leave_them_running(kernels: DenseKernels) -> None:
    library = status().library
    assert library is not None
    w, x = weight(), rows_of(1)
    linear = kernels.linear(w, None)
    right = linear(x, w, None)
    with CpuKernels(library, kernels.kernels) as others:
        assert torch.equal(others.linear(w)(x), right)
    assert torch.equal(linear(x, w, None), right)
