"""Which missed experts get a slot, and which are computed without one.

Nothing moves. An expert that takes a slot costs the one that is forgotten for it. Whether that pays is not in their
scores alone: admitting only what counts for more than its victim does worse than admitting everything (gpt-oss-20b at 6
of 32 slots: 58.5 % of demands hit against 59.3 %), since what was just used is likelier to come back than its count
says. So it is learned: of every newcomer and the victim it would have replaced, whichever is demanded first was the one
to have. That costs no read, whatever was decided, and replay decides the same.

Bound: a few dictionary operations per miss. Must never see costs, clocks or tensors (rule R1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol


class AdmissionPolicy(Protocol):
    """Judges newcomers of one residency; keys are its own, scores those of its eviction policy."""

    evicts: bool
    """Whether anything is ever forgotten for a newcomer."""

    def on_access(self, keys: Sequence[int]) -> None:
        """One access demands these keys, resident or not."""

    def admits(self, newcomer: int, victim: int, newcomer_score: float, victim_score: float) -> bool:
        """Whether the newcomer should have the victim's slot. ."""

    def chance(self, newcomer: int, victim: int, newcomer_score: float, victim_score: float) -> float:
        """The share of such newcomers that are demanded before their victim."""


class WhileFree:
    """Slots are given away while there are free ones; nothing is forgotten for a newcomer."""

    evicts = False

    def on_access(self, keys: Sequence[int]) -> None:
        pass

    def admits(self, newcomer: int, victim: int, newcomer_score: float, victim_score: float) -> bool:
        return False

    def chance(self, newcomer: int, victim: int, newcomer_score: float, victim_score: float) -> float:
        return 0.0


class FirstDemanded:
    """Admits newcomers that, by experience with such a gain in score, are demanded again before their victim is.

    Gains are sorted into bins, finer near zero, each with its own experience, which fades: of `MEMORY` outcomes half
    are forgotten. Doubt admits (`ENOUGH` is below one half, and a bin begins with `PRIOR` outcomes for it): a victim
    that is passed over stays to be compared with the next newcomer, an expert that is forgotten is fetched at once when
    it is demanded, so errors of admitting heal sooner."""

    evicts = True
    ENOUGH, PRIOR, MEMORY = 0.47, 8.0, 256.0
    BINS_EACH_WAY, PER_DOUBLING = 12, 2

    def __init__(self) -> None:
        bins = 2 * self.BINS_EACH_WAY + 1
        self._newcomers_first = [self.PRIOR / 2] * bins
        self._outcomes = [self.PRIOR] * bins
        self._awaited: dict[int, tuple[int, int]] = {}
        """Newcomers of which neither they nor their victim has been demanded since: (victim, bin)."""
        self._against: dict[int, list[int]] = {}
        """Their victims, and the newcomers that are compared with each."""

    def on_access(self, keys: Sequence[int]) -> None:
        awaited, against = self._awaited, self._against
        if not awaited:
            return
        for key in keys:
            if key in awaited:
                victim, at = awaited.pop(key)
                against[victim].remove(key)
                if victim not in keys:
                    self._learn(at, 1.0)
            for newcomer in against.pop(key, ()):
                _, at = awaited.pop(newcomer)
                if newcomer not in keys:
                    self._learn(at, 0.0)

    def admits(self, newcomer: int, victim: int, newcomer_score: float, victim_score: float) -> bool:
        return self.chance(newcomer, victim, newcomer_score, victim_score) >= self.ENOUGH

    def chance(self, newcomer: int, victim: int, newcomer_score: float, victim_score: float) -> float:
        at = self._bin(
            0.0 if newcomer_score == victim_score else newcomer_score - victim_score
        )  # both may be minus infinity
        if newcomer in self._awaited:  # by another newcomer of the same access, or forgotten undemanded
            self._against[self._awaited[newcomer][0]].remove(newcomer)
        self._awaited[newcomer] = victim, at
        self._against.setdefault(victim, []).append(newcomer)
        return self._newcomers_first[at] / self._outcomes[at]

    def _learn(self, at: int, newcomer_first: float) -> None:
        self._newcomers_first[at] += newcomer_first
        self._outcomes[at] += 1.0
        if self._outcomes[at] >= self.MEMORY:
            self._newcomers_first[at] *= 0.5
            self._outcomes[at] *= 0.5

    def _bin(self, gain: float) -> int:
        most = self.BINS_EACH_WAY
        size = most if math.isinf(gain) else min(most, int(math.log2(1.0 + abs(gain)) * self.PER_DOUBLING))
        return most + (size if gain >= 0 else -size)


def build_admission(on_miss: str) -> AdmissionPolicy | None:
    """Of the option `on_miss`; None admits everything."""
    return None if on_miss == "fetch" else WhileFree() if on_miss == "cpu" else FirstDemanded()
