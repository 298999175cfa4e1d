"""Who gets a slot: learned from which of two is demanded first, without looking at what was decided."""

from __future__ import annotations

import math
import random

import pytest

from offmoe.policy.admission import AdmissionPolicy, FirstDemanded, build_admission


def judged(policy, gain, newcomer_first, times):
    """So many newcomers of this gain, each demanded before its victim or after; the last verdict."""
    for i in range(times):
        newcomer, victim = 2 * i, 2 * i + 1
        policy.admits(newcomer, victim, gain, 0.0)
        policy.on_access([newcomer if newcomer_first else victim])
    return policy.admits(-1, -2, gain, 0.0)


def test_what_is_unknown_is_admitted():
    policy = FirstDemanded()
    for gain in (-math.inf, -5.0, 0.0, 3.0, math.inf):
        assert policy.admits(1, 2, gain, 0.0)
    assert policy.admits(1, 2, -math.inf, -math.inf)


@pytest.mark.parametrize("gain", [-math.inf, -3.0, 0.0, 0.7, 40.0, math.inf])
def test_experience_decides_and_fades(gain):
    policy = FirstDemanded()
    assert not judged(policy, gain, newcomer_first=False, times=20)
    assert judged(policy, gain, newcomer_first=True, times=60)
    assert not judged(policy, gain, newcomer_first=False, times=600)


def test_gains_have_experience_of_their_own():
    policy = FirstDemanded()
    assert not judged(policy, -3.0, newcomer_first=False, times=20)
    assert policy.admits(1, 2, 3.0, 0.0)
    assert policy.admits(1, 2, -0.1, 0.0)


def test_both_at_once_says_nothing():
    policy = FirstDemanded()
    for _ in range(50):
        policy.admits(1, 2, 0.0, 1.0)
        policy.on_access([1, 2])
    assert policy.admits(1, 2, 0.0, 1.0)


def test_one_victim_of_many_newcomers():
    policy = FirstDemanded()
    for newcomer in range(10, 40):
        policy.admits(newcomer, 1, 0.0, 1.0)
    policy.on_access([1])
    assert not policy.admits(50, 1, 0.0, 1.0)


def test_what_is_awaited_stays_bounded_and_consistent():
    policy, chance = FirstDemanded(), random.Random(0)
    for _ in range(5000):
        policy.on_access(chance.sample(range(12), 2))
        policy.admits(chance.randrange(6), 6 + chance.randrange(6), chance.gauss(0, 2), 0.0)
        pairs = sorted((victim, newcomer) for newcomer, (victim, _) in policy._awaited.items())
        assert pairs == sorted((victim, newcomer) for victim, them in policy._against.items() for newcomer in them)
        assert len(policy._awaited) <= 6


def test_the_option():
    assert build_admission("fetch") is None
    policy = build_admission("cpu")
    assert type(policy) is AdmissionPolicy
    assert not policy.admits(1, 2, math.inf, 0.0)
    assert isinstance(build_admission("auto"), FirstDemanded)
