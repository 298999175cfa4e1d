"""Estimates tokens per second before anything has run, from measured costs and made-up routing.

Real routing lies between two cases that need no recording: every demand hits, and every expert is equally likely. A
tuned profile adds the hit rate of a recorded routing, valid for the slots that it was tuned to. An estimate takes a few
hundred plans per layer and must never be presented as a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from offmoe.config import CacheOptions
from offmoe.profile import CostModel, Profile
from offmoe.simulate.replay import Recording
from offmoe.simulate.sweep import Settings, Totals, evaluate
from offmoe.trace.trace import NONE, Trace
from offmoe.types import CacheShape

FILLING_TOKENS, TOKENS = 128, 128
"""Tokens of the made-up routing: first those that fill the cache, then those that count."""


@dataclass(frozen=True)
class Expectation:
    """Estimated decoding speed, in tokens per second.

    Attributes:
        bound: if every demand hits.
        uniform: if every expert is equally likely.
        uniform_hit_rate: the hit rate of `uniform`.
        roofline: as `uniform`, if device, path and host never waited for each other.
        tuned: at the hit rate that the profile was tuned to. None if it was tuned for other slots, or not at all.
        tuned_hit_rate: the hit rate of `tuned`.
    """

    bound: float
    uniform: float
    uniform_hit_rate: float
    roofline: float
    tuned: float | None
    tuned_hit_rate: float | None

    @property
    def likely(self) -> float:
        """The estimate to show if only one can be shown."""
        return self.uniform if self.tuned is None else self.tuned


def expect(shape: CacheShape, options: CacheOptions, profile: Profile) -> Expectation:
    """Estimate the decoding speed of a model with one cache. profile: must have costs."""
    assert profile.costs is not None
    settings = Settings(profile.costs, test_requests=frozenset({1}))
    totals = evaluate(Recording(_uniform(shape)), options, settings).test
    assert totals.tokens_per_s is not None
    hit_rate = tuned_hit_rate(shape, options, profile)
    return Expectation(
        bound=1 / _token_s(shape, profile.costs, 1.0),
        uniform=totals.tokens_per_s,
        uniform_hit_rate=totals.stats.hit_rate,
        roofline=totals.tokens / max(_busy_s(shape, options, profile.costs, totals)),
        tuned=None if hit_rate is None else 1 / _token_s(shape, profile.costs, hit_rate),
        tuned_hit_rate=hit_rate,
    )


def _busy_s(shape: CacheShape, options: CacheOptions, costs: CostModel, totals: Totals) -> tuple[float, float, float]:
    """Seconds that the device, the path and the host would each take if they never waited for each other."""
    stats, largest = totals.stats, max(shape.expert_bytes)
    on_host = stats.host_computed if options.miss_costs is not None else 0
    requests_us = (stats.misses - on_host) * costs.fetch_us
    experts_us = (stats.demands - on_host) * costs.expert_us_device
    device_us = totals.tokens * costs.dense_us_per_token + experts_us + requests_us
    link_us = 0.0 if costs.h2d_gb_s is None else stats.h2d_bytes / costs.h2d_gb_s / 1e3
    disk_us = stats.disk_bytes / costs.disk_gb_s / 1e3
    host_us = on_host * costs.miss_costs(largest).host_us
    return max(device_us, 1e-3) * 1e-6, max(link_us, disk_us) * 1e-6, host_us * 1e-6


def _token_s(shape: CacheShape, costs: CostModel, hit_rate: float) -> float:
    """Seconds per token if computing and fetching never overlap."""
    computing_us = costs.dense_us_per_token + costs.expert_us_device * sum(shape.top_k)
    fetches = zip(shape.top_k, shape.expert_bytes, strict=True)
    fetching_s = sum(k * (costs.fetch_us * 1e-6 + costs.fetch_s(nbytes)) for k, nbytes in fetches)
    return max(computing_us * 1e-6 + (1 - hit_rate) * fetching_s, 1e-9)


def tuned_hit_rate(shape: CacheShape, options: CacheOptions, profile: Profile) -> float | None:
    """The hit rate that a profile was tuned to; None if it was tuned for other slots, or not at all."""
    cache: Mapping[str, object] = profile.cache
    slots, rate = cache.get("slots_per_layer"), profile.expected.get("test_hit_rate")
    if slots is None or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        return None
    tuned_for = (slots,) * shape.layers if isinstance(slots, int) else tuple(slots)  # type: ignore[arg-type]
    return float(rate) if tuned_for == options.quotas(shape) else None


def _uniform(shape: CacheShape) -> Trace:
    """Two requests of single-token steps with evenly drawn experts: the first fills the cache, the second counts."""
    tokens = FILLING_TOKENS + TOKENS
    rng = np.random.default_rng(0)
    experts = np.full((tokens, shape.layers, max(shape.top_k)), NONE, np.int16)
    for layer, (num_experts, top_k) in enumerate(zip(shape.experts, shape.top_k, strict=True)):
        order = rng.random((tokens, num_experts)).argsort(axis=1)
        experts[:, layer, :top_k] = order[:, :top_k]
    request = (np.arange(tokens) >= FILLING_TOKENS).astype(np.int32)
    return Trace("", shape, experts, request=request, step=np.arange(tokens, dtype=np.int32))
