"""Measured costs corrected by how long decoding took: so that the simulator's time is the machine's.

Nothing moves. What is measured apart (profile.py) leaves out how parts disturb each other: threads that take turns,
memory that is shared. A few factors make up for that: of computing, of reading, of the link, of computing on the host,
and the time that every fetch takes from computing. They are those with which the clock of the simulator comes closest
to the seconds of recorded steps and to what those spent waiting; the costs as measured count as much as one step.
Bound: some tens of replays of the steps given, under a second.

For between generations; must never reach a plan of the run that was measured (rule R1: costs are constants of a run).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from offmoe.profile import CostModel
from offmoe.simulate.clock import Clock
from offmoe.types import Access, CacheShape, Plan

PRIOR_STEPS = 1.0
"""Steps that the measured costs count as much as: they decide what the steps leave open, and little else."""
USUAL = 4.0
"""A step that is off by more than so many times the median has met something else, and pulls no more than if it were
not."""
FINEST = 0.01
"""Of a step's time: what it may be off by and still be usual."""
ROUNDS, HALVINGS, NEAR = 20, 5, 2e-3
"""Of the search, of its steps that lead nowhere, and the change at which it ends."""
NUDGE = 0.02
FARTHEST = 0.7
"""In one round of the search: a factor of two."""
MOST = 4.0
"""Every factor stays within e to this power of what was measured."""


class TimedStep(NamedTuple):
    """One forward pass of a single row: what each layer asked for and what was done about it; seconds, and how many of
    them computing waited for experts."""

    layers: tuple[tuple[Access, Plan], ...]
    seconds: float
    stall_s: float


def corrected(costs: CostModel, shape: CacheShape, steps: Sequence[TimedStep]) -> CostModel:
    """`costs` such that `steps`, consecutive ones of a run, take the time they took; as they are without any steps."""
    if not steps:
        return costs
    factors = _factors(costs, shape, steps)
    measured = np.array([(step.seconds, step.stall_s) for step in steps])

    def off(at: np.ndarray) -> np.ndarray:
        """Seconds by which prices are above what was measured, of steps and of waiting in them: [steps, 2]."""
        above: np.ndarray = _priced(_apply(costs, factors, at), shape, steps) - measured
        return above

    at, here = np.zeros(len(factors)), off(np.zeros(len(factors)))
    least = [factor.least for factor in factors]
    finest = FINEST * float(measured[:, 0].mean())
    for _ in range(ROUNDS):
        usual = USUAL * max(finest, float(np.median(np.abs(here[:, 0]))))
        pull = np.sqrt(usual / np.maximum(usual, np.abs(here)))
        slopes = [(pull * (off(at + NUDGE * one) - here)).ravel() / NUDGE for one in np.eye(len(factors))]
        columns = np.stack(slopes, axis=1)  # [2 * steps, factors]
        prior = np.sqrt(PRIOR_STEPS / len(steps)) * np.linalg.norm(columns, axis=0)
        target = np.concatenate([(pull * here).ravel(), prior * at])
        change = -np.linalg.lstsq(np.vstack([columns, np.diag(prior)]), target, rcond=None)[0]
        change = (at + change.clip(-FARTHEST, FARTHEST)).clip(least, MOST) - at
        for _ in range(HALVINGS):  # waiting has edges, beyond which slopes are others
            there = off(at + change)
            if np.linalg.norm(np.concatenate([(pull * there).ravel(), prior * (at + change)])) < np.linalg.norm(target):
                at, here = at + change, there
                break
            change = change / 2
        else:
            break
        if np.abs(change).max() < NEAR:
            break
    return _rounded(_apply(costs, factors, at))


class _Factor(NamedTuple):
    """One of the numbers that are found: apply(costs, number); 0 leaves costs as they are."""

    apply: Callable[[CostModel, float], CostModel]
    least: float = -MOST


def _factors(costs: CostModel, shape: CacheShape, steps: Sequence[TimedStep]) -> list[_Factor]:
    """Those that these steps can say something about."""
    plans = [plan for step in steps for _, plan in step.layers]
    moved = [fetch for plan in plans for wave in plan.waves for fetch in wave.fetches]
    moved += [fetch for plan in plans for fetch in plan.prefetches]
    by_host = [fetch for plan in plans for wave in plan.on_host for fetch in wave.fetches]
    factors = [_Factor(_computing)]
    if any(fetch.read for fetch in (*moved, *by_host)):
        factors.append(_Factor(_reading))
    if costs.h2d_gb_s is not None and not all(fetch.read for fetch in moved):
        factors.append(_Factor(_link))
    if by_host:
        factors.append(_Factor(_host))
    if moved:
        unit_us = max(1.0, costs.fetch_s(max(shape.expert_bytes)) * 1e6)  # so that 1 is a large change here too
        factors.append(
            _Factor(lambda c, by: replace(c, fetch_us=max(0.0, c.fetch_us + by * unit_us)), -costs.fetch_us / unit_us)
        )
    return factors


def _computing(costs: CostModel, by: float) -> CostModel:
    on_device = ("expert_us_device", "expert_us_device_4", "expert_us_device_overlapped", "expert_us_landed")
    return _scaled(costs, by, "dense_us_per_token", *on_device)


def _reading(costs: CostModel, by: float) -> CostModel:
    slower = _scaled(costs, -by, "disk_gb_s", "disk_gb_s_overlapped", "ram_gb_s")
    return _scaled(slower, by, "read_latency_us")


def _link(costs: CostModel, by: float) -> CostModel:
    return _scaled(costs, -by, "h2d_gb_s", "h2d_gb_s_overlapped")


def _host(costs: CostModel, by: float) -> CostModel:
    return _scaled(costs, by, "expert_us_host", "expert_us_host_4", "expert_us_host_overlapped")


def _scaled(costs: CostModel, by: float, *names: str) -> CostModel:
    """Those of these figures that there are, times e to the power of `by`."""
    there = {name: getattr(costs, name) for name in names}
    return replace(costs, **{name: value * math.exp(by) for name, value in there.items() if value is not None})


def _apply(costs: CostModel, factors: Sequence[_Factor], at: np.ndarray) -> CostModel:
    for factor, number in zip(factors, at.tolist(), strict=True):
        costs = factor.apply(costs, number)
    return costs


def _rounded(costs: CostModel) -> CostModel:
    """To four digits."""
    return CostModel.from_dict({name: float(f"{value:.4g}") for name, value in costs.to_dict().items()})


def _priced(costs: CostModel, shape: CacheShape, steps: Sequence[TimedStep]) -> np.ndarray:
    """[steps, 2]: seconds of each step and of waiting in it."""
    clock = Clock(costs, shape)
    times = [(0.0, 0.0)]
    for step in steps:
        for access, plan in step.layers:
            clock.add(access, plan, 1)
        times.append((clock.now_s, clock.stall_s))
    return np.diff(np.array(times), axis=0)
