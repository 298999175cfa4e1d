"""Analyzes a recorded routing: balance, memory, specialization, paths between layers, work per token.

Every figure is a count or a ratio of counts. A figure without counts is None, never 0. The analysis holds tables
[tokens, experts] of bools for two layers at a time, and takes time linear in routes, except for co-activation. Nothing
needs torch.

A *route* is one (token, expert) pair of a layer. An *overlap* compares two tokens: it is the share of experts that they
have in common, from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offmoe.report.coactivation import MIN_EXPECTED, Coactivation, coactivated
from offmoe.report.specialization import Specialization, specialization
from offmoe.trace.trace import Parameters, Trace, one_hot
from offmoe.types import CacheShape

ALERT = 3.0
"""An expert above this multiple of its layer's mean load causes an alert."""
LOAD_FIGURES = ("gini", "entropy", "busiest")
OVERLAPS = ("consecutive", "same_token", "independent", "uniform")


@dataclass(frozen=True)
class Load:
    """How evenly the routes of one layer are spread over its experts. routes: int [experts]."""

    routes: np.ndarray

    @property
    def total(self) -> int:
        return int(self.routes.sum())

    @property
    def shares(self) -> np.ndarray:
        """float [experts]: share of each expert in the routes. The sum is 1; all are 0 without routes."""
        return np.asarray(self.routes / max(self.total, 1))

    @property
    def gini(self) -> float | None:
        """Gini coefficient: 0 if all experts have equal loads, (experts - 1) / experts if one expert has all routes."""
        n = len(self.routes)
        ranks = 2 * np.arange(1, n + 1) - n - 1
        return float(ranks @ np.sort(self.routes)) / (n * self.total) if self.total else None

    @property
    def entropy(self) -> float | None:
        """Entropy of the shares / entropy of equal shares: 1 if loads are equal, 0 if one expert has all routes."""
        if not self.total:
            return None
        shares = self.shares[self.routes > 0]
        most = np.log(len(self.routes))
        return float(-(shares * np.log(shares)).sum() / most) + 0.0 if most else 1.0

    @property
    def busiest(self) -> float | None:
        """Load of the busiest expert / mean load of the layer."""
        return float(self.routes.max()) * len(self.routes) / self.total if self.total else None

    @property
    def unused(self) -> int:
        return int((self.routes == 0).sum())

    def to_dict(self) -> dict[str, object]:
        return {"routes": self.total, **{name: getattr(self, name) for name in LOAD_FIGURES}, "unused": self.unused}


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
    """Mean overlaps in one layer; None if there are no two tokens to compare.

    Attributes:
        consecutive: of a token and the previous token of its request.
        same_token: of two occurrences of the same token id, weighted by occurrences.
        independent: of any two tokens of the trace. This is what chance gives with these loads.
        uniform: of routing without preferences: top_k / experts.
    """

    consecutive: float | None
    same_token: float | None
    independent: float | None
    uniform: float


@dataclass(frozen=True)
class Phase:
    """Prefill or decode alone."""

    tokens: int
    loads: tuple[Load, ...]
    consecutive: tuple[float | None, ...]
    """By layer: mean overlap of this phase's tokens with their previous token, whichever phase that was in."""

    def to_dict(self) -> dict[str, object]:
        return {
            "tokens": self.tokens,
            "gini": mean([load.gini for load in self.loads]),
            "entropy": mean([load.entropy for load in self.loads]),
            "consecutive": mean(self.consecutive),
        }


@dataclass(frozen=True)
class Active:
    """What one token uses of the model.

    Attributes:
        expert_bytes, expert_bytes_total: bytes of expert weights that a token uses, and of all experts.
        parameters, parameters_total: active and all parameters; None if the trace has no parameter counts.
    """

    expert_bytes: int
    expert_bytes_total: int
    parameters: int | None = None
    parameters_total: int | None = None

    @property
    def flops_per_token(self) -> int | None:
        """Two FLOPs per active parameter. Attention over the context is not counted."""
        return None if self.parameters is None else 2 * self.parameters


