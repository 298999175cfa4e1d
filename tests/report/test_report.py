"""The report on traces small enough to count by hand."""

from __future__ import annotations

import json
from math import log
from pathlib import Path

import numpy as np
import pytest

from offmoe.report.report import Load, chosen_by_layer, describe, pair_overlap
from offmoe.trace.trace import Parameters, Trace, read_trace
from offmoe.types import CacheShape

DATA = Path(__file__).parents[1] / "data"


def make(
    experts: list[list[list[int]]],
    num_experts: tuple[int, ...],
    request: list[int] | None = None,
    step: list[int] | None = None,
    token: list[int] | None = None,
    pieces: dict[int, str] | None = None,
    parameters: Parameters | None = None,
) -> Trace:
    """experts: [T][L][k]."""
    tokens, layers = len(experts), len(num_experts)
    top_k = max((len(ids) for row in experts for ids in row), default=1)
    return Trace(
        "m",
        CacheShape(num_experts, (top_k,) * layers, tuple(100 * (i + 1) for i in range(layers))),
        np.array(experts, np.int16).reshape(tokens, layers, top_k),
        np.array(request if request is not None else [0] * tokens, np.int32),
        np.array(step if step is not None else range(tokens), np.int32),
        None if token is None else np.array(token, np.int32),
        pieces=pieces,
        parameters=parameters,
    )


# --- balance


@pytest.mark.parametrize(
    ("routes", "gini", "entropy", "busiest", "unused"),
    [
        ([5, 5, 5, 5], 0.0, 1.0, 1.0, 0),
        ([8, 0, 0, 0], 0.75, 0.0, 4.0, 3),
        ([1, 3], 0.25, (0.25 * log(4) + 0.75 * log(4 / 3)) / log(2), 1.5, 0),
        ([0, 1, 2, 3, 4], 0.4, None, 2.0, 1),
        ([7], 0.0, 1.0, 1.0, 0),
    ],
)
def test_balance_by_hand(routes: list[int], gini: float, entropy: float | None, busiest: float, unused: int) -> None:
    load = Load(np.array(routes))
    assert load.gini == pytest.approx(gini)
    assert entropy is None or load.entropy == pytest.approx(entropy)
    assert load.busiest == pytest.approx(busiest)
    assert load.unused == unused


def test_gini_is_the_mean_difference() -> None:
    """Its definition: the mean absolute difference of two experts, over twice the mean."""
    loads = np.random.default_rng(0).integers(0, 50, 37)
    differences = np.abs(loads[:, None] - loads[None, :]).mean()
    assert Load(loads).gini == pytest.approx(differences / (2 * loads.mean()))


def test_alerts_name_the_overloaded() -> None:
    """Expert 2 takes 8 of 10 routes of 5 experts: 4 times the mean. Just three times is no alert."""
    report = describe(make([[[e], [i % 5]] for i, e in enumerate([2] * 8 + [0, 1])], (5, 5)))
    found = [(a.layer, a.expert, a.share, a.routes) for a in report.alerts]
    assert found == [(0, 2, 0.8, 8)]
    assert report.alerts[0].times_mean == pytest.approx(4.0)
    assert describe(make([[[e]] for e in [0, 0, 0, 1]], (4,))).alerts == []


def test_layers_may_have_other_numbers_of_experts() -> None:
    report = describe(make([[[0, 1], [4, 5]], [[2, 3], [0, 1]]], (4, 6)))
    assert [len(load.routes) for load in report.loads] == [4, 6]
    assert report.loads[0].gini == 0.0
    assert report.loads[1].unused == 2
    assert [layer.uniform for layer in report.consistency] == [0.5, pytest.approx(1 / 3)]
    assert report.coactivation[0].tokens.shape == (4, 6)


# --- consistency


def test_overlaps_by_hand() -> None:
    """Neighbors: {0,1}-{1,2} share 1/2, {1,2}-{1,2} all, and request 1 starts anew. Pairs of 4 tokens: expert 0 is in
    1, expert 1 in 4, expert 2 in 2, expert 3 in 1 of them, so 4*3 + 2*1 of 4*3 ordered pairs share, over k = 2."""
    report = describe(make([[[0, 1]], [[1, 2]], [[2, 1]], [[3, 1]]], (4,), request=[0, 0, 0, 1]))
    layer = report.consistency[0]
    assert layer.consecutive == pytest.approx(0.75)
    assert layer.independent == pytest.approx((12 + 2) / (12 * 2))
    assert layer.uniform == 0.5
    assert layer.same_token is None


