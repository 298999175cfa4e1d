"""Prices of decoding a recording without the host: arithmetic by hand, and where there is no price."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from offmoe.config import CacheOptions
from offmoe.profile import CostModel
from offmoe.simulate.decode_prices import (
    OPERATION_US,
    OPERATIONS_PER_LAUNCHED,
    OPERATIONS_PER_LAYER,
    OPERATIONS_PER_MOE_LAYER,
    OPERATIONS_PER_TOKEN,
    SMALL_KERNEL_US,
    decode_prices,
    kernels_per_token,
)
from offmoe.simulate.replay import Recording
from offmoe.trace.trace import Trace
from offmoe.types import CacheShape

SHAPE = CacheShape((8,) * 2, (2,) * 2, (10**6,) * 2)
OPERATIONS = OPERATIONS_PER_TOKEN + 2 * (OPERATIONS_PER_LAYER + OPERATIONS_PER_MOE_LAYER)
COSTS = CostModel(
    disk_gb_s=1.0,
    expert_us_device=100.0 + OPERATIONS_PER_LAUNCHED * OPERATION_US,
    dense_us_per_token=5000.0 + OPERATIONS * OPERATION_US,
    h2d_gb_s=10.0,
)


def recording(same: bool) -> Recording:
    """Forty steps of one token; same: always the same experts."""
    ids = np.array([[(t * (not same) * 3 + i) % 8 for i in range(2)] for t in range(40)], np.int16)  # [40, 2]
    experts = np.stack([ids, ids], axis=1)
    steps = np.arange(40, dtype=np.int32)
    return Recording(Trace("made", SHAPE, experts=experts, request=np.zeros(40, np.int32), step=steps))


def test_by_hand() -> None:
    """All but the first step are hits: host and device take turns, or the device alone counts."""
    found = decode_prices(recording(same=True), CacheOptions(slots_per_layer=8), COSTS)
    assert found is not None
    device_us, fetch_us = 5000.0 + 4 * 100.0, 2 * 2 * 1000.0 / 40
    launched = OPERATIONS * OPERATION_US + 4 * OPERATIONS_PER_LAUNCHED * OPERATION_US
    assert 1e6 / found.eager == pytest.approx(device_us + launched + fetch_us, rel=0.02)
    kernels = kernels_per_token(2, 2)
    assert 1e6 / found.captured == pytest.approx(device_us + kernels * SMALL_KERNEL_US + fetch_us, rel=0.02)
    assert found.lag_1 == min(found.captured, 1e6 / (kernels * OPERATION_US))
    assert all(key.startswith("predicted_") for key in found.to_dict())


def test_misses_cost_all_ways() -> None:
    hits, misses = (decode_prices(recording(same), CacheOptions(slots_per_layer=4), COSTS) for same in (True, False))
    assert hits is not None
    assert misses is not None
    assert all(slow < fast for slow, fast in zip(misses, hits, strict=True))


@pytest.mark.parametrize(
    ("options", "costs"),
    [
        (CacheOptions(slots_per_layer=3), COSTS),
        (CacheOptions(slots_per_layer=4, scope="model"), COSTS),
        (CacheOptions(slots_per_layer=4), replace(COSTS, h2d_gb_s=None)),
        (CacheOptions(slots_per_layer=4), None),
    ],
)
def test_no_price_where_victims_cannot_be_named(options: CacheOptions, costs: CostModel | None) -> None:
    assert decode_prices(recording(same=True), options, costs) is None
