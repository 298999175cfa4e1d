"""Which predicted experts to prefetch, and when to stop asking for predictions.

A prefetch that the next access of its layer does not demand is a wasted read, which delays demands. How much time a
right one saves depends on how long computing takes, which counts of accesses do not tell. So "auto" assumes that
little of a read is hidden (`HIDDEN`) and limits its losses on any machine: a wasted read is canceled as soon as it is
known to be wasted, and what wasted reads cost stays below one in `READS_PER_WASTE` of the reads that were needed.

Learning costs no read: a prediction that is only noted is as right or wrong as one that is prefetched. State is plain
integers and sees no clock, so a replay decides the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from offmoe.io_limits import stop_share
from offmoe.types import CacheShape

WORTH_BYTES = 1 << 20
"""Smallest expert that "auto" predicts. A prediction takes a norm, a router and a ranking, about 0.1 ms per layer. For
experts of 196 KB, read in 0.15 ms, predicting made decoding 6.4 % slower (3.0 to 13.9, tools/bench/prefetch_live.py).
"""
ALL_RANKS = (1 << 31) - 1
"""A bit for each rank of a token's predictions; more than any model has."""


class Candidate(NamedTuple):
    """A predicted expert without a slot, and its rank among the predicted: 0 is the likeliest."""

    rank: int
    expert: int


class PrefetchPolicy:
    """Chooses which predicted experts are prefetched. This one prefetches the `count` likeliest of every layer."""

    def __init__(self, count: int):
        """count: 0 is off."""
        self._count = count

    def wants_prediction(self, layer: int) -> bool:
        """Whether a prediction for `layer` would be used now, be it only to learn how good it is."""
        return self._count > 0

    def ranks(self, layer: int) -> int:
        """Ranks of a token's predictions for `layer`, as bits, of which `choose` could choose some now."""
        return ALL_RANKS if self._count else 0

    def choose(self, layer: int, candidates: Sequence[Candidate], *, single: bool) -> Sequence[Candidate]:
        """The candidates to prefetch for the next access of `layer`. single: the step has one token."""
        return candidates[: self._count]

    def issued(self, layer: int, count: int) -> None:
        """The first `count` of the candidates chosen for `layer` are being prefetched."""

    def on_access(self, layer: int, experts: Sequence[int], misses: int) -> None:
        """`layer` demands these experts; `misses` of them are neither resident nor prefetched."""