def test_same_token_by_hand() -> None:
    """Token 5 meets {0,1}, {0,1}, {0,2}: pairs share 2, 1, 1 of 2. Token 6 meets {3,4} twice. Token 7 comes once.
    Weighted by occurrences: (3 * 2/3 + 2 * 1) / 5."""
    experts = [[[0, 1]], [[3, 4]], [[0, 1]], [[2, 0]], [[4, 3]], [[0, 5]]]
    report = describe(make(experts, (6,), token=[5, 6, 5, 5, 6, 7]))
    assert report.consistency[0].same_token == pytest.approx((3 * 2 / 3 + 2 * 1) / 5)


def test_requests_that_run_together_are_kept_apart() -> None:
    """Two requests in one batch, rows in turn: each keeps its expert, neighbors in the file never do."""
    report = describe(make([[[0]], [[1]], [[0]], [[1]]], (2,), request=[0, 1, 0, 1], step=[0, 0, 1, 1]))
    assert report.consistency[0].consecutive == 1.0
    assert report.decode.tokens == 4


def test_pair_overlap_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(1)
    chosen = np.argsort(rng.random((40, 9)), axis=1) < 3
    group = rng.integers(0, 6, 40)
    of_groups = []
    for g in range(6):
        rows = chosen[group == g]
        n = len(rows)
        pairs = [(rows[i] & rows[j]).sum() / 3 for i in range(n) for j in range(n) if i != j]
        of_groups.append((np.mean(pairs), n))
    values, weights = zip(*of_groups, strict=True)
    assert pair_overlap(chosen, group) == pytest.approx(np.average(values, weights=weights))


def test_prefill_and_decode_are_described_apart() -> None:
    """A prompt of three tokens, then two tokens by themselves."""
    report = describe(make([[[e]] for e in [0, 0, 0, 1, 1]], (2,), step=[0, 0, 0, 1, 2]))
    assert (report.prefill.tokens, report.decode.tokens) == (3, 2)
    assert report.prefill.loads[0].routes.tolist() == [3, 0]
    assert report.prefill.consecutive[0] == 1.0
    assert report.decode.consecutive[0] == 0.5
    assert report.shift == 1.0


def test_dropped_tokens_have_no_routes() -> None:
    report = describe(make([[[0, -1]], [[-1, -1]], [[0, 1]]], (3,)))
    assert report.loads[0].routes.tolist() == [2, 1, 0]
    assert report.consistency[0].consecutive is None
    assert report.consistency[0].independent == pytest.approx(2 / (2 * 1.5))


# --- between layers


def test_coactivation_by_hand() -> None:
    """Expert e of the first layer is always followed by expert e of the second; 20 tokens each."""
    rows = [[[e], [e]] for e in [0, 1] * 20]
    pair = describe(make(rows, (2, 3))).coactivation[0]
    assert pair.tokens.tolist() == [[20, 0, 0], [0, 20, 0]]
    assert pair.expected[0].tolist() == [10, 10, 0]
    assert pair.lift[0, :2].tolist() == [2.0, 0.0]
    assert np.isnan(pair.lift[0, 2])
    assert (pair.guessed, pair.by_popularity) == (1.0, 0.5)
    assert [p["experts"] for p in pair.pairs()] == [[0, 0], [1, 1]]


# --- specialization


def test_lift_by_hand() -> None:
    """100 tokens, half of them numbers; expert 0 takes all numbers and a half of all routes: lift 2, and
    none of the words."""
    rows = [[[0]] for _ in range(50)] + [[[1 + i % 2]] for i in range(50)]
    report = describe(make(rows, (4,), token=[7] * 50 + [8, 9] * 25, pieces={7: "7", 8: " word", 9: "ing"}))
    found = report.specialization
    assert found is not None
    assert found.types == {"number": 50, "word start": 25, "word piece": 25}
    assert found.routes[0].tolist() == [[50, 0, 0, 0], [0, 25, 0, 0], [0, 0, 25, 0]]
    assert found.lift(0)[0, :3].tolist() == [2.0, 0.0, 0.0]
    assert found.lift(0)[1, 1] == 4.0
    assert np.isnan(found.lift(0)[:, 3]).all()
    strongest = found.strongest()
    assert {(s.expert, s.type, s.routes, s.lift) for s in strongest} == {
        (0, "number", 50, 2.0),
        (1, "word start", 25, 4.0),
        (2, "word piece", 25, 4.0),
    }
    (favorite,) = found.favorites[0][1]
    assert (favorite.piece, favorite.routes, favorite.occurrences, favorite.lift) == (" word", 25, 25, 4.0)


