"""Routers of one token by every variant of the C kernels, against their definition in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from offmoe.compute.kernels.cpu import CpuKernels
from offmoe.compute.kernels.token_router import Routed, Selection, TokenRouter
from tests.native import VARIANTS, library_with

HIDDEN = 96
FLOAT = torch.float32
SELECTIONS = {
    "softmax": Selection(4),
    "softmax over all": Selection(4, normalize=False),
    "float": Selection(2, rounds=False, logits=FLOAT, scores=FLOAT),
    "sigmoid": Selection(3, sigmoid=True, normalize=False, rounds=False, logits=FLOAT, scores=FLOAT, scale=2.5),
    "groups": Selection(4, True, rounds=False, logits=FLOAT, scores=FLOAT, groups=4, kept_groups=2, scale=1.5),
}


@pytest.fixture(params=VARIANTS)
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    with CpuKernels(library_with(request.param), 2, request.param) as kernels:
        yield kernels


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def definition(
    x: torch.Tensor, weight: torch.Tensor, how: Selection, bias: torch.Tensor | None, correction: torch.Tensor | None
) -> Routed:
    """What a router computes, in float64 but for logits that are rounded."""
    logits = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    if how.rounds:
        logits = logits.bfloat16().double()
    weights = logits.sigmoid() if how.sigmoid else logits.softmax(-1)
    choice = weights + (0 if correction is None else correction.double())
    by_group = choice.view(how.groups, -1)
    if how.groups > 1:
        kept = by_group.topk(2).values.sum(-1).topk(how.kept_groups).indices
        by_group = by_group.masked_fill(~torch.isin(torch.arange(how.groups), kept)[:, None], float("-inf"))
    ids = by_group.view(1, -1).topk(how.top_k).indices
    scores = weights.gather(1, ids)
    if how.normalize:
        scores = scores / scores.sum()
    return Routed(logits, scores * how.scale, ids)


@pytest.mark.parametrize("experts", [8, 60, 128])
@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_chooses_as_defined(kernels: CpuKernels, name: str, experts: int, biased: bool) -> None:
    how = SELECTIONS[name]
    weight, bias = random(experts, HIDDEN, seed=experts).bfloat16(), random(experts, seed=1) if biased else None
    correction = random(experts, seed=2) / 4 if biased and how.sigmoid else None
    router = TokenRouter(kernels, weight, how, bias=bias, correction=correction)
    for seed in range(20):
        x = random(1, HIDDEN, seed=seed).bfloat16() / 4
        found, wanted = router(x), definition(x, weight, how, bias, correction)
        assert (found.logits.dtype, found.scores.dtype, found.ids.dtype) == (how.logits, how.scores, torch.int64)
        rtol, atol = (2**-7, 1e-4) if how.logits == torch.bfloat16 else (1e-4, 1e-5)
        torch.testing.assert_close(found.logits.double(), wanted.logits, rtol=rtol, atol=atol)
        if how.rounds:  # two logits may be one number in bf16, or be rounded apart
            weights = found.logits.double().softmax(-1)
            assert len(set(found.ids[0].tolist())) == how.top_k
            assert weights[0, found.ids[0]].tolist() == weights.topk(how.top_k).values[0].tolist()
            scores = weights.gather(1, found.ids)
            wanted = Routed(wanted.logits, scores / scores.sum() if how.normalize else scores, found.ids)
        assert found.ids.tolist() == wanted.ids.tolist()
        torch.testing.assert_close(found.scores.double(), wanted.scores, rtol=rtol, atol=atol)


def test_a_large_weight_has_all_threads(kernels: CpuKernels) -> None:
    weight, how = random(512, 2048, seed=3).bfloat16(), Selection(8, rounds=False, logits=FLOAT, scores=FLOAT)
    x = random(1, 2048, seed=4).bfloat16() / 50
    found, wanted = TokenRouter(kernels, weight, how)(x), definition(x, weight, how, None, None)
    assert found.ids.tolist() == wanted.ids.tolist()
    torch.testing.assert_close(found.logits.double(), wanted.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "experts", "fits"),
    [
        (Selection(8), 8, True),
        (Selection(9), 8, False),
        (Selection(0), 8, False),
        (Selection(2, groups=3), 8, False),
        (Selection(2, groups=4, kept_groups=1), 8, True),
        (Selection(3, groups=4, kept_groups=1), 8, False),
        (Selection(2, groups=2, kept_groups=3), 8, False),
        (Selection(1, groups=128, kept_groups=1), 128, False),
    ],
)
def test_what_can_be_asked(how: Selection, experts: int, fits: bool) -> None:
    assert how.fits(experts) == fits
