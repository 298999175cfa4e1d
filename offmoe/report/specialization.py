"""Counts which tokens go to which expert, by the type of their text and one by one.

A preference that chance would explain is never shown: every lift is based on enough expected routes and carries its
counts. Time is linear in routes; a table [frequent tokens, experts] is held per layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from offmoe.report.token_types import TYPES, token_type
from offmoe.trace.trace import Trace

MIN_TOKENS = 20
"""A type with fewer tokens is not analyzed."""
CLEAR = 8.0
"""Evidence that a preference needs, in nats. Chance passes it less than once in 10,000 cells."""
TOKENS_PER_EXPERT = 6
STRONGEST = 20


@dataclass(frozen=True)
class TokenLift:
    """A token that one expert takes more often than its load explains.

    Attributes:
        piece, token: text and id of the token.
        routes: occurrences that the expert took.
        occurrences: occurrences in the trace.
        lift: routes / routes that the expert's load would give.
    """

    piece: str
    token: int
    routes: int
    occurrences: int
    lift: float


@dataclass(frozen=True)
class TypeLift:
    """A type of tokens that one expert takes more often than its load explains.

    Attributes:
        routes: routes of such tokens to the expert.
        expected: routes that the expert's load would give.
        lift: routes / expected.
    """

    layer: int
    expert: int
    type: str
    routes: int
    expected: float
    lift: float


@dataclass(frozen=True)
class Specialization:
    """Routes by type of token and expert.

    Attributes:
        types: number of tokens of each type, the most frequent first.
        routes: int [types, experts] for each layer.
        expected: float [types, experts] for each layer: the routes that loads alone would give.
        favorites: for each layer and expert, the tokens that stand out, the clearest first.
        min_expected: expected routes below which no lift is given.
    """

    types: dict[str, int]
    routes: tuple[np.ndarray, ...]
    expected: tuple[np.ndarray, ...]
    favorites: tuple[tuple[tuple[TokenLift, ...], ...], ...]
    min_expected: float

    def lift(self, layer: int) -> np.ndarray:
        """float [types, experts]: routes / expected routes; NaN with too few tokens or expected routes."""
        enough = np.array([count >= MIN_TOKENS for count in self.types.values()], bool)[:, None]
        supported = enough & (self.expected[layer] >= self.min_expected)
        return np.where(supported, self.routes[layer] / np.where(supported, self.expected[layer], 1), np.nan)

    def strongest(self, most: int = STRONGEST) -> list[TypeLift]:
        """The clearest specialists: one type per expert, the clearest first."""
        specialists = []
        names = list(self.types)
        for layer in range(len(self.routes)):
            lift = self.lift(layer)
            score = _evidence(self.routes[layer], self.expected[layer], lift)
            for expert in range(lift.shape[1]):
                best = int(np.argmax(score[:, expert])) if len(names) else 0
                if len(names) and score[best, expert] > 0:
                    routes, expected = int(self.routes[layer][best, expert]), float(self.expected[layer][best, expert])
                    entry = TypeLift(layer, expert, names[best], routes, expected, float(lift[best, expert]))
                    specialists.append((float(score[best, expert]), entry))
        return [entry for _, entry in sorted(specialists, key=lambda item: -item[0])[:most]]

    def to_dict(self) -> dict[str, object]:
        return {
            "types": self.types,
            "strongest": [vars(entry) for entry in self.strongest()],
            "favourites": [[[vars(token) for token in tokens] for tokens in experts] for experts in self.favorites],
        }


def specialization(trace: Trace, chosen: Iterable[np.ndarray], min_expected: float) -> Specialization | None:
    """Analyze a trace; None without token ids and texts. chosen: bool [T, experts] for each layer."""
    if trace.token is None or trace.pieces is None or not trace.tokens:
        return None
    ids, index, counts = np.unique(trace.token, return_inverse=True, return_counts=True)
    index = index.reshape(-1)
    pieces = [trace.pieces.get(token) for token in ids.tolist()]
    kinds = [None if piece is None else token_type(piece) for piece in pieces]
    tally: dict[str, int] = {}
    for kind, count in zip(kinds, counts.tolist(), strict=True):
        if kind is not None:
            tally[kind] = tally.get(kind, 0) + count
    order = list(TYPES)
    types = dict(sorted(tally.items(), key=lambda item: (-item[1], order.index(item[0]) if item[0] in TYPES else 99)))
    number = {kind: i for i, kind in enumerate(types)}
    of_token = np.array([-1 if kind is None else number[kind] for kind in kinds])[index]
    routes, expected, favorites = [], [], []
    for table in chosen:
        shares = table.sum(axis=0) / max(int(table.sum()), 1)
        tokens, experts = table.nonzero()
        cells = of_token[tokens] * table.shape[1] + experts
        counted = np.bincount(cells[of_token[tokens] >= 0], minlength=len(types) * table.shape[1])
        by_type = counted.reshape(len(types), table.shape[1])
        routes.append(by_type)
        expected.append(np.outer(by_type.sum(axis=1), shares))
        favorites.append(_favorites(table, index, ids, counts, pieces, shares, min_expected))
    return Specialization(types, tuple(routes), tuple(expected), tuple(favorites), min_expected)


def _favorites(
    chosen: np.ndarray,
    index: np.ndarray,
    ids: np.ndarray,
    counts: np.ndarray,
    pieces: list[str | None],
    shares: np.ndarray,
    min_expected: float,
) -> tuple[tuple[TokenLift, ...], ...]:
    """For each expert, the tokens that it clearly takes more often than its load explains."""
    frequent = np.flatnonzero((counts >= min_expected) & np.array([piece is not None for piece in pieces]))
    row = np.full(len(ids), -1)
    row[frequent] = np.arange(len(frequent))
    tokens, experts = chosen.nonzero()
    of_row = row[index[tokens]]
    cells = of_row[of_row >= 0] * chosen.shape[1] + experts[of_row >= 0]
    routes = np.bincount(cells, minlength=len(frequent) * chosen.shape[1]).reshape(len(frequent), chosen.shape[1])
    expected = np.outer(routes.sum(axis=1), shares)
    lift = np.where(routes >= min_expected, routes / np.maximum(expected, 1e-12), np.nan)
    score = _evidence(routes, expected, lift)
    out = []
    for expert in range(chosen.shape[1]):
        best = [i for i in np.argsort(-score[:, expert], kind="stable")[:TOKENS_PER_EXPERT] if score[i, expert] > 0]
        out.append(
            tuple(
                TokenLift(
                    str(pieces[frequent[i]]),
                    int(ids[frequent[i]]),
                    int(routes[i, expert]),
                    int(counts[frequent[i]]),
                    float(lift[i, expert]),
                )
                for i in best
            )
        )
    return tuple(out)


def _evidence(routes: np.ndarray, expected: np.ndarray, lift: np.ndarray) -> np.ndarray:
    """Log-likelihood ratio of each cell against its expectation (Poisson), in nats.

    It is 0 where it is below CLEAR, the lift is unknown, or the lift is below 1.
    """
    known = ~np.isnan(lift) & (lift > 1)
    score = routes * np.log(np.where(known, lift, 1.0)) - (routes - expected)
    return np.where(known & (score >= CLEAR), score, 0.0)