def test_rare_types_say_nothing() -> None:
    """Nineteen numbers are below the support."""
    rows = [[[0]] for _ in range(19)] + [[[1]] for _ in range(60)]
    report = describe(make(rows, (2,), token=[7] * 19 + [8] * 60, pieces={7: "7", 8: " word"}))
    assert report.specialization is not None
    assert np.isnan(report.specialization.lift(0)[1]).all()
    assert not np.isnan(report.specialization.lift(0)[0]).any()


def test_chance_is_no_preference() -> None:
    """Tokens and experts that know nothing of each other: nobody stands out."""
    rng = np.random.default_rng(2)
    rows = [[[int(e)]] for e in rng.integers(0, 16, 3000)]
    token = rng.integers(0, 200, 3000).tolist()
    report = describe(make(rows, (16,), token=token, pieces={i: f" w{'x' * (i % 5)}" for i in range(200)}))
    assert report.specialization is not None
    assert report.specialization.strongest() == []
    assert sum(map(len, report.specialization.favorites[0])) <= 1


def test_pieces_that_are_missing() -> None:
    rows = [[[i % 2]] for i in range(60)]
    assert describe(make(rows, (2,), token=[1] * 60)).specialization is None
    assert describe(make(rows, (2,), pieces={1: "a"})).specialization is None
    report = describe(make(rows * 2, (2,), token=[1, 2] * 60, pieces={1: "a"}))
    assert report.specialization is not None
    assert report.specialization.types == {"word piece": 60}
    assert [t.token for experts in report.specialization.favorites[0] for t in experts] == [1]


# --- work, extremes


def test_work_per_token() -> None:
    report = describe(make([[[0, 1], [0, 1]]], (4, 4), parameters=Parameters(1000, (50, 60))))
    assert (report.active.expert_bytes, report.active.expert_bytes_total) == (2 * 100 + 2 * 200, 4 * 100 + 4 * 200)
    assert report.active.parameters == 1000 + 2 * 50 + 2 * 60
    assert report.active.parameters_total == 1000 + 4 * 50 + 4 * 60
    assert report.active.flops_per_token == 2 * 1220
    assert describe(make([[[0]]], (4,))).active.flops_per_token is None


@pytest.mark.parametrize("token", [None, []])
def test_an_empty_trace(token: list[int] | None) -> None:
    found = describe(make([], (4, 4), token=token, pieces={})).to_dict()
    assert (found["tokens"], found["gini"], found["entropy"], found["alerts"]) == (0, None, None, [])
    assert found["consistency"] == {"consecutive": None, "same_token": None, "independent": None, "uniform": 0.25}
    json.dumps(found, allow_nan=False)


def test_one_token() -> None:
    found = describe(make([[[2, 3], [0, 1]]], (4, 4), token=[9], pieces={9: "x"})).to_dict()
    assert found["gini"] == 0.5
    assert found["entropy"] == pytest.approx(0.5)
    assert found["consistency"]["consecutive"] is None
    assert found["phases"]["decode"]["tokens"] == 1
    assert found["coactivation"][0]["guessed"] is None
    json.dumps(found, allow_nan=False)


def test_a_real_model() -> None:
    """gpt-oss-20b against the figures of an independent script over all of its recording (55,876 tokens): entropy
    .914, Gini .408, busiest 2.60, overlap .443, independent .193."""
    report = describe(read_trace(DATA / "gptoss20b_6req.npz"))
    found = report.to_dict()
    assert found["entropy"] == pytest.approx(0.914, abs=0.015)
    assert found["gini"] == pytest.approx(0.408, abs=0.02)
    assert found["busiest"] == pytest.approx(2.6, abs=0.1)
    assert found["consistency"]["consecutive"] == pytest.approx(0.443, abs=0.01)
    assert found["consistency"]["independent"] == pytest.approx(0.193, abs=0.01)
    assert {(a.layer, a.expert) for a in report.alerts} >= {(23, 10), (22, 25)}
    total = sum(load.total for load in report.loads)
    assert total == 2636 * 24 * 4
    assert all(load.total == 2636 * 4 for load in report.loads)


def test_chosen_marks_each_expert_once() -> None:
    (chosen,) = chosen_by_layer(make([[[1, 1]], [[-1, 0]]], (3,)))
    assert chosen.tolist() == [[False, True, False], [True, False, False]]
