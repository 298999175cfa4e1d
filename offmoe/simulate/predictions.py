"""Measures how good predictions of the next layer's experts are, and what acting on them would move.

Recall alone flatters a predictor: most predicted experts are resident anyway. So predictions are also compared with a
cache that fetches on demand only. Three figures follow: how many of its misses they cover, how many of the experts that
they would fetch are used, and how many wasted bytes a useful byte costs. A predictor must never see the requests that
it is judged on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from offmoe.config import CacheOptions
from offmoe.policy.planner import build_planner
from offmoe.simulate.replay import Recording
from offmoe.trace.trace import NONE, Trace, one_hot

SHARES = ("recall", "precision", "coverage", "precision_missing", "extra_per_saved")
"""Properties of PredictionQuality that are no counts."""


@dataclass
class PredictionQuality:
    """Counts of one layer, or of all layers. A share is None if its denominator is 0.

    Attributes:
        predicted, wanted, right: (token, expert) pairs that were predicted, that were routed, and that were both.
        misses, covered: misses of the cache, counted per step, and those of them that were predicted.
        fetched: predicted experts without a slot, counted per step.
        fetched_bytes, saved_bytes: bytes of `fetched` and of `covered`.
    """

    predicted: int = 0
    wanted: int = 0
    right: int = 0
    misses: int = 0
    covered: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    saved_bytes: int = 0

    @property
    def recall(self) -> float | None:
        """Share of the routed experts that were predicted."""
        return _share(self.right, self.wanted)

    @property
    def precision(self) -> float | None:
        """Share of the predicted experts that were routed."""
        return _share(self.right, self.predicted)

    @property
    def coverage(self) -> float | None:
        """Share of the misses that were predicted: what prefetching every prediction could save."""
        return _share(self.covered, self.misses)

    @property
    def precision_missing(self) -> float | None:
        """Share of the predicted experts without a slot that were routed: how often a prefetch is useful."""
        return _share(self.covered, self.fetched)

    @property
    def extra_per_saved(self) -> float | None:
        """Wasted bytes per byte that a prefetch would have saved."""
        return _share(self.fetched_bytes - self.saved_bytes, self.saved_bytes)

    def to_dict(self) -> dict[str, float | int | None]:
        return {
            **{name: value for name, value in asdict(self).items() if not name.endswith("bytes")},
            **{name: getattr(self, name) for name in SHARES},
        }


def analyze(trace: Trace, options: CacheOptions, only: frozenset[int] | None = None) -> list[PredictionQuality]:
    """Judge the predictions of a trace.

    Args:
        trace: the routing, with `predicted`.
        options: the cache to compare with. Its prefetch is ignored.
        only: requests to judge; None judges all. The cache runs over all requests in either case.

    Returns:
        One entry per MoE layer. The first layer has no predictions.
    """
    quality = [PredictionQuality() for _ in range(trace.shape.layers)]
    if trace.predicted is None:
        return quality
    rows = np.ones(trace.tokens, bool) if only is None else np.isin(trace.request, list(only))
    for layer in range(1, trace.shape.layers):
        known = rows & (trace.predicted[:, layer] >= 0).any(axis=1)
        num_experts = trace.shape.experts[layer]
        wanted, guess = (one_hot(ids[known, layer], num_experts) for ids in (trace.experts, trace.predicted))
        quality[layer] = PredictionQuality(int(guess.sum()), int(wanted.sum()), int((wanted & guess).sum()))
    planner = build_planner(replace(options, prefetch=0), trace.shape)
    for step in Recording(trace).steps:
        predicted: Sequence[int] = ()
        predicted_for = 0
        judged = only is None or step.request in only
        for access in step.accesses:
            if judged and predicted and access.layer == predicted_for:
                demanded = {demand.expert for demand in access.demands}
                missing = planner.missing(access.layer, sorted(demanded))
                fetched = planner.missing(access.layer, predicted)
                counts, nbytes = quality[access.layer], trace.shape.expert_bytes[access.layer]
                covered = len(demanded.intersection(fetched))
                counts.misses += len(missing)
                counts.covered += covered
                counts.fetched += len(fetched)
                counts.fetched_bytes += len(fetched) * nbytes
                counts.saved_bytes += covered * nbytes
            planner.plan(access)
            predicted, predicted_for = access.predicted, access.layer + 1
    return quality


def total(quality: Sequence[PredictionQuality]) -> PredictionQuality:
    """The counts of all layers together."""
    names = [each.name for each in fields(PredictionQuality)]
    return PredictionQuality(*(sum(getattr(counts, name) for counts in quality) for name in names))


def transition_predictions(trace: Trace, without: frozenset[int] = frozenset()) -> np.ndarray:
    """Predict experts without hidden states: what usually follows the experts of the previous layer.

    The method is naive Bayes over counts of transitions between layers. It is the baseline for router predictions.

    Args:
        trace: the routing, T tokens of L layers.
        without: requests to leave out of the counts.

    Returns:
        int16 [T, L, top_k], best first. Layer 0 has no predictions.
    """
    width = max(trace.shape.top_k)
    out = np.full((trace.tokens, trace.shape.layers, width), NONE, np.int16)
    train = ~np.isin(trace.request, list(without))
    before = one_hot(trace.experts[:, 0], trace.shape.experts[0]).astype(np.float32)  # [T, E]
    for layer in range(1, trace.shape.layers):
        after = one_hot(trace.experts[:, layer], trace.shape.experts[layer]).astype(np.float32)
        popular = after[train].mean(axis=0) + 1e-4 if train.any() else np.ones(after.shape[1])
        together = before[train].T @ after[train]  # [E of the previous layer, E]
        conditional = np.log((together + 0.5 * popular) / (before[train].sum(axis=0)[:, None] + 0.5))
        score = np.log(popular) + before @ (conditional - np.log(popular))
        best = np.argsort(-score, axis=1, kind="stable")[:, :width]
        out[:, layer, : best.shape[1]] = best
        before = after
    return out


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
