"""The two ways to add up the rows of a token's experts."""

from __future__ import annotations

import pytest
import torch

from offmoe.compute.kernels.torch_ffn import accumulate, combine


def loop(weighted: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As architectures outside transformers' registry write it."""
    tokens, k = ids.shape
    out = torch.zeros(tokens, weighted.shape[-1], dtype=dtype)
    for expert in ids[ids >= 0].unique():
        choice, token = torch.where((ids == expert).T)
        out.index_add_(0, token, weighted.view(tokens, k, -1)[token, choice].to(dtype))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_accumulate_adds_as_a_loop_over_experts_does(dtype: torch.dtype, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    ids = torch.stack([torch.randperm(9, generator=generator)[:k] for _ in range(40)]) - 1  # -1 is nobody
    weighted = torch.randn(40 * k, 16, generator=generator)
    found = accumulate(weighted, ids, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, loop(weighted, ids, dtype))
    if dtype == torch.bfloat16 and k == 5:
        assert not torch.equal(found, combine(weighted, torch.ones(40, k), dtype))


def test_accumulate_ignores_rows_that_are_nobodys() -> None:
    weighted = torch.tensor([[1.0], [float("nan")], [float("inf")], [2.0]])
    assert accumulate(weighted, torch.tensor([[3, -1], [-1, 0]]), torch.float32).tolist() == [[1.0], [2.0]]
