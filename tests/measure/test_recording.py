"""The first difference between two recordings: found, placed, and its size told."""

from __future__ import annotations

import math

import pytest
import torch

from offmoe.measure.recording import Answer, Run, checksum, checksum_factors, difference

LAYERS = ("a.0", "a.1", "a.2")
STEPS, ROWS, VOCABULARY = 4, 2, 5


def run() -> Run:
    """Two requests with the same values in every call."""
    generator = torch.Generator().manual_seed(1)
    answers = []
    for _ in range(2):
        logits = [torch.randn(ROWS, VOCABULARY, generator=generator) for _ in range(STEPS)]
        sums = {
            name: [
                torch.randint(0, 99, (ROWS * (7 if step == 0 else 1),), generator=generator) for step in range(STEPS)
            ]
            for name in LAYERS
        }
        answers.append(Answer(logits, sums))
    return Run(answers)


def test_equal_runs() -> None:
    assert difference(run(), run()) is None
    assert run().digest() == run().digest()


def test_the_first_step_row_and_layer_are_named() -> None:
    got = run()
    for step in (2, 3):
        got.answers[1].logits[step][1, 3] += 0.5
        got.answers[1].layers["a.1"][step][1] += 1
        got.answers[1].layers["a.2"][step][1] += 1
    found = difference(run(), got)
    assert found is not None
    assert (found.request, found.step, found.row, found.layer) == (1, 2, 1, "a.1")
    assert found.largest == pytest.approx(0.5)
    assert found.steps == 2 * STEPS * ROWS
    assert 0 < found.divergence < 0.1
    assert "new token 3 of request 2, row 2, from a.1 on" in str(found)


def test_layers_that_differ_before_any_logit_does() -> None:
    """The prompt's other rows reach the logits through the KV cache only."""
    got = run()
    got.answers[0].layers["a.2"][0][3] += 1
    found = difference(run(), got)
    assert found is not None
    assert (found.request, found.step, found.row, found.layer, found.tokens) == (0, 0, None, "a.2", 0)
    got.answers[0].logits[1][0, 0] += 1.0
    found = difference(run(), got)
    assert found is not None
    assert (found.step, found.row, found.layer) == (0, None, "a.2")
    assert found.largest == pytest.approx(1.0)


def test_layers_are_not_named_where_passes_cannot_be_told() -> None:
    """A prompt in chunks takes several passes for the first token."""
    got = run()
    got.answers[0].logits[1][0, 0] += 1.0
    for passes in got.answers[0].layers.values():
        passes.append(torch.zeros(1, dtype=torch.int64))
    found = difference(run(), got)
    assert found is not None
    assert (found.step, found.row, found.layer) == (1, 0, None)


def test_tokens_that_differ_are_counted() -> None:
    got = run()
    for answer in got.answers:
        answer.logits[0][0] = -answer.logits[0][0]
    found = difference(run(), got)
    assert found is not None
    assert found.tokens == 2
    assert torch.equal(got.tokens[0][0], got.answers[0].logits[0].argmax(-1))


def test_excluded_and_lost_values() -> None:
    """Tokens that are excluded have no difference; values that are not numbers have an infinite one."""
    want, got = run(), run()
    for each in (want, got):
        each.answers[0].logits[0][:, 4] = -math.inf
    got.answers[0].logits[0][0, 0] += 0.25
    found = difference(want, got)
    assert found is not None
    assert found.largest == pytest.approx(0.25)
    assert math.isfinite(found.divergence)
    got.answers[0].logits[1][0, 0] = math.nan
    found = difference(want, got)
    assert found is not None
    assert (found.largest, found.divergence) == (math.inf, math.inf)
    assert (found.to_dict()["largest"], found.to_dict()["divergence"]) == (None, None)


def test_other_numbers_of_steps() -> None:
    got = run()
    got.answers[1].logits.pop()
    found = difference(run(), got)
    assert found is not None
    assert (found.request, found.tokens) == (1, None)
    assert "another number of steps" in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checksum_sees_one_bit_and_the_order(dtype: torch.dtype) -> None:
    rows = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    factors = checksum_factors(64)
    sums = checksum(rows, factors)
    assert sums.shape == (6,)
    assert len(set(sums.tolist())) == 6
    other = rows.clone()
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    other.view(integer)[1, 2, 63] ^= 1
    assert (checksum(other, factors) != sums).tolist() == [False] * 5 + [True]
    assert not torch.equal(checksum(rows.flip(-1), factors), sums)
    assert torch.equal(checksum(rows.transpose(0, 1).contiguous().transpose(0, 1), factors), sums)
