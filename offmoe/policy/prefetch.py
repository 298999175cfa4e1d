"""Which predictions to act on, and when to stop.

Nothing moves. A prefetch that the next access of its layer does not demand is a read for nothing, which delays what is
demanded. How much time a right one saves depends on how long computing takes beside a read, which counts do not know.
So "auto" assumes little (`HIDDEN`) and holds on to what is true of any machine: a read is stopped when it turns out to
be for nothing, and has cost computing a few MB by then, which of a small expert is all of it. What is lost by that is
kept below one in `READS_PER_WASTE` of the reads that were needed, and below a few of them where reads can be stopped,
since then it is lost only where the disk is what computing waits for.

Whether predictions are good is learned without reading: a prediction that is only noted is as right or wrong as one
that is fetched. Only where one right in two is more than enough are they acted on before that is known.
Counts only, no clocks (rule R1): replay takes the same decisions. State is plain integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from offmoe.io_limits import stop_share
from offmoe.types import CacheShape

WORTH_BYTES = 1 << 20
"""Of one expert. Foretelling takes a norm, a router and a ranking, some 0.1 ms per layer; of the demo model's experts,
196 KB, it made decoding 6.4 % slower (3.0 to 13.9, tools/bench/prefetch_live.py) for reads of 0.15 ms.
"""


class Candidate(NamedTuple):
    """A predicted expert without a slot, and its place among the predicted, 0 the most wanted."""

    rank: int
    expert: int


class PrefetchPolicy(Protocol):
    def wants_prediction(self, layer: int) -> bool:
        """Whether a prediction for `layer` would be used now, be it only to learn how good it is."""

    def choose(self, layer: int, candidates: Sequence[Candidate], *, single: bool) -> Sequence[Candidate]:
        """Those to fetch ahead for the next access of `layer`. single: for a step of one token."""

    def issued(self, layer: int, count: int) -> None:
        """So many of those chosen for `layer`, the first, were started."""

    def on_access(self, layer: int, experts: Sequence[int], misses: int) -> None:
        """`layer` demands these experts now, of which so many have no slot."""


class FixedPrefetch:
    """At most `count` experts per layer, always; 0 is off."""

    def __init__(self, count: int):
        self._count = count

    def wants_prediction(self, layer: int) -> bool:
        return self._count > 0

    def choose(self, layer: int, candidates: Sequence[Candidate], *, single: bool) -> Sequence[Candidate]:
        return candidates[: self._count]

    def issued(self, layer: int, count: int) -> None:
        pass

    def on_access(self, layer: int, experts: Sequence[int], misses: int) -> None:
        pass


class AutoPrefetch:
    """At most top_k experts per layer: those of the places that have proven precise, while few reads are for nothing.

    Layers differ, and so do places within a layer's prediction (of the demo model's misses at 2 of 8 slots the first
    is right in .64 to .98 by layer, the second in .47 to .78), so each (layer, place) is judged by itself, and steps of
    many tokens apart from those of one; as long as little is known of it, by this place in all layers. It is trusted
    while what the right ones hide is worth what the wrong ones cost, and at first when it is better than that by
    `MARGIN`. A layer that has no trusted place after `TRIAL` accesses asks for no predictions for a while, which
    doubles each time."""

    HIDDEN, MARGIN = 0.25, 0.1
    """Of the time of a read, what computing hides; of predictions, 0.8 must be right where reads cannot be stopped."""
    ASSUMED = 0.5
    """Of predictions, those that are right, until it is known. Models give 0.47 to 0.98, routers of random weights 0.5
    to 0.8."""
    EVIDENCE, MEMORY = 24, 96
    """Predictions that a place is judged by, at least and at most."""
    TRIAL = 128
    PAUSE, LONGEST = 128, 2048
    """Accesses of the layer."""
    READS_PER_WASTE, BURST = 64, 16
    STOPPED = 4
    """By so much less again does a read for nothing count that can be stopped."""

    def __init__(self, top_k: tuple[int, ...], expert_bytes: tuple[int, ...]):
        lost = [stop_share(nbytes) for nbytes in expert_bytes]
        self._places = [_Places(k, n / (n + self.HIDDEN)) for k, n in zip(top_k, lost, strict=True)]
        self._waste = [max(1, int(self.READS_PER_WASTE * n / (self.STOPPED if n < 1 else 1))) for n in lost]
        """Of a read for nothing, in units of 1 / READS_PER_WASTE of a read."""
        self._of_all = _Places(max(top_k), max(places.enough for places in self._places))
        """All layers together: what a place is judged by while its own layer knows too little of it."""
        self._allowed = 0
        """In these units; those under way count as for nothing."""

    def wants_prediction(self, layer: int) -> bool:
        return self._places[layer].pause == 0

    def choose(self, layer: int, candidates: Sequence[Candidate], *, single: bool) -> Sequence[Candidate]:
        places = self._places[layer]
        if places.pause:
            return ()
        places.single = single
        places.waiting = candidates[: places.top_k]
        places.fetched = [c for c in places.waiting if self._trusts(places, places.of(c))]
        del places.fetched[max(0, self._allowed) // self._waste[layer] :]
        return places.fetched

    def issued(self, layer: int, count: int) -> None:
        self._allowed -= count * self._waste[layer]

    def on_access(self, layer: int, experts: Sequence[int], misses: int) -> None:
        places = self._places[layer]
        if places.waiting:
            used = sum([c.expert in experts for c in places.fetched])
            misses += used
            self._allowed += used * self._waste[layer]
            self._of_all.single, self._of_all.waiting = places.single, places.waiting
            self._of_all.judge(experts)
            places.judge(experts)
        self._allowed = min(self._allowed + misses, self.BURST * self.READS_PER_WASTE)
        places.pass_time()

    def _trusts(self, places: _Places, place: int) -> bool:
        if places.knows(place):
            return places.trusted[place]
        return self._of_all.trusted[place if places.single else -1]


class _Places:
    """What is known of the predictions for one layer, or for all."""

    def __init__(self, top_k: int, enough: float):
        """enough: the share of right predictions below which a place is not trusted."""
        self.top_k = top_k
        self.enough = enough
        sure = enough + AutoPrefetch.MARGIN <= AutoPrefetch.ASSUMED
        self.trusted = [sure] * (top_k + 1)  # by place; the last: all places of steps of many tokens
        self.pause = 0
        self.single = True
        self.waiting: Sequence[Candidate] = ()
        self.fetched: list[Candidate] = []
        self._judged = [0] * (top_k + 1)
        self._right = [0] * (top_k + 1)
        self._trial = AutoPrefetch.TRIAL
        self._next_pause = AutoPrefetch.PAUSE

    def of(self, candidate: Candidate) -> int:
        """The place that a candidate is judged as."""
        return min(candidate.rank, self.top_k - 1) if self.single else self.top_k

    def knows(self, place: int) -> bool:
        """Whether there have been enough predictions of it to judge it by itself."""
        return self._judged[place] >= AutoPrefetch.EVIDENCE

    def judge(self, experts: Sequence[int]) -> None:
        """The candidates that wait were for an access that demands these experts."""
        judged, right = self._judged, self._right
        for candidate in self.waiting:
            place = self.of(candidate)
            judged[place] += 1
            right[place] += candidate.expert in experts
            if judged[place] >= AutoPrefetch.EVIDENCE:
                bar = self.enough + AutoPrefetch.MARGIN * (not self.trusted[place])
                self.trusted[place] = right[place] >= bar * judged[place]
            if judged[place] >= AutoPrefetch.MEMORY:
                judged[place] //= 2
                right[place] //= 2
        self.waiting, self.fetched = (), []

    def pass_time(self) -> None:
        """One access of the layer."""
        if self.pause:
            self.pause -= 1
        elif any(self.trusted):
            self._trial, self._next_pause = AutoPrefetch.TRIAL, AutoPrefetch.PAUSE
        elif self._trial:
            self._trial -= 1
        else:
            self.pause, self._trial = self._next_pause, AutoPrefetch.TRIAL
            self._next_pause = min(2 * self._next_pause, AutoPrefetch.LONGEST)


def build_prefetch(option: int | str, shape: CacheShape) -> PrefetchPolicy:
    """Of the option `prefetch`: a number, or "auto", which leaves experts alone that are read as fast as foretold."""
    if not isinstance(option, str):
        return FixedPrefetch(option)
    return AutoPrefetch(shape.top_k, shape.expert_bytes) if max(shape.expert_bytes) >= WORTH_BYTES else FixedPrefetch(0)
