"""How slots in RAM are divided among layers. Runs with slots in RAM are tested in tests/test_host_tier.py."""

from __future__ import annotations

import pytest

from offmoe.budget.host import plan_host, share_out
from offmoe.config import OffloadConfig
from offmoe.errors import CapacityError
from offmoe.types import CacheShape


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


def test_a_refusal_names_the_option_only_where_it_helps():
    shape = CacheShape((8,), (2,), (4096,))

    def plan(free, **options):
        return plan_host(OffloadConfig(**options), shape, (2,), read_bytes=4096, free=free, taken=0)

    least = plan(1 << 30, host_memory=0).staging
    with pytest.raises(CapacityError, match="works: --host-memory"):
        plan(least, host_memory=1)
    for options in ({}, {"host_memory": 1 << 30}):
        with pytest.raises(CapacityError, match="works; 1 B more RAM must be free for it") as refused:
            plan(least - 1, **options)
        assert "--host-memory" not in str(refused.value)
