"""Attention of one token and RMS norms by every variant of the C kernels, against their definitions in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from offmoe.compute.kernels.cpu import CpuKernels, PreparedWeight
from offmoe.compute.kernels.token_attention import HeadNorms, Norm, Projections, RowNorm, TokenAttention
from offmoe.pack.quantizer import TorchQuantizer
from offmoe.quant.packed_values import values
from offmoe.quant.packed_weight import INT8
from tests.native import VARIANTS, library_with

HIDDEN, WIDTH = 96, 64
CHUNK = 256
"""Tokens of a task (offmoe.h)."""
ROUNDING = 2**-8
"""bf16 keeps 8 bits."""


@pytest.fixture(params=VARIANTS)
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    with CpuKernels(library_with(request.param), 3, request.param, int8_activations=False) as kernels:
        yield kernels


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: Norm) -> torch.Tensor:
    """As the families of transformers write it, from bf16 to bf16."""
    unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if kind is Norm.ROUNDS_TWICE:
        return weight * unit.bfloat16()
    return ((weight.float() + (kind is Norm.OF_ONE_MORE)) * unit).bfloat16()


@pytest.mark.parametrize("kind", Norm)
@pytest.mark.parametrize("width", [16, 96, 2048])
def test_norms_round_as_the_families_do(kernels: CpuKernels, kind: Norm, width: int) -> None:
    x, weight = random(5, width), random(width, seed=1)
    out = RowNorm(kernels, kind, 1e-5)(x, weight)
    wanted = normalized(x, weight, 1e-5, kind)
    assert (out == wanted).float().mean() > 0.99  # a sum in another order
    torch.testing.assert_close(out, wanted, rtol=2**-7, atol=0)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [heads, width] with its first numbers rotated by halves."""
    rotary = cos.shape[-1]
    turning, rest = x[:, :rotary], x[:, rotary:]
    low, high = turning.chunk(2, -1)
    return torch.cat([turning * cos + torch.cat([-high, low], -1) * sin, rest], -1)


def check(
    kernels: CpuKernels, heads: int, groups: int, tokens: int, *, rotary: int = WIDTH, kind: Norm | None = None
) -> None:
    q, k, v, out = (
        random(rows, cols, seed=n)
        for n, (rows, cols) in enumerate(
            [(heads * WIDTH, HIDDEN), (groups * WIDTH, HIDDEN), (groups * WIDTH, HIDDEN), (HIDDEN, heads * WIDTH)]
        )
    )
    bias = torch.linspace(-1, 1, groups * WIDTH)
    weights = Projections(PreparedWeight(q), PreparedWeight(k, bias), PreparedWeight(v), PreparedWeight(out))
    norms = None if kind is None else HeadNorms(random(WIDTH, seed=5), random(WIDTH, seed=6), 1e-6, kind)
    attention = TokenAttention(kernels, weights, width=WIDTH, rotary=rotary, scale=0.1, norms=norms)
    x, angles = random(1, 1, HIDDEN, seed=7), torch.linspace(0.1, 3, rotary // 2).repeat(2)
    cos, sin = (f(angles).bfloat16().view(1, 1, -1) for f in (torch.cos, torch.sin))

    made = attention.heads(x, cos, sin)
    row = x.view(HIDDEN, 1).double()
    queries, key, value = ((w.double() @ row).view(-1, WIDTH) for w in (q, k, v))
    key = key + bias.double().view(-1, WIDTH)
    if norms is not None:
        queries, key = (
            normalized(part.bfloat16(), weight, norms.eps, norms.kind).double()
            for part, weight in ((queries, norms.q), (key, norms.k))
        )
    queries, key = (rotated(part, cos.double().view(-1), sin.double().view(-1)) for part in (queries, key))
    for found, wanted in ((made.key, key), (made.value, value)):
        assert found.shape == (1, groups, 1, WIDTH)
        assert (found.view(groups, WIDTH).double() - wanted).abs().max() <= 3 * ROUNDING * wanted.abs().max()

    past = [random(1, groups, tokens - 1, WIDTH, seed=8 + n) for n in range(2)]
    keys, values_ = (torch.cat([old, new], 2) for old, new in zip(past, (made.key, made.value), strict=True))
    keys = torch.cat([keys, torch.full((1, groups, 5, WIDTH), torch.nan).bfloat16()], 2)[
        :, :, :tokens
    ]  # room behind each group
    found = attention.attend(made.queries, keys, values_)
    scores = torch.einsum("ghw,gtw->ght", queries.view(groups, -1, WIDTH), keys[0].double()) * 0.1
    attended = torch.einsum("ght,gtw->ghw", scores.softmax(-1), values_[0].double())
    wanted = (out.double() @ attended.reshape(-1, 1)).view(1, 1, HIDDEN)
    assert found.dtype == torch.bfloat16
    assert found.shape == wanted.shape
    assert (found.double() - wanted).norm() <= 3 * ROUNDING * wanted.norm()


@pytest.mark.parametrize("tokens", [1, 2, CHUNK, CHUNK + 1, 5 * CHUNK + 7])
def test_any_number_of_tokens(kernels: CpuKernels, tokens: int) -> None:
    """The last is divided among threads."""
    check(kernels, 8, 4, tokens)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 3), (3, 1), (7, 1), (16, 2), (12, 1)])
