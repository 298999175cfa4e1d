"""Counts which experts of neighboring layers the same tokens choose, and how well that predicts the next layer.

Counting is linear in routes x top_k. Guessing takes tokens x experts x experts of the next layer. A ratio that chance
would explain is never shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

MIN_EXPECTED = 5.0
"""Expected routes below which no ratio is shown: with fewer, chance alone can produce any ratio."""
PAIRS_SHOWN = 5


@dataclass(frozen=True)
class Coactivation:
    """Which experts of layer `layer + 1` follow the experts of `layer`.

    Attributes:
        layer: the first of the two layers.
        tokens: int [experts, experts of the next layer], tokens that chose both experts.
        before, after: int [experts], tokens that chose each expert of the first and of the second layer.
        both: tokens that were routed in both layers; `before` and `after` count only these.
        guessed: share of the next layer's experts that are guessed right. Pairs are counted in the first half of the
            trace and guessed in the second, top_k experts per token.
        by_popularity: the same, guessing the most popular experts without looking at the first layer.
    """

    layer: int
    tokens: np.ndarray
    before: np.ndarray
    after: np.ndarray
    both: int
    guessed: float | None
    by_popularity: float | None

    @cached_property
    def expected(self) -> np.ndarray:
        """float, as `tokens`: tokens expected if the two layers chose independently."""
        return np.asarray(np.outer(self.before, self.after) / max(self.both, 1))

    @cached_property
    def lift(self) -> np.ndarray:
        """float, as `tokens`: tokens / expected tokens; NaN where fewer than MIN_EXPECTED are expected."""
        supported = self.expected >= MIN_EXPECTED
        return np.where(supported, self.tokens / np.where(supported, self.expected, 1), np.nan)

    def pairs(self, most: int = PAIRS_SHOWN) -> list[dict[str, object]]:
        """The pairs with the most tokens above chance, the strongest first."""
        excess = np.where(np.isnan(self.lift), 0, self.tokens - self.expected)
        order = np.argsort(-excess, axis=None, kind="stable")[:most]
        return [
            {
                "experts": [a, b],
                "tokens": int(self.tokens[a, b]),
                "expected": float(self.expected[a, b]),
                "lift": float(self.lift[a, b]),
            }
            for a, b in np.transpose(np.unravel_index(order, excess.shape)).tolist()
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
    """Count the pairs of two layers. before, after: bool [T, experts], which experts each token chose in the layers."""
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

    Counting pairs of ids is linear in routes. The matrix product of the two tables is not, and took a hundred times as
    long on a machine with busy threads.
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
    """int [T] for the first expert of each token, then for the second, and so on. -1 where a token has no more."""
    tokens, experts = chosen.nonzero()
    ends = np.cumsum(chosen.sum(axis=1))
    rank = np.arange(len(tokens)) - np.concatenate([[0], ends])[tokens]
    for i in range(int(rank.max(initial=-1)) + 1):
        column = np.full(len(chosen), -1, np.int64)
        column[tokens[rank == i]] = experts[rank == i]
        yield column
