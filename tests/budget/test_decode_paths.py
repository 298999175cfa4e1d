"""Prices of decoding without the host: arithmetic by hand, and where no price is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offmoe.budget.decode_paths import decode_paths
from offmoe.budget.predict import ExpertForm, Rates
from offmoe.simulate.decode_prices import (
    OPERATIONS_PER_LAUNCHED,
    OPERATIONS_PER_LAYER,
    OPERATIONS_PER_MOE_LAYER,
    OPERATIONS_PER_TOKEN,
    ROUTED_LAUNCHES,
    SMALL_KERNEL_US,
    STOCK_MOE_OPERATIONS,
)
from offmoe.types import CacheShape
from tests.budget.test_predict import config, plan

SHAPE = CacheShape((8,) * 2, (2,) * 2, (10**6,) * 2)
FORM = ExpertForm(10**6, 2e6, by_kernels=True, is_decoded=True, itemsize=2, dense_bytes=10**6, layers=2, moe_layers=2)
RATES = Rates("a test", dense_gb_s=1.0, torch_gb_s=1.0, kernel_gb_s=1.0, disk_gb_s=1.0, link_gb_s=1.0, host_gb_s=1.0)
KERNELS = OPERATIONS_PER_TOKEN + 2 * (OPERATIONS_PER_LAYER + STOCK_MOE_OPERATIONS + ROUTED_LAUNCHES)
DEVICE_US = 1000.0 + 2 * 2 * 1000.0
"""The dense bytes, and two experts of each of two layers."""


def test_by_hand() -> None:
    """Everything is resident: host and device take turns, or the longer of both counts, or small kernels alone."""
    found = decode_paths(SHAPE, config(8), plan((8, 8)), FORM, replace(RATES, operation_us=100.0))
    assert found is not None
    operations = OPERATIONS_PER_TOKEN + 2 * (OPERATIONS_PER_LAYER + OPERATIONS_PER_MOE_LAYER)
    assert found.eager == pytest.approx(1e6 / (DEVICE_US + 100 * (operations + 4 * OPERATIONS_PER_LAUNCHED)))
    assert found.lag_1 == pytest.approx(1e6 / (100 * KERNELS))
    assert found.captured == pytest.approx(1e6 / (DEVICE_US + SMALL_KERNEL_US * KERNELS))
    quick_host = decode_paths(SHAPE, config(8), plan((8, 8)), FORM, replace(RATES, operation_us=2.0))
    assert quick_host is not None
    assert quick_host.lag_1 == quick_host.captured == found.captured, "the device takes longer than the host"
    assert all(key.startswith("predicted_") for key in found.to_dict())


def test_misses_cost_all_three() -> None:
    whole = decode_paths(SHAPE, config(8), plan((8, 8)), FORM, RATES)
    half = decode_paths(SHAPE, config(4), plan((4, 4), (8, 8)), FORM, RATES)
    assert whole is not None
    assert half is not None
    assert half.eager < whole.eager
    assert half.captured < whole.captured
    assert half.eager < half.lag_1 <= half.captured


@pytest.mark.parametrize(
    ("slots", "scope", "offloaded", "form", "rates"),
    [
        (3, "layer", 0, FORM, RATES),  # fewer than 2 top_k
        (4, "model", 0, FORM, RATES),
        (4, "layer", 1, FORM, RATES),
        (4, "layer", 0, FORM._replace(by_kernels=False), RATES),
        (4, "layer", 0, FORM, replace(RATES, link_gb_s=None)),
    ],
)
def test_no_price_where_victims_cannot_be_named(
    slots: int, scope: str, offloaded: int, form: ExpertForm, rates: Rates
) -> None:
    assert decode_paths(SHAPE, config(slots, scope), plan((slots, slots), (8, 8), offloaded), form, rates) is None
