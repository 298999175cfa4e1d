"""Predictions against what was routed and what was resident."""

from __future__ import annotations

import numpy as np
import pytest

from offmoe.config import CacheOptions
from offmoe.simulate.predictions import analyze, total, transition_predictions
from offmoe.trace.trace import Trace
from offmoe.types import CacheShape


def make(experts, predicted=None, request=None):
    experts = np.asarray(experts, np.int16)
    tokens, layers, k = experts.shape
    shape = CacheShape((8,) * layers, (k,) * layers, (1000,) * layers)
    request = np.zeros(tokens, np.int32) if request is None else np.asarray(request, np.int32)
    if predicted is not None:
        predicted = np.asarray(predicted, np.int16)
    return Trace("t", shape, experts, request, np.arange(tokens, dtype=np.int32), predicted=predicted)


def test_counts_of_a_small_trace():
    none = [-1, -1]
    trace = make(
        [[[0, 1], [2, 3]], [[0, 1], [2, 4]], [[0, 1], [5, 6]]],
        [[none, [2, 7]], [none, [2, 3]], [none, none]],
    )
    layer = analyze(trace, CacheOptions("lru", slots_per_layer=2))[1]
    assert (layer.predicted, layer.wanted, layer.right) == (4, 4, 2)
    # Step 0: nothing resident, 2 and 3 missed, 2 covered, 7 in vain. Step 1: 2 and 3 resident, 4 missed.
    assert (layer.misses, layer.covered, layer.fetched) == (3, 1, 2)
    assert layer.recall == layer.precision == layer.precision_missing == 0.5
    assert layer.coverage == pytest.approx(1 / 3)
    assert layer.extra_per_saved == 1.0
    assert total(analyze(trace, CacheOptions("lru", slots_per_layer=2))) == layer


def test_shares_of_nothing_are_none():
    trace = make([[[0, 1], [2, 3]]])
    assert all(layer.recall is layer.coverage is None for layer in analyze(trace, CacheOptions(slots_per_layer=2)))


def test_only_some_requests_are_judged():
    trace = make([[[0], [1]], [[0], [2]]], [[[-1], [1]], [[-1], [3]]], request=[0, 1])
    options = CacheOptions(slots_per_layer=1)
    assert analyze(trace, options, frozenset({0}))[1].recall == 1.0
    assert analyze(trace, options, frozenset({1}))[1].recall == 0.0


def test_transitions_learn_what_follows():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 8, 400)
    trace = make(np.stack([first, (first * 3) % 8], axis=1)[:, :, None], request=np.repeat([0, 1], 200))
    predicted = transition_predictions(trace, frozenset({1}))
    assert (predicted[:, 0] == -1).all()
    assert (predicted[200:, 1] == trace.experts[200:, 1]).mean() > 0.95


def test_transitions_do_not_see_what_they_are_judged_on():
    trace = make([[[0], [1]]] * 20 + [[[0], [2]]] * 20, request=np.repeat([0, 1], 20))
    assert (transition_predictions(trace, frozenset({1}))[:, 1] == 1).all()


def test_as_many_as_a_token_chooses():
    trace = make([[[0, 1, 2], [1, 2, 3]]] * 4)
    assert transition_predictions(trace).shape == (4, 2, 3)
    assert analyze(make([[[0], [1]]]), CacheOptions(slots_per_layer=1))[0].wanted == 0
