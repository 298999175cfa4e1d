"""Which missed experts get a slot, and which are computed without one.

An expert that takes a slot costs the slot of a victim. Scores alone do not tell whether that pays: admitting only what
scores higher than its victim hits less than admitting everything (gpt-oss-20b with 6 of 32 slots: 58.5 % of demands
against 59.3 %), since an expert that was just demanded is likelier to return than its count says. So it is learned: of
a newcomer and the victim that it would replace, the one that is demanded first was worth the slot. Learning costs no
read, whatever was decided, and needs neither costs nor clocks, so a replay decides the same.

Cost: a few dictionary operations per miss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


class AdmissionPolicy:
    """Judges whether a missing expert (the newcomer) should take the slot of the eviction policy's victim.

    This one serves on_miss="cpu": newcomers get slots only while slots are free.
    """

    evicts = False
    """Whether a newcomer may ever evict anything."""

    def on_access(self, keys: Sequence[int]) -> None:
        """A layer demands these keys, resident or not."""

    def admits(self, newcomer: int, victim: int, newcomer_score: float, victim_score: float) -> bool:
        """Whether the newcomer should get the victim's slot. Scores are those of the eviction policy."""
        return False

    def chance(self, newcomer: int, victim: int, newcomer_score: float, victim_score: float) -> float:
        """The share of comparable newcomers that are demanded before their victim, 0 to 1."""
        return 0.0


class FirstDemanded(AdmissionPolicy):
    """on_miss="auto": admits newcomers if enough newcomers like them were demanded before their victims.

    Newcomers are alike if their gain in score falls into the same bin; bins are finer near zero. Experience fades.
    Doubt admits: a victim that stays is compared with the next newcomer, and an expert that was evicted wrongly is
    fetched when it is demanded, so mistakes of admitting heal sooner.
    """

    evicts = True
    ENOUGH = 0.47
    """Share of newcomers demanded first from which a bin admits. On gpt-oss-20b it hits 0.7 points more of the demands
    than "fetch" at 6 of 32 slots, 0.2 at 8, and no less at 16 (tests/policy/test_planner.py)."""
    PRIOR = 8.0
    """Outcomes that a bin starts with, half of them for the newcomer."""
    MEMORY = 256.0
    """Outcomes of a bin at which all of them are halved."""
    BINS_EACH_WAY, PER_DOUBLING = 12, 2
    """Bins for gains below zero and above it, and bins per doubling of 1 + the gain."""

    def __init__(self) -> None:
        bins = 2 * self.BINS_EACH_WAY + 1
        self._newcomers_first = [self.PRIOR / 2] * bins
        self._outcomes = [self.PRIOR] * bins
        self._awaited: dict[int, tuple[int, int]] = {}
        """By newcomer, (victim, bin), until the newcomer or its victim is demanded."""
        self._against: dict[int, list[int]] = {}
        """By victim, the newcomers that are compared with it."""

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
        # Equal scores may both be minus infinity, whose difference is no number.
        at = self._bin(0.0 if newcomer_score == victim_score else newcomer_score - victim_score)
        if newcomer in self._awaited:  # compared before, with an outcome that is still open
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
    """The admission policy of the option `on_miss`; None if every miss gets a slot."""
    return None if on_miss == "fetch" else AdmissionPolicy() if on_miss == "cpu" else FirstDemanded()