@dataclass(frozen=True)
class Report:
    """Everything that `offmoe report` shows."""

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
    """None if the trace has no token ids or no texts of tokens."""

    @property
    def alerts(self) -> list[Alert]:
        """Experts above ALERT times the mean load, the heaviest first."""
        alerts = []
        for layer, load in enumerate(self.loads):
            times = load.shares * len(load.routes)
            for expert in np.flatnonzero(times > ALERT).tolist():
                routes = int(load.routes[expert])
                alerts.append(Alert(layer, expert, float(load.shares[expert]), float(times[expert]), routes))
        return sorted(alerts, key=lambda alert: (-alert.times_mean, alert.layer, alert.expert))

    @property
    def shift(self) -> float | None:
        """Share of routes to move to turn prefill's loads into decode's (total variation distance), mean of layers."""
        pairs = zip(self.prefill.loads, self.decode.loads, strict=True)
        return mean([float(np.abs(a.shares - b.shares).sum()) / 2 if a.total and b.total else None for a, b in pairs])

    def overall(self) -> dict[str, float | None]:
        """Mean of the layers, by name of the figure: those of LOAD_FIGURES and of OVERLAPS."""
        loads = {name: mean([getattr(load, name) for load in self.loads]) for name in LOAD_FIGURES}
        overlaps = {name: mean([getattr(layer, name) for layer in self.consistency]) for name in OVERLAPS}
        return {**loads, **overlaps}

    def to_dict(self) -> dict[str, Any]:
        """The object that `offmoe report --json` prints."""
        means = self.overall()
        return {
            "model": self.model,
            "tokens": self.tokens,
            "requests": self.requests,
            **{name: means[name] for name in LOAD_FIGURES},
            "alerts": [vars(alert) for alert in self.alerts],
            "consistency": {name: means[name] for name in OVERLAPS},
            "by_layer": [
                {
                    "layer": i,
                    "experts": len(load.routes),
                    "top_k": self.shape.top_k[i],
                    **load.to_dict(),
                    **vars(self.consistency[i]),
                    "shares": load.shares.tolist(),
                }
                for i, load in enumerate(self.loads)
            ],
            "phases": {"prefill": self.prefill.to_dict(), "decode": self.decode.to_dict(), "shift": self.shift},
            "coactivation": [pair.to_dict() for pair in self.coactivation],
            "specialisation": None if self.specialization is None else self.specialization.to_dict(),
            "active": {**vars(self.active), "flops_per_token": self.active.flops_per_token},
        }


def describe(trace: Trace) -> Report:
    """Analyze a trace. Works on every valid trace, however short."""
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
    """For each layer in turn: bool [T, experts], the experts that each token was routed to."""
    for layer, num_experts in enumerate(trace.shape.experts):
        yield one_hot(trace.experts[:, layer], num_experts)


def pair_overlap(chosen: np.ndarray, group: np.ndarray) -> float | None:
    """Mean overlap of two different tokens of the same group.

    The mean is exact without comparing pairs: an expert that c of a group's n tokens chose is shared by c (c - 1) of
    their n (n - 1) ordered pairs.

    Args:
        chosen: bool [T, experts]. Tokens without an expert are left out.
        group: int [T].

    Returns:
        The mean of the groups, weighted by their tokens; None if no group has two tokens.
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
    """Mean of the values that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _overlaps(chosen: np.ndarray, later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """float [pairs]: share of the later token's experts that the earlier token had too; NaN if either had none."""
    shared = (chosen[later] & chosen[earlier]).sum(axis=1)
    routes = chosen.sum(axis=1)
    return np.where((routes[later] > 0) & (routes[earlier] > 0), shared / np.maximum(routes[later], 1), np.nan)


def _active(shape: CacheShape, parameters: Parameters | None) -> Active:
    used, total = (int(np.dot(num_experts, shape.expert_bytes)) for num_experts in (shape.top_k, shape.experts))
    if parameters is None:
        return Active(used, total)
    of_experts = (int(np.dot(num_experts, parameters.expert)) for num_experts in (shape.top_k, shape.experts))
    return Active(used, total, *(parameters.dense + count for count in of_experts))
