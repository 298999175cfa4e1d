"""Counts which tokens go to which expert, by the type of their text and one by one.

A preference that chance would explain is never shown: every lift is based on enough expected routes and carries its
counts. Time is linear in routes; a table [frequent tokens, experts] is held per layer.
"""

from __future__ import annotations

from collections import Counter
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
        for layer, (routes, expected) in enumerate(zip(self.routes, self.expected, strict=True)):
            lift = self.lift(layer)
            score = _evidence(routes, expected, lift)
            for expert, best in enumerate(score.argmax(axis=0).tolist() if names else ()):
                if score[best, expert] > 0:
                    at = best, expert
                    entry = TypeLift(layer, expert, names[best], int(routes[at]), float(expected[at]), float(lift[at]))
                    specialists.append((float(score[at]), entry))
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
    pieces = [trace.pieces.get(token) for token in ids.tolist()]
    kinds = [None if piece is None else token_type(piece) for piece in pieces]
    tally: Counter[str] = Counter()
    for kind, count in zip(kinds, counts.tolist(), strict=True):
        if kind is not None:
            tally[kind] += count
    rank = {name: i for i, name in enumerate(TYPES)}
    types = dict(sorted(tally.items(), key=lambda item: (-item[1], rank.get(item[0], len(rank)))))
    number = {kind: i for i, kind in enumerate(types)}
    type_of = np.array([-1 if kind is None else number[kind] for kind in kinds])  # [ids]
    frequent = [i for i, piece in enumerate(pieces) if piece is not None and counts[i] >= min_expected]
    row_of = np.full(len(ids), -1)  # [ids]
    row_of[frequent] = range(len(frequent))
    tokens = [(str(pieces[i]), int(ids[i]), int(counts[i])) for i in frequent]
    routes, expected, favorites = [], [], []
    for table in chosen:
        by_type, expected_by_type = _routes(table, type_of[index.ravel()], len(types))
        routes.append(by_type)
        expected.append(expected_by_type)
        favorites.append(_favorites(*_routes(table, row_of[index.ravel()], len(frequent)), tokens, min_expected))
    return Specialization(types, tuple(routes), tuple(expected), tuple(favorites), min_expected)


def _routes(chosen: np.ndarray, group: np.ndarray, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """int and float [groups, experts]: routes by group of tokens, and the routes that loads alone would give.

    chosen: bool [T, experts]. group: int [T], -1 for tokens that are left out.
    """
    num_experts = chosen.shape[1]
    tokens, experts = chosen.nonzero()
    cells = group[tokens] * num_experts + experts
    counted = np.bincount(cells[group[tokens] >= 0], minlength=num_groups * num_experts)
    routes = counted.reshape(num_groups, num_experts)
    return routes, np.outer(routes.sum(axis=1), chosen.sum(axis=0) / max(len(tokens), 1))


def _favorites(
    routes: np.ndarray, expected: np.ndarray, tokens: list[tuple[str, int, int]], min_expected: float
) -> tuple[tuple[TokenLift, ...], ...]:
    """For each expert, the tokens that it clearly takes more often than its load explains.

    routes, expected: [tokens, experts]. tokens: text, id and occurrences of each token.
    """
    lift = np.where(routes >= min_expected, routes / np.maximum(expected, 1e-12), np.nan)
    score = _evidence(routes, expected, lift)
    best = np.argsort(-score, axis=0, kind="stable")[:TOKENS_PER_EXPERT]
    favorites = []
    for expert in range(routes.shape[1]):
        clear = [i for i in best[:, expert] if score[i, expert] > 0]
        lifts = [(*tokens[i][:2], int(routes[i, expert]), tokens[i][2], float(lift[i, expert])) for i in clear]
        favorites.append(tuple(TokenLift(*values) for values in lifts))
    return tuple(favorites)


def _evidence(routes: np.ndarray, expected: np.ndarray, lift: np.ndarray) -> np.ndarray:
    """Log-likelihood ratio of each cell against its expectation (Poisson), in nats.

    It is 0 where it is below CLEAR, the lift is unknown, or the lift is below 1.
    """
    known = ~np.isnan(lift) & (lift > 1)
    score = routes * np.log(np.where(known, lift, 1.0)) - (routes - expected)
    return np.where(known & (score >= CLEAR), score, 0.0)
