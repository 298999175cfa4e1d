"""Which experts of neighboring layers are chosen by the same tokens, and what that tells about the next layer.

Only counts of pairs. Bound: linear in routes x top_k, but for guessing, which is tokens x experts x experts of the
next. Must never show a ratio that chance would explain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

MIN_EXPECTED = 5.0
"""Routes that independence must lead us to expect before a ratio to it is shown: below, chance alone makes any."""
PAIRS_SHOWN = 5


@dataclass(frozen=True)
class Coactivation:
    """Which experts of `layer + 1` follow those of `layer`. tokens: int [experts, experts of the next], those that
    chose both; before and after: int [experts], those that chose each, of the `both` that were routed in both layers.

    guessed: of the next layer's experts, the share found by the counts of the first half of the trace in its second
    half, guessing as many as a token takes. by_popularity: the same without looking at this layer's experts."""

    layer: int
    tokens: np.ndarray
    before: np.ndarray
    after: np.ndarray
    both: int
    guessed: float | None
    by_popularity: float | None

    @cached_property
    def expected(self) -> np.ndarray:
        """float: tokens that independent layers would give."""
        return np.asarray(np.outer(self.before, self.after) / max(self.both, 1))

    @cached_property
    def lift(self) -> np.ndarray:
        """float: tokens over expected ones; NaN where fewer than MIN_EXPECTED are expected."""
        supported = self.expected >= MIN_EXPECTED
        return np.where(supported, self.tokens / np.where(supported, self.expected, 1), np.nan)

    def pairs(self, most: int = PAIRS_SHOWN) -> list[dict[str, object]]:
        """The pairs that stand out most, those with most routes in excess of chance first."""
        excess = np.where(np.isnan(self.lift), 0, self.tokens - self.expected)
        order = np.argsort(-excess, axis=None, kind="stable")[:most]
        found = [(int(a), int(b)) for a, b in zip(*np.unravel_index(order, excess.shape), strict=True)]
        return [
            {
                "experts": [a, b],
                "tokens": int(self.tokens[a, b]),
                "expected": float(self.expected[a, b]),
                "lift": float(self.lift[a, b]),
            }
            for a, b in found
            if excess[a, b] > 0
        ]

    def to_dict(self) -> dict[str, object]:
        return {
            "layer": self.layer,
            "guessed": self.guessed,
            "by_popularity": self.by_popularity,
            "pairs": self.pairs(),
        }


def coactivated(layer: int, before: np.ndarray, after: np.ndarray, top_k: int) -> Coactivation:
    """Pairs of experts of two layers. before, after: bool [T, experts of the layer]."""
    both = before.any(axis=1) & after.any(axis=1)
    half = len(before) // 2
    seen, truth = _together(before[:half], after[:half]), after[half:]
    guessed = by_popularity = None
    if seen.any() and truth.any():
        popularity = after[:half].sum(axis=0)
        follows = (seen + popularity / popularity.sum()) / (before[:half].sum(axis=0)[:, None] + 1)
        best = np.argsort(-(before[half:].astype(np.float32) @ follows), axis=1, kind="stable")[:, :top_k]
        guessed = float(np.take_along_axis(truth, best, axis=1).sum() / truth.sum())
        by_popularity = float(truth[:, np.argsort(-popularity, kind="stable")[:top_k]].sum() / truth.sum())
    tokens = seen + _together(before[half:], truth)
    of_each = before[both].sum(axis=0), after[both].sum(axis=0)
    return Coactivation(layer, tokens, *of_each, int(both.sum()), guessed, by_popularity)


def _together(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """int [experts of a, experts of b]: tokens that chose both. a, b: bool [T, experts].

    Counts pairs of ids, which is linear in routes; the matrix product of the two tables is not, and threads of a busy
    machine made it a hundred times slower.
    """
    width = b.shape[1]
    counts = np.zeros(a.shape[1] * width, np.int64)
    columns_b = list(_id_columns(b))
    for i in _id_columns(a):
        for j in columns_b:
            known = (i >= 0) & (j >= 0)
            counts += np.bincount(i[known] * width + j[known], minlength=len(counts))
    return counts.reshape(a.shape[1], width)


def _id_columns(chosen: np.ndarray) -> Iterator[np.ndarray]:
    """int [T], as often as a token has experts at most: the first expert of each token, the second, ...; -1: none."""
    tokens, experts = chosen.nonzero()
    ends = np.cumsum(chosen.sum(axis=1))
    rank = np.arange(len(tokens)) - np.concatenate([[0], ends])[tokens]
    for i in range(int(rank.max(initial=-1)) + 1):
        column = np.full(len(chosen), -1, np.int64)
        column[tokens[rank == i]] = experts[rank == i]
        yield column
