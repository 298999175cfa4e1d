"""How slots in RAM are divided among layers. Runs with slots in RAM are tested in tests/test_host_tier.py."""

from __future__ import annotations

import pytest

from offmoe.budget.host import share_out


@pytest.mark.parametrize(
    ("slots", "wanted", "shares"),
    [
        (7, [8, 8, 8], (3, 2, 2)),
        (7, [0, 8, 2], (0, 5, 2)),
        (100, [3, 0, 5], (3, 0, 5)),
        (0, [4, 4], (0, 0)),
        (1, [4, 4], (1, 0)),
    ],
)
def test_slots_are_shared_out_equally(slots, wanted, shares):
    assert share_out(slots, wanted) == shares