def test_any_number_of_heads_shares_a_key(kernels: CpuKernels, heads: int, groups: int) -> None:
    check(kernels, heads, groups, CHUNK + 9)


@pytest.mark.parametrize("kind", Norm)
def test_heads_with_norms(kernels: CpuKernels, kind: Norm) -> None:
    check(kernels, 4, 2, 9, kind=kind)


def test_a_part_of_a_head_is_rotated(kernels: CpuKernels) -> None:
    check(kernels, 4, 2, 9, rotary=16)


def test_scores_of_any_size(kernels: CpuKernels) -> None:
    """One key that outweighs all others by e^1000, and scores that are not numbers."""
    weights = Projections(*[PreparedWeight(torch.eye(WIDTH).bfloat16()) for _ in range(4)])
    attention = TokenAttention(kernels, weights, width=WIDTH, rotary=2, scale=1.0)
    x = torch.full((1, 1, WIDTH), 4.0).bfloat16()
    still = torch.ones(1, 1, 2).bfloat16(), torch.zeros(1, 1, 2).bfloat16()
    keys = random(1, 1, 700, WIDTH)
    keys[0, 0, 600] = 100
    states = random(1, 1, 700, WIDTH, seed=1)
    out = attention.attend(attention.heads(x, *still).queries, keys, states)
    torch.testing.assert_close(out.view(-1), states[0, 0, 600])
    keys[0, 0, 3, 5] = torch.nan
    assert attention.attend(attention.heads(x, *still).queries, keys, states).isnan().all()


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 66, CHUNK + 3])
def test_scores_that_differ_by_hundreds(kernels: CpuKernels, tokens: int) -> None:
    """What is lost beside the largest weight counts as nothing; everything else counts."""
    weights = Projections(*[PreparedWeight(torch.eye(WIDTH).bfloat16()) for _ in range(4)])
    attention = TokenAttention(kernels, weights, width=WIDTH, rotary=2, scale=1.0)
    x = torch.full((1, 1, WIDTH), 4.0).bfloat16()
    still = torch.ones(1, 1, 2).bfloat16(), torch.zeros(1, 1, 2).bfloat16()
    keys, states = random(1, 1, tokens, WIDTH), random(1, 1, tokens, WIDTH, seed=1)
    found = attention.attend(attention.heads(x, *still).queries, keys, states)
    scores = keys[0, 0].double() @ x.view(-1).double()
    wanted = scores.softmax(0) @ states[0, 0].double()
    torch.testing.assert_close(found.view(-1).double(), wanted, rtol=2**-7, atol=1e-3)


def test_packed_projections(kernels: CpuKernels) -> None:
    shapes = [(128, HIDDEN), (64, HIDDEN), (64, HIDDEN), (HIDDEN, 128)]
    packed = [TorchQuantizer()(random(*shape, seed=n), INT8).tiled() for n, shape in enumerate(shapes)]
    x, keys = random(1, 1, HIDDEN), random(1, 1, 40, WIDTH)
    turn = random(1, 1, WIDTH, seed=1), random(1, 1, WIDTH, seed=2)
    outs = []
    for weights in (packed, [values(weight).bfloat16() for weight in packed]):
        prepared = Projections(*[PreparedWeight(weight) for weight in weights])
        attention = TokenAttention(kernels, prepared, width=WIDTH, rotary=WIDTH, scale=0.1)
        outs.append(attention.attend(attention.heads(x, *turn).queries, keys, keys).float())
    assert (outs[0] - outs[1]).norm() <= 0.02 * outs[1].norm()
