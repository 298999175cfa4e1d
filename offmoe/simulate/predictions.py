"""How good predictions of the next layer's experts are, and what acting on them would move.

Nothing moves. Recall alone flatters: most of what is predicted is resident anyway. So predictions are also held against
a cache that fetches on demand only: how many of its misses they cover, how many of the experts that they would fetch
are used, and how many useless bytes a useful one costs. Must never let a predictor see the requests that it is judged
on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from offmoe.config import CacheOptions
from offmoe.policy.planner import build_planner
from offmoe.simulate.replay import Recording
from offmoe.trace.trace import NONE, Trace
from offmoe.types import CacheShape


@dataclass
class PredictionQuality:
    """Counts of one layer, or of all. `predicted`, `wanted` and `right`: per token; the others: per step, against what
    was resident. Shares are None where there is nothing to share.
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
        """Of the experts that tokens used, those predicted."""
        return _share(self.right, self.wanted)

    @property
    def precision(self) -> float | None:
        """Of the predicted experts, those used."""
        return _share(self.right, self.predicted)

    @property
    def coverage(self) -> float | None:
        """Of the misses, those predicted: what prefetching everything predicted could save."""
        return _share(self.covered, self.misses)

    @property
    def precision_missing(self) -> float | None:
        """Of the predicted experts without a slot, those used: what a prefetch is good for."""
        return _share(self.covered, self.fetched)

    @property
    def extra_per_saved(self) -> float | None:
        """Bytes fetched for nothing per byte that would have been missed."""
        return _share(self.fetched_bytes - self.saved_bytes, self.saved_bytes)

    def to_dict(self) -> dict[str, float | int | None]:
        return {
            **{name: value for name, value in asdict(self).items() if not name.endswith("bytes")},
            "recall": self.recall,
            "precision": self.precision,
            "coverage": self.coverage,
            "precision_missing": self.precision_missing,
            "extra_per_saved": self.extra_per_saved,
        }

    def _add(self, other: PredictionQuality) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def analyze(trace: Trace, options: CacheOptions, only: frozenset[int] | None = None) -> list[PredictionQuality]:
    """Quality of `trace.predicted` per layer (the first has no prediction), the cache as in `options` without prefetch.

    only: judge these requests; None: all. The cache runs over all of them."""
    quality = [PredictionQuality() for _ in range(trace.shape.layers)]
    if trace.predicted is None:
        return quality
    rows = np.ones(trace.tokens, bool) if only is None else np.isin(trace.request, list(only))
    for layer in range(1, trace.shape.layers):
        _count_tokens(quality[layer], trace.experts[rows, layer], trace.predicted[rows, layer], trace.shape, layer)
    planner = build_planner(replace(options, prefetch=0), trace.shape)
    for step in Recording(trace).steps:
        predicted: Sequence[int] = ()
        predicted_for = 0
        judged = only is None or step.request in only
        for access in step.accesses:
            if judged and predicted and access.layer == predicted_for:
                wanted = {demand.expert for demand in access.demands}
                missing = planner.missing(access.layer, sorted(wanted))
                fetched = planner.missing(access.layer, predicted)
                counts, nbytes = quality[access.layer], trace.shape.expert_bytes[access.layer]
                covered = len(wanted.intersection(fetched))
                counts.misses += len(missing)
                counts.covered += covered
                counts.fetched += len(fetched)
                counts.fetched_bytes += len(fetched) * nbytes
                counts.saved_bytes += covered * nbytes
            planner.plan(access)
            predicted, predicted_for = access.predicted, access.layer + 1
    return quality


def total(quality: Sequence[PredictionQuality]) -> PredictionQuality:
    """All layers together."""
    everything = PredictionQuality()
    for counts in quality:
        everything._add(counts)
    return everything


def transition_predictions(trace: Trace, without: frozenset[int] = frozenset(), width: int | None = None) -> np.ndarray:
    """Baseline that needs no hidden states: what usually follows the experts of the layer before.

    int16 [T, L, width], naive Bayes over transition counts of the requests that are not in `without`, best first; layer
    0 has none. width: experts predicted per token, top_k as a rule."""
    width = width or max(trace.shape.top_k)
    out = np.full((trace.tokens, trace.shape.layers, width), NONE, np.int16)
    train = ~np.isin(trace.request, list(without))
    before = _one_hot(trace.experts[:, 0], trace.shape.experts[0])  # [T, E]
    for layer in range(1, trace.shape.layers):
        after = _one_hot(trace.experts[:, layer], trace.shape.experts[layer])
        popular = after[train].mean(axis=0) + 1e-4 if train.any() else np.ones(after.shape[1])
        together = before[train].T @ after[train]  # [E of the layer before, E]
        given = np.log((together + 0.5 * popular) / (before[train].sum(axis=0)[:, None] + 0.5))
        score = np.log(popular) + before @ (given - np.log(popular))
        best = np.argsort(-score, axis=1, kind="stable")[:, :width]
        out[:, layer, : best.shape[1]] = best
        before = after
    return out


def _one_hot(ids: np.ndarray, num_experts: int) -> np.ndarray:
    hot = np.zeros((len(ids), num_experts), np.float32)
    rows, places = np.nonzero(ids >= 0)
    hot[rows, ids[rows, places]] = 1.0
    return hot


def _count_tokens(
    counts: PredictionQuality, experts: np.ndarray, predicted: np.ndarray, shape: CacheShape, layer: int
) -> None:
    known = (predicted >= 0).any(axis=1)
    wanted = _one_hot(experts[known], shape.experts[layer])
    guess = _one_hot(predicted[known], shape.experts[layer])
    counts.predicted += int(guess.sum())
    counts.wanted += int(wanted.sum())
    counts.right += int((wanted * guess).sum())


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
