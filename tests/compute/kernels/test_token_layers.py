"""Decoder layers of one token in one call have the bits of their parts, by every variant of the C kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from offmoe.compute.kernels.cpu import CpuKernels, GatedExpert, Glu, PreparedExpert, PreparedWeight
from offmoe.compute.kernels.token_attention import HeadNorms, Norm, Projections, RowNorm, TokenAttention
from offmoe.compute.kernels.token_layers import ExpertTable, LayerNorm, LayerParts, States, TokenLayers
from offmoe.compute.kernels.token_router import Selection, TokenRouter
from offmoe.compute.kernels.torch_ffn import combine
from tests.native import VARIANTS, library_with

HIDDEN, WIDTH, HEADS, GROUPS, INNER, EXPERTS, LAYERS, TOKENS, ROOM = 96, 32, 4, 2, 64, 6, 3, 9, 12


@pytest.fixture(params=VARIANTS)
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    with CpuKernels(library_with(request.param), 2, request.param) as kernels:
        yield kernels


class Layer(NamedTuple):
    """A layer's parts, and all of its experts."""

    parts: LayerParts
    experts: list[PreparedExpert]


def random(*shape: int, seed: int, size: float = 0.2) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()


def layer(kernels: CpuKernels, number: int, selection: Selection, absent: frozenset[int] = frozenset()) -> Layer:
    seed = 100 * number
    shapes = [(HEADS * WIDTH, HIDDEN), (GROUPS * WIDTH, HIDDEN), (GROUPS * WIDTH, HIDDEN), (HIDDEN, HEADS * WIDTH)]
    weights = Projections(*[PreparedWeight(random(*shape, seed=seed + n)) for n, shape in enumerate(shapes)])
    of_heads = HeadNorms(random(WIDTH, seed=seed + 4, size=1), random(WIDTH, seed=seed + 5, size=1), 1e-6, Norm(0))
    attention = TokenAttention(kernels, weights, width=WIDTH, rotary=WIDTH, scale=0.2, norms=of_heads)
    norms = [
        LayerNorm(RowNorm(kernels, kind, eps), random(HIDDEN, seed=seed + 6 + n, size=1))
        for n, (kind, eps) in enumerate([(Norm.ROUNDS_TWICE, 1e-6), (Norm.ROUNDS_ONCE, 1e-5)])
    ]
    router = TokenRouter(kernels, random(EXPERTS, HIDDEN, seed=seed + 8, size=1), selection)
    experts = [
        PreparedExpert(
            GatedExpert(
                *[
                    random(*shape, seed=seed + 10 + 3 * e + n)
                    for n, shape in enumerate([(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)])
                ]
            ),
            Glu(),
        )
        for e in range(EXPERTS)
    ]
    table = ExpertTable(EXPERTS)
    for e, expert in enumerate(experts):
        table.put(e, None if e in absent else expert)
    return Layer(LayerParts(attention, (norms[0], norms[1]), router, table), experts)


def states(seed: int) -> States:
    """Room for ROOM tokens, of which TOKENS - 1 are there; the rest is NaN."""
    keys, values = (random(1, GROUPS, ROOM, WIDTH, seed=seed + n, size=1) for n in range(2))
    keys[:, :, TOKENS - 1 :] = values[:, :, TOKENS - 1 :] = torch.nan
    return States(keys, values, TOKENS)


