from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offmoe.config import CacheOptions
from offmoe.errors import TraceError
from offmoe.simulate.replay import replay
from offmoe.trace.merge import merge_traces
from offmoe.trace.trace import Parameters, Trace, read_trace, write_trace
from offmoe.types import CacheShape

SHAPE = CacheShape((8, 6), (2, 2), (100, 200))
OPTIONS = CacheOptions("lru", "layer", 3, 0)


def trace(tokens: int = 5, seed: int = 0, **changes: Any) -> Trace:
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permuted(np.tile(np.arange(n), (tokens, 1)), axis=1)[:, :2] for n in SHAPE.experts], axis=1)
    made = Trace(
        model="m",
        shape=SHAPE,
        experts=experts.astype(np.int16),
        request=np.sort(rng.integers(0, 2, tokens)).astype(np.int32) * 3 + 1,
        step=np.arange(tokens, dtype=np.int32) + 7,
        token=rng.integers(0, 4, tokens).astype(np.int32),
        options=OPTIONS,
        pieces={0: "a", 1: "b"},
        parameters=Parameters(10, (5, 6)),
    )
    return replace(made, **changes)


def test_parts_follow_each_other(tmp_path: Path) -> None:
    a, b = trace(5, 0, request=np.array([4, 4, 4, 9, 9], np.int32)), trace(3, 1, request=np.zeros(3, np.int32))
    whole = merge_traces([a, b, trace(0), trace(2, 2, pieces={2: "c"})])
    assert whole.request.tolist()[:8] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert whole.request[8] == 3
    assert whole.step.tolist() == list(range(10))
    assert (whole.experts[5:8] == b.experts).all()
    assert whole.token is not None
    assert a.token is not None
    assert whole.token[:5].tolist() == a.token.tolist()
    assert (whole.model, whole.options, whole.parameters) == ("m", OPTIONS, Parameters(10, (5, 6)))
    assert whole.pieces == {0: "a", 1: "b", 2: "c"}
    write_trace(tmp_path / "t.npz", whole)
    again = read_trace(tmp_path / "t.npz")
    assert (again.experts == whole.experts).all()
    assert (again.requests, again.parameters, again.pieces) == (whole.requests, whole.parameters, whole.pieces)


def test_a_merged_trace_replays_like_its_parts_in_turn() -> None:
    """One cache over both parts: more hits than two cold ones, the same demands."""
    a, b = trace(40, 0), trace(40, 1)
    whole = replay(merge_traces([a, b]), OPTIONS).stats
    parts = [replay(part, OPTIONS).stats for part in (a, b)]
    assert whole.demands == sum(part.demands for part in parts)
    assert whole.hits >= sum(part.hits for part in parts)
    assert replay(merge_traces([a]), OPTIONS).stats == parts[0]


def test_what_only_some_parts_know_is_left_out() -> None:
    whole = merge_traces([trace(), trace(seed=1, token=None, options=replace(OPTIONS, eviction="aged-lfu"), model="n")])
    assert (whole.token, whole.options, whole.model) == (None, None, "m + n")
    assert merge_traces([trace(), trace(parameters=None)]).parameters is None


def test_parts_without_predictions_predicted_nothing() -> None:
    predicted = np.zeros((5, 2, 1), np.int16)
    whole = merge_traces([trace(5), trace(5, predicted=predicted), trace(5, predicted=np.ones((5, 2, 2), np.int16))])
    assert whole.predicted is not None
    assert whole.predicted[:5].max() == -1
    assert whole.predicted[5, 0].tolist() == [0, -1]
    assert whole.predicted[10, 0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (CacheShape((8, 6, 6), (2, 2, 2), (100, 200, 200)), "3 MoE layers, the first has 2"),
        (CacheShape((8, 7), (2, 2), (100, 200)), "trace 2 has experts 7 in MoE layer 1, the first has 6"),
        (CacheShape((8, 6), (2, 1), (100, 200)), "top_k 1 in MoE layer 1"),
        (CacheShape((8, 6), (2, 2), (100, 201)), "expert_bytes 201"),
    ],
)
def test_other_models_are_refused(other: CacheShape, says: str) -> None:
    with pytest.raises(TraceError, match=says):
        merge_traces([trace(), trace(shape=other)])


def test_other_vocabularies_are_refused() -> None:
    with pytest.raises(TraceError, match="tokenizers differ"):
        merge_traces([trace(), trace(pieces={0: "z"})])
    with pytest.raises(TraceError, match="nothing to merge"):
        merge_traces([])