class AutoPrefetch(PrefetchPolicy):
    """Prefetches up to top_k experts per layer, of the ranks that have proven right.

    Layers differ, and so do ranks within a prediction: of the demo model's misses at 2 of 8 slots the first rank is
    right in 0.64 to 0.98 by layer, the second in 0.47 to 0.78. So each (layer, rank) is trusted by its own record,
    steps of many tokens apart from those of one, and by the record of all layers while its own is short.
    """

    HIDDEN = 0.25
    """Share of a read that computing is assumed to overlap. At 0.25 a prefetch that cannot be canceled pays only if
    0.8 of the predictions are right."""
    ASSUMED = 0.5
    """Share of predictions that is assumed to be right before any is judged. Routers of trained models were right in
    0.47 to 0.98, of random weights in 0.5 to 0.8 (docs/measurements.md)."""
    EVIDENCE = 24
    """Judged predictions from which a rank's own record decides; the record fades at four times as many."""
    TRIAL = 128
    """Accesses of a layer without a trusted rank after which it asks for no predictions, at first for as many."""
    LONGEST_PAUSE = 2048
    """Each pause is twice as long as the one before it, up to this. A layer without a trusted rank then predicts in one
    of 17 accesses."""
    READS_PER_WASTE = 64
    """Needed reads that allow one wasted read: at most 1.6 % more reads. Prefetches under way count as wasted."""
    STOPPED = 4
    """A wasted read that can be canceled is charged its share of a read divided by this: it costs time only where the
    disk is what computing waits for."""

    def __init__(self, top_k: Sequence[int], expert_bytes: Sequence[int]):
        self._layers = [_Layer(k, stop_share(nbytes)) for k, nbytes in zip(top_k, expert_bytes, strict=True)]
        self._all_layers = _Record(max(top_k), max(layer.record.enough for layer in self._layers))
        self._credit = 0
        """Needed reads that no wasted read, or prefetch under way, has been charged to; see `_Layer.charge`."""

    def wants_prediction(self, layer: int) -> bool:
        return self._layers[layer].pause == 0

    def ranks(self, layer: int) -> int:
        state = self._layers[layer]
        if state.pause or self._credit < state.charge:
            return 0
        return sum([self._trusts(state.record, rank) << rank for rank in range(state.top_k)])

    def choose(self, layer: int, candidates: Sequence[Candidate], *, single: bool) -> Sequence[Candidate]:
        state = self._layers[layer]
        if state.pause:
            return ()
        state.noted = [(c, min(c.rank, state.top_k - 1) if single else -1) for c in candidates[: state.top_k]]
        trusted = [c for c, rank in state.noted if self._trusts(state.record, rank)]
        state.prefetched = trusted[: max(0, self._credit) // state.charge]
        return state.prefetched

    def _trusts(self, record: _Record, rank: int) -> bool:
        return (record if record.judged[rank] >= self.EVIDENCE else self._all_layers).trusted[rank]

    def issued(self, layer: int, count: int) -> None:
        state = self._layers[layer]
        state.prefetched = state.prefetched[:count]
        self._credit -= count * state.charge

    def on_access(self, layer: int, experts: Sequence[int], misses: int) -> None:
        state = self._layers[layer]
        used = sum([c.expert in experts for c in state.prefetched])
        self._credit += misses + used * (1 + state.charge)
        for candidate, rank in state.noted:
            right = candidate.expert in experts
            self._all_layers.judge(rank, right)
            state.record.judge(rank, right)
        state.noted, state.prefetched = [], []
        state.pass_time()


class _Layer:
    """One layer: its record, the predictions that its next access will judge, and whether it pauses."""

    def __init__(self, top_k: int, waste_share: float):
        """waste_share: share of a read that a wasted prefetch costs."""
        stopped = AutoPrefetch.STOPPED if waste_share < 1 else 1
        self.top_k = top_k
        self.record = _Record(top_k, waste_share / (waste_share + AutoPrefetch.HIDDEN))
        self.charge = max(1, int(AutoPrefetch.READS_PER_WASTE * waste_share / stopped))
        self.noted: list[tuple[Candidate, int]] = []
        self.prefetched: list[Candidate] = []
        self.pause = 0
        self._trial = self._next_pause = AutoPrefetch.TRIAL

    def pass_time(self) -> None:
        """One access of the layer has passed."""
        if self.pause:
            self.pause -= 1
        elif any(self.record.trusted):
            self._trial = self._next_pause = AutoPrefetch.TRIAL
        elif self._trial:
            self._trial -= 1
        else:
            self.pause, self._trial = self._next_pause, AutoPrefetch.TRIAL
            self._next_pause = min(2 * self._next_pause, AutoPrefetch.LONGEST_PAUSE)


class _Record:
    """How often the predictions of each rank were right. The last entry, -1, is for steps of many tokens."""

    def __init__(self, top_k: int, enough: float):
        """enough: the share of right predictions from which prefetching pays."""
        self.enough = enough
        self.trusted = [enough < AutoPrefetch.ASSUMED] * (top_k + 1)
        self.judged = [0] * (top_k + 1)
        self._right = [0] * (top_k + 1)

    def judge(self, rank: int, right: bool) -> None:
        self.judged[rank] += 1
        self._right[rank] += right
        if self.judged[rank] >= AutoPrefetch.EVIDENCE:
            self.trusted[rank] = self._right[rank] >= self.enough * self.judged[rank]
        if self.judged[rank] >= 4 * AutoPrefetch.EVIDENCE:
            self.judged[rank] //= 2
            self._right[rank] //= 2


def build_prefetch(option: int | str, shape: CacheShape) -> PrefetchPolicy:
    """The policy of the option `prefetch`: a number of experts, or "auto", which is off for small experts."""
    if not isinstance(option, str):
        return PrefetchPolicy(option)
    if max(shape.expert_bytes) < WORTH_BYTES:
        return PrefetchPolicy(0)
    return AutoPrefetch(shape.top_k, shape.expert_bytes)
