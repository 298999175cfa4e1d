"""Where gate, up and down stand among the tensors that a checkpoint stores, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F

from offmoe.compute.gated import RowRange, StoredTensor, gated_form, stored_tensors
from offmoe.compute.kernels.torch_ffn import GatedFFN
from offmoe.errors import UnsupportedModelError
from offmoe.quant.decode import ExpertDecoding, Leaf
from offmoe.storage.layout import Assembly, Destination, ExpertLayout

HIDDEN, INNER = 8, 6
SHAPES = {"up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER)}
BIASES = {"up_bias": (2 * INNER,), "down_bias": (HIDDEN,)}


def halves(h: torch.Tensor) -> torch.Tensor:
    return F.silu(h[:, : h.shape[1] // 2]) * h[:, h.shape[1] // 2 :]


def turns(h: torch.Tensor) -> torch.Tensor:
    return F.silu(h[:, ::2]) * h[:, 1::2]


def stored(shape: tuple[int, ...], to: Destination) -> StoredTensor:
    return StoredTensor({"weight": 0}, None, shape, torch.bfloat16, to)


def whole(shapes: Mapping[str, tuple[int, ...]]) -> list[StoredTensor]:
    return [stored(shape, Destination(name, 0, 0)) for name, shape in shapes.items()]


DOWN = stored(SHAPES["down"], Destination("down", 0, 0))


def test_halves_of_one_parameter() -> None:
    form = gated_form(whole(SHAPES), SHAPES, GatedFFN("up", halves, down="down"))
    assert form.rows == {
        "gate": RowRange(0, 0, 1, INNER),
        "up": RowRange(0, INNER, 1, INNER),
        "down": RowRange(1, 0, 1, HIDDEN),
    }
    assert (form.shape("gate"), form.shape("down")) == ((INNER, HIDDEN), (HIDDEN, INNER))
    assert (form.glu.kind, form.inputs_first, form.interleaved) == ("silu", frozenset(), False)


def test_turns_in_transposed_parameters_with_biases() -> None:
    shapes = {name: shape[::-1] for name, shape in SHAPES.items()} | BIASES
    math = GatedFFN("up", turns, biased=True, transposed=True, down="down")
    form = gated_form(whole(shapes), shapes, math)
    assert (form.interleaved, form.biased, form.transposed) == (True, True, True)
    assert form.inputs_first == {0, 1}
    assert form.rows["gate.bias"] == RowRange(2, 0, 2, INNER)


def test_gate_and_up_are_two_tensors() -> None:
    parts = [stored((INNER, HIDDEN), Destination("up", 0, start)) for start in (INNER, 0)]
    form = gated_form([*parts, DOWN], SHAPES, GatedFFN("up", halves, down="down"))
    assert (form.rows["gate"].tensor, form.rows["up"].tensor) == (1, 0)


def test_a_tensor_that_stands_the_other_way_round() -> None:
    tensors = [stored((HIDDEN, 2 * INNER), Destination("up", 0, 0, transposed=True)), DOWN]
    form = gated_form(tensors, SHAPES, GatedFFN("up", halves, down="down"))
    assert form.inputs_first == {0}
    assert form.shape("up") == (INNER, HIDDEN)


@pytest.mark.parametrize(
    ("tensors", "math", "why"),
    [
        (whole(SHAPES), lambda weights, x: x, "no gated feed-forward"),
        (whole(SHAPES), GatedFFN("up", halves, normalize=F.relu, down="down"), "no gated feed-forward"),
        (whole(SHAPES), GatedFFN("up", F.relu, down="down"), "the activation"),
        ([stored((2 * INNER, 4), Destination("up", 1, 4)), DOWN], GatedFFN("up", halves, down="down"), "no rows of it"),
        ([stored((3, HIDDEN), Destination("up", 0, 0)), DOWN], GatedFFN("up", halves, down="down"), "cannot take"),
        ([*whole(SHAPES), DOWN], GatedFFN("up", halves, down="down"), "too many parts"),
        (whole(SHAPES)[:1], GatedFFN("up", halves, down="down"), "cannot take"),
        (whole(SHAPES | {"other": (2, 2)}), GatedFFN("up", halves, down="down"), "other is stored|cannot take"),
        (whole(SHAPES), GatedFFN("up", halves, biased=True, down="down"), "cannot take"),
    ],
)
def test_what_is_refused(tensors: list[StoredTensor], math: GatedFFN, why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=why):
        gated_form(tensors, SHAPES | {"other": (2, 2)}, math)


def test_stored_tensors_name_their_components_by_place() -> None:
    layout = ExpertLayout.of({"0.weight": (torch.bfloat16, (2, 4)), "1.weight": (torch.float16, (1, 4, 2))})
    leaves = (Leaf(None, {"weight": "0.weight"}, (2, 4)), Leaf(None, {"weight": "1.weight"}, (1, 4, 2)))
    parts = (Destination("up", 0, 0), Destination("down", 0, 0))
    found = stored_tensors(layout, ExpertDecoding(leaves, Assembly(parts), {"up": (2, 4), "down": (4, 2)}))
    assert [tensor.components for tensor in found] == [{"weight": 0}, {"weight": 1}]
    assert (found[1].shape, found[1].dtype) == ((4, 2), torch.float16)
    rearranged = ExpertDecoding(leaves, Assembly(convert=lambda tensors: {}), {"up": (2, 4), "down": (4, 2)})
    with pytest.raises(UnsupportedModelError, match="rearranged"):
        stored_tensors(layout, rearranged)
