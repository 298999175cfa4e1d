"""What a recorded routing says about a model: balance, memory, specialization, paths between layers, work per token.

Only arrays of the trace are read. Bound: tables [tokens, experts] of bools of two layers at a time, and time linear in
routes but for co-activation. Everything is a count or a ratio of counts; what has no counts is None, never 0.
Must never import torch, and never show a ratio whose counts are left out.

A *route* is one (token, expert) pair of a layer. Overlaps compare the experts of two tokens: the share that they have
in common, 1.0 where all are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offmoe.report.coactivation import MIN_EXPECTED, Coactivation, coactivated
from offmoe.report.specialization import Specialization, specialization
from offmoe.trace.trace import Parameters, Trace
from offmoe.types import CacheShape

ALERT = 3.0
"""Times the mean load of its layer above which an expert is worth an alert."""


@dataclass(frozen=True)
class Load:
    """How evenly the routes of one layer are spread. routes: int [experts]."""

    routes: np.ndarray

    @property
    def total(self) -> int:
        return int(self.routes.sum())

    @property
    def shares(self) -> np.ndarray:
        """float [experts], sum 1; zeros without routes."""
        return np.asarray(self.routes / max(self.total, 1))

    @property
    def gini(self) -> float | None:
        """0: every expert carries the same; (experts - 1) / experts: one carries all."""
        n = len(self.routes)
        ranks = 2 * np.arange(1, n + 1) - n - 1
        return float(ranks @ np.sort(self.routes)) / (n * self.total) if self.total else None

    @property
    def entropy(self) -> float | None:
        """Of the shares, over that of an even spread: 1 is even, 0 is one expert. A lone expert is even."""
        if not self.total:
            return None
        shares = self.shares[self.routes > 0]
        most = np.log(len(self.routes))
        return float(-(shares * np.log(shares)).sum() / most) + 0.0 if most else 1.0

    @property
    def busiest(self) -> float | None:
        """Load of the busiest expert, in means of the layer."""
        return float(self.routes.max()) * len(self.routes) / self.total if self.total else None

    @property
    def unused(self) -> int:
        return int((self.routes == 0).sum())

    def to_dict(self) -> dict[str, object]:
        return {
            "routes": self.total,
            "gini": self.gini,
            "entropy": self.entropy,
            "busiest": self.busiest,
            "unused": self.unused,
        }


@dataclass(frozen=True)
class Alert:
    """An expert that carries more than ALERT times the mean of its layer."""

    layer: int
    expert: int
    share: float
    times_mean: float
    routes: int


@dataclass(frozen=True)
class Consistency:
    """Overlaps of one layer; None where no two tokens can be compared.

    consecutive: of a token and the one before it in its request. same_token: of two occurrences of one token id,
    weighted by occurrences. independent: of any two tokens of the trace, which is what neither memory nor meaning
    would give. uniform: of routing without preferences, top_k / experts."""

    consecutive: float | None
    same_token: float | None
    independent: float | None
    uniform: float

    def to_dict(self) -> dict[str, float | None]:
        return dict(vars(self))


@dataclass(frozen=True)
class Phase:
    """One of prefill and decode, by itself."""

    tokens: int
    loads: tuple[Load, ...]
    consecutive: tuple[float | None, ...]
    """Of the tokens of this phase, with whatever token came before them."""

    def to_dict(self) -> dict[str, object]:
        return {
            "tokens": self.tokens,
            "gini": mean([load.gini for load in self.loads]),
            "entropy": mean([load.entropy for load in self.loads]),
            "consecutive": mean(self.consecutive),
        }


@dataclass(frozen=True)
class Active:
    """Expert weights that one token uses, of those there are; parameters and FLOPs if the trace knows them."""

    expert_bytes: int
    expert_bytes_total: int
    parameters: int | None = None
    parameters_total: int | None = None

    @property
    def flops_per_token(self) -> int | None:
        """Two per active parameter; attention over the context comes on top."""
        return None if self.parameters is None else 2 * self.parameters

    def to_dict(self) -> dict[str, int | None]:
        return {**vars(self), "flops_per_token": self.flops_per_token}


@dataclass(frozen=True)
class Report:
    """All that `offmoe report` shows."""

    model: str
    shape: CacheShape
    tokens: int
    requests: int
    loads: tuple[Load, ...]
    consistency: tuple[Consistency, ...]
    coactivation: tuple[Coactivation, ...]
    prefill: Phase
    decode: Phase
    active: Active
    specialization: Specialization | None
    """None for a trace without tokens or pieces."""

    @property
    def alerts(self) -> list[Alert]:
        """The heaviest first."""
        found = []
        for layer, load in enumerate(self.loads):
            times = load.shares * len(load.routes)
            for expert in np.flatnonzero(times > ALERT).tolist():
                routes = int(load.routes[expert])
                found.append(Alert(layer, expert, float(load.shares[expert]), float(times[expert]), routes))
        return sorted(found, key=lambda alert: (-alert.times_mean, alert.layer, alert.expert))

    @property
    def shift(self) -> float | None:
        """Share of the routes that would have to move to turn prefill's loads into decode's; mean of the layers."""
        pairs = zip(self.prefill.loads, self.decode.loads, strict=True)
        return mean([float(np.abs(a.shares - b.shares).sum()) / 2 if a.total and b.total else None for a, b in pairs])

    def overall(self) -> dict[str, float | None]:
        """Mean overlaps of the layers."""
        names = ("consecutive", "same_token", "independent", "uniform")
        return {name: mean([getattr(layer, name) for layer in self.consistency]) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The form of `offmoe report --json`."""
        layers = zip(self.loads, self.consistency, strict=True)
        return {
            "model": self.model,
            "tokens": self.tokens,
            "requests": self.requests,
            "gini": mean([load.gini for load in self.loads]),
            "entropy": mean([load.entropy for load in self.loads]),
            "busiest": mean([load.busiest for load in self.loads]),
            "alerts": [vars(alert) for alert in self.alerts],
            "consistency": self.overall(),
            "by_layer": [
                {
                    "layer": i,
                    "experts": len(load.routes),
                    "top_k": self.shape.top_k[i],
                    **load.to_dict(),
                    **consistency.to_dict(),
                    "shares": load.shares.tolist(),
                }
                for i, (load, consistency) in enumerate(layers)
            ],
            "phases": {"prefill": self.prefill.to_dict(), "decode": self.decode.to_dict(), "shift": self.shift},
            "coactivation": [pair.to_dict() for pair in self.coactivation],
            "specialisation": None if self.specialization is None else self.specialization.to_dict(),
            "active": self.active.to_dict(),
        }


