"""Tokens per second to expect before anything has run: measured costs on routings that can be made up.

Nothing moves. Bound: a few hundred plans per layer. Real routing lies between two cases that need no recording: every
demand is resident, and every expert is as likely as the others. A tuned profile brings the hit rate of a recorded
routing, for its own slots. Must never pass for a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from offmoe.config import CacheOptions
from offmoe.profile import CostModel, Profile
from offmoe.simulate.replay import Recording
from offmoe.simulate.sweep import Part, Settings, evaluate
from offmoe.trace.trace import NONE, Trace
from offmoe.types import CacheShape

FILLING_TOKENS, TOKENS = 128, 128
"""Of the made-up routing: those that fill the cache, and those that count after them."""


@dataclass(frozen=True)
class Expectation:
    """Tokens per second of decoding. bound: nothing is missed. uniform: every expert is equally likely; roofline: the
    same if device, way in and host never waited for each other. tuned: at the hit rate that the profile was tuned to;
    None if it was tuned for other slots, or not at all."""

    bound: float
    uniform: float
    uniform_hit_rate: float
    roofline: float
    tuned: float | None
    tuned_hit_rate: float | None

    @property
    def likely(self) -> float:
        """The one figure to show if only one can be."""
        return self.uniform if self.tuned is None else self.tuned


def expect(shape: CacheShape, options: CacheOptions, profile: Profile) -> Expectation:
    """What decoding would reach; profile: with costs."""
    assert profile.costs is not None
    settings = Settings(profile.costs, test_requests=frozenset({1}))
    found = evaluate(Recording(_uniform(shape)), options, settings).test
    assert found.tokens_per_s is not None
    hit_rate = _tuned_hit_rate(shape, options, profile)
    return Expectation(
        bound=1 / _seconds(shape, profile.costs, 1.0),
        uniform=found.tokens_per_s,
        uniform_hit_rate=found.stats.hit_rate,
        roofline=found.tokens / max(_busy_s(shape, options, profile.costs, found)),
        tuned=None if hit_rate is None else 1 / _seconds(shape, profile.costs, hit_rate),
        tuned_hit_rate=hit_rate,
    )


def _busy_s(shape: CacheShape, options: CacheOptions, costs: CostModel, part: Part) -> tuple[float, float, float]:
    """Seconds that computing on the device, the way in and computing beside a device would take by themselves."""
    stats, largest = part.stats, max(shape.expert_bytes)
    on_host = stats.host_computed if options.miss_costs is not None else 0
    fetched = (stats.misses - on_host) * costs.fetch_us
    device = part.tokens * costs.dense_us_per_token + (stats.demands - on_host) * costs.expert_us_device + fetched
    link = 0.0 if costs.h2d_gb_s is None else stats.h2d_bytes / costs.h2d_gb_s / 1e3
    disk = stats.disk_bytes / costs.disk_gb_s / 1e3
    host = on_host * costs.miss_costs(largest).host_us
    return max(device, 1e-3) * 1e-6, max(link, disk) * 1e-6, host * 1e-6


def _seconds(shape: CacheShape, costs: CostModel, hit_rate: float) -> float:
    """Of a token, as if nothing were computed while experts arrive."""
    computing = costs.dense_us_per_token + costs.expert_us_device * sum(shape.top_k)
    fetches = zip(shape.top_k, shape.expert_bytes, strict=True)
    fetching = sum(k * (costs.fetch_us * 1e-6 + costs.fetch_s(nbytes)) for k, nbytes in fetches)
    return max(computing * 1e-6 + (1 - hit_rate) * fetching, 1e-9)


def _tuned_hit_rate(shape: CacheShape, options: CacheOptions, profile: Profile) -> float | None:
    cache: Mapping[str, object] = profile.cache
    slots, rate = cache.get("slots_per_layer"), profile.expected.get("test_hit_rate")
    if slots is None or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        return None
    tuned_for = (slots,) * shape.layers if isinstance(slots, int) else tuple(slots)  # type: ignore[arg-type]
    return float(rate) if tuned_for == options.quotas(shape) else None


def _uniform(shape: CacheShape) -> Trace:
    """Two requests of single-token steps whose experts are drawn evenly: one to fill the cache, one to count."""
    tokens = FILLING_TOKENS + TOKENS
    chance = np.random.default_rng(0)
    experts = np.full((tokens, shape.layers, max(shape.top_k)), NONE, np.int16)
    for layer, (num_experts, top_k) in enumerate(zip(shape.experts, shape.top_k, strict=True)):
        order = chance.random((tokens, num_experts)).argsort(axis=1)
        experts[:, layer, :top_k] = order[:, :top_k]
    request = (np.arange(tokens) >= FILLING_TOKENS).astype(np.int32)
    return Trace("", shape, experts, request=request, step=np.arange(tokens, dtype=np.int32))