def one_by_one(
    kernels: CpuKernels, one: Layer, held: States, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x + attention, its norm, ids, scores, the output) of one layer; the states are filled."""
    (attention, (first, second), router, _), experts = one
    assert router is not None
    heads = attention.heads(first.norm(x, first.weight), *turn)
    held.keys[:, :, TOKENS - 1 : TOKENS], held.values[:, :, TOKENS - 1 : TOKENS] = heads.key, heads.value
    attended = x + attention.attend(heads.queries, held.keys[:, :, :TOKENS], held.values[:, :, :TOKENS])
    normed = second.norm(attended, second.weight)
    _, scores, ids = router(normed.view(1, HIDDEN))
    rows = kernels.experts([experts[e] for e in ids[0].tolist()], normed.view(1, HIDDEN).float()).bfloat16()
    out = attended + combine(rows, scores, torch.bfloat16).view(x.shape)
    return attended, normed, ids, scores, out


def turn() -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.linspace(0.1, 3, WIDTH // 2).repeat(2)
    return angles.cos().bfloat16().view(1, 1, -1), angles.sin().bfloat16().view(1, 1, -1)


SELECTIONS = [
    Selection(3),
    Selection(3, scores=torch.float32, logits=torch.float32),
    Selection(1, normalize=False),
]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_all_layers(kernels: CpuKernels, selection: Selection) -> None:
    layers = [layer(kernels, number, selection) for number in range(LAYERS)]
    together, apart = ([states(7 * n) for n in range(LAYERS)] for _ in range(2))
    x = start = random(1, 1, HIDDEN, seed=1, size=1)
    calls = TokenLayers(kernels, LAYERS)
    passage = calls([one.parts for one in layers], together, start, *turn())
    assert passage.stop is None
    for number, one in enumerate(layers):
        *_, ids, _, x = one_by_one(kernels, one, apart[number], x, turn())
        assert torch.equal(passage.outs[number], x)
        assert passage.ids[number] == ids[0].tolist()
        for found, wanted in zip(together[number][:2], apart[number][:2], strict=True):
            assert torch.equal(found.nan_to_num(9), wanted.nan_to_num(9))
    last = calls([layers[-1].parts], together[-1:], passage.outs[-2], *turn())  # another call, from a layer on
    assert torch.equal(last.outs[0], x)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("has_block", [True, False])
def test_a_call_ends_before_experts_that_are_not_there(
    kernels: CpuKernels, selection: Selection, has_block: bool
) -> None:
    """An expert that the second layer chooses is not resident, or its block is another one."""
    layers = [layer(kernels, number, selection) for number in range(LAYERS)]
    parts = [one.parts for one in layers]
    nothing = {"experts": ExpertTable(EXPERTS)} if has_block else {"router": None, "experts": None}
    parts[1] = parts[1]._replace(**nothing)
    start, apart = random(1, 1, HIDDEN, seed=1, size=1), [states(7 * n) for n in range(2)]
    passage = TokenLayers(kernels, LAYERS)(parts, [states(7 * n) for n in range(LAYERS)], start, *turn())
    *_, first = one_by_one(kernels, layers[0], apart[0], start, turn())
    attended, normed, ids, scores, _ = one_by_one(kernels, layers[1], apart[1], first, turn())
    assert len(passage.outs) == 2
    assert len(passage.ids) == 1
    assert torch.equal(passage.outs[0], first)
    assert torch.equal(passage.outs[1], attended)
    stop = passage.stop
    assert stop is not None
    assert torch.equal(stop.normed, normed)
    if not has_block:
        assert (stop.ids, stop.scores) == (None, None)
        return
    assert stop.ids is not None
    assert stop.scores is not None
    assert torch.equal(stop.ids, ids)
    assert stop.scores.dtype == selection.scores
    assert torch.equal(stop.scores, scores)


def test_one_expert_of_several_is_not_there(kernels: CpuKernels) -> None:
    """It stops a call only when it is chosen."""
    start = random(1, 1, HIDDEN, seed=1, size=1)
    one = layer(kernels, 0, SELECTIONS[0])
    *_, ids, _, out = one_by_one(kernels, one, states(0), start, turn())
    for absent in range(EXPERTS):
        parts = layer(kernels, 0, SELECTIONS[0], frozenset([absent])).parts
        passage = TokenLayers(kernels, 1)([parts], [states(0)], start, *turn())
        assert (passage.stop is None) == (absent not in ids[0].tolist())
        assert passage.stop is not None or torch.equal(passage.outs[0], out)


@pytest.mark.parametrize("matter", [0, 0b001, 0b110, 0b111])
@pytest.mark.parametrize("selection", SELECTIONS[:2])
def test_predictions(kernels: CpuKernels, selection: Selection, matter: int) -> None:
    """The next layer's experts for what stands before this one's. A call ends where one that matters is not there."""
    first, second = (layer(kernels, number, selection) for number in range(2))
    start = random(1, 1, HIDDEN, seed=1, size=1)
    attended, *_, x = one_by_one(kernels, first, states(0), start, turn())
    (norm, weight), router = second.parts.norms[1], second.parts.router
    assert router is not None
    predicted = router(norm(attended, weight).view(1, HIDDEN)).ids
    *_, chosen, _, _ = one_by_one(kernels, second, states(7), x, turn())
    calls, at_first, at_second = TokenLayers(kernels, 2), 0, 0
    for absent in range(EXPERTS):
        parts = [first.parts, layer(kernels, 1, selection, frozenset([absent])).parts]
        passage = calls(parts, [states(0), states(7)], start, *turn(), [matter, None])
        ranks = [rank for rank, expert in enumerate(predicted[0].tolist()) if expert == absent]
        stop = passage.stop
        if ranks and matter >> ranks[0] & 1:
            at_first += 1
            assert stop is not None
            assert stop.misses
            assert stop.predicted is not None
            assert torch.equal(stop.predicted, predicted)
            assert torch.equal(passage.outs[0], attended)
            assert not passage.ids
            continue
        assert passage.predicted[0] == predicted[0].tolist()
        assert torch.equal(passage.outs[0], x)
        assert (stop is not None) == (absent in chosen[0].tolist())
        at_second += stop is not None
        assert stop is None or (stop.misses and stop.predicted is None)
    assert at_first == matter.bit_count()
    assert at_second or at_first == EXPERTS


@pytest.mark.parametrize("matter", [None, 0, 1])
def test_predictions_without_a_layer_to_ask(kernels: CpuKernels, matter: int | None) -> None:
    """The caller has to ask, if a prediction would matter."""
    first = layer(kernels, 0, SELECTIONS[0])
    start = random(1, 1, HIDDEN, seed=1, size=1)
    other = layer(kernels, 1, SELECTIONS[0]).parts._replace(router=None, experts=None)
    for parts in ([first.parts], [first.parts, other]):
        predict = [matter, None][: len(parts)]
        passage = TokenLayers(kernels, 2)(parts, [states(0), states(7)], start, *turn(), predict)
        stop = passage.stop
        if matter:
            assert len(passage.outs) == 1
            assert stop is not None
            assert stop.ids is not None
            assert (stop.predicted, stop.misses) == (None, False)
        else:
            assert len(passage.ids) == 1
            assert passage.predicted == [[]]