def describe(trace: Trace) -> Report:
    """Everything that the trace tells. Never fails on a valid trace, however short."""
    in_order = np.argsort(trace.request, kind="stable")
    follows = np.flatnonzero(np.diff(trace.request[in_order]) == 0) + 1
    later, earlier = in_order[follows], in_order[follows - 1]
    prefill = trace.prefill
    loads, consistency, coactivation = [], [], []
    consecutive: dict[bool, list[float | None]] = {True: [], False: []}
    by_phase: dict[bool, list[Load]] = {True: [], False: []}
    before: np.ndarray | None = None
    for layer, chosen in enumerate(chosen_by_layer(trace)):
        loads.append(Load(chosen.sum(axis=0)))
        overlaps = _overlaps(chosen, later, earlier)
        known = ~np.isnan(overlaps)
        for phase in (True, False):
            by_phase[phase].append(Load(chosen[prefill == phase].sum(axis=0)))
            consecutive[phase].append(mean(overlaps[known & (prefill[later] == phase)].tolist()))
        consistency.append(
            Consistency(
                consecutive=mean(overlaps[known].tolist()),
                same_token=None if trace.token is None else pair_overlap(chosen, trace.token),
                independent=pair_overlap(chosen, np.zeros(trace.tokens, np.int32)),
                uniform=trace.shape.top_k[layer] / trace.shape.experts[layer],
            )
        )
        if before is not None:
            coactivation.append(coactivated(layer - 1, before, chosen, trace.shape.top_k[layer]))
        before = chosen
    phases = {p: Phase(int((prefill == p).sum()), tuple(by_phase[p]), tuple(consecutive[p])) for p in (True, False)}
    return Report(
        model=trace.model,
        shape=trace.shape,
        tokens=trace.tokens,
        requests=trace.requests,
        loads=tuple(loads),
        consistency=tuple(consistency),
        coactivation=tuple(coactivation),
        prefill=phases[True],
        decode=phases[False],
        active=_active(trace.shape, trace.parameters),
        specialization=specialization(trace, chosen_by_layer(trace), MIN_EXPECTED),
    )


def chosen_by_layer(trace: Trace) -> Iterator[np.ndarray]:
    """bool [T, experts] of each layer in turn: what each token was routed to."""
    rows = np.arange(trace.tokens)[:, None]
    for layer, experts in enumerate(trace.shape.experts):
        ids = trace.experts[:, layer]
        chosen = np.zeros((trace.tokens, experts + 1), bool)
        chosen[rows, np.where(ids < 0, experts, ids)] = True
        yield chosen[:, :experts]


def pair_overlap(chosen: np.ndarray, group: np.ndarray) -> float | None:
    """Mean overlap of two different tokens of one group, groups weighted by their tokens; None if none has two.

    chosen: bool [T, experts]; group: int [T]. Tokens without an expert are left out. Exact and without comparing
    pairs: an expert that c of a group's n tokens chose is shared by c (c - 1) of their n (n - 1) ordered pairs.
    """
    routed = chosen.any(axis=1)
    chosen = chosen[routed]
    members, index = np.unique(group[routed], return_inverse=True)
    index = index.reshape(-1)
    tokens, experts = chosen.nonzero()
    cells, counts = np.unique(index[tokens].astype(np.int64) * chosen.shape[1] + experts, return_counts=True)
    shared = np.bincount(cells // chosen.shape[1], counts * (counts - 1.0), minlength=len(members))
    n = np.bincount(index, minlength=len(members))
    routes = np.bincount(index, chosen.sum(axis=1), minlength=len(members))
    several = n > 1
    if not several.any():
        return None
    n, shared, routes = n[several], shared[several], routes[several]
    return float(np.average(shared / ((n - 1) * routes), weights=n))


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _overlaps(chosen: np.ndarray, later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """float [pairs]: share of the later token's experts that the earlier one had too; NaN if either had none."""
    shared = (chosen[later] & chosen[earlier]).sum(axis=1)
    routes = chosen.sum(axis=1)
    return np.where((routes[later] > 0) & (routes[earlier] > 0), shared / np.maximum(routes[later], 1), np.nan)


def _active(shape: CacheShape, parameters: Parameters | None) -> Active:
    per_token = sum(k * size for k, size in zip(shape.top_k, shape.expert_bytes, strict=True))
    total = sum(n * size for n, size in zip(shape.experts, shape.expert_bytes, strict=True))
    if parameters is None:
        return Active(per_token, total)
    return Active(
        per_token,
        total,
        parameters.dense + sum(k * size for k, size in zip(shape.top_k, parameters.expert, strict=True)),
        parameters.dense + sum(n * size for n, size in zip(shape.experts, parameters.expert, strict=True)),
    )
