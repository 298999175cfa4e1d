"""The nearest way where nothing of what was asked for fits: what gives way, and that the way fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from offmoe.budget.choices import choices, rated_costs
from offmoe.budget.inspect import survey
from offmoe.budget.nearest import nearest
from offmoe.budget.predict import Rates
from offmoe.config import OffloadConfig
from offmoe.device.machines import parse_machine
from offmoe.device.planned import PlannedBackend

QWEN = Path(__file__).parents[1] / "data" / "configs" / "qwen3-30b-a3b.json"
MACHINE = parse_machine("rtx-3060-12g+ddr4-3200-64g+nvme-gen4")
COSTS = rated_costs(Rates.of_machine(MACHINE))


@pytest.mark.parametrize(
    ("options", "dropped", "changed"),
    [
        ({"max_context": 10**6}, ("max_context",), set()),
        ({"slots_per_layer": 128}, ("slots_per_layer",), set()),
        ({"slots_per_layer": 128, "max_context": 10**6}, ("max_context", "slots_per_layer"), set()),
        ({"prefill_chunk": 40_000, "device_memory": "2GiB"}, ("prefill_chunk",), set()),
        ({"host_memory": "1MiB"}, ("host_memory",), set()),
        ({"device_memory": "64MiB"}, (), {"device_memory"}),
        ({"device_memory": "64MiB", "max_context": 1000}, (), {"device_memory"}),
    ],
)
def test_as_little_as_possible_changes(options: dict[str, object], dropped: tuple[str, ...], changed: set[str]) -> None:
    asked = OffloadConfig(exactness="bitwise", experts="native", **options)  # type: ignore[arg-type]
    found = survey(QWEN, asked, dtype="bfloat16", backend=PlannedBackend(MACHINE))
    assert not any(way.fits for way in choices(found, asked, COSTS)), "the case asks for too little"
    way = nearest(found, asked, COSTS)
    assert way is not None
    assert (way.dropped, set(way.options)) == (dropped, changed)
    assert way.fits
    assert way.unchanged
    assert way.plan.used <= found.free


def test_a_context_that_nobody_asked_for_is_shorter_first() -> None:
    """4,096 tokens do not fit and fewer do, so that no option changes."""
    asked = OffloadConfig(device_memory="1GiB", exactness="bitwise")
    found = survey(QWEN, asked, dtype="bfloat16", backend=PlannedBackend(MACHINE))
    least = OffloadConfig(device_memory=found.plan.smallest + 2**20, exactness="bitwise")
    found = survey(QWEN, least, dtype="bfloat16", backend=PlannedBackend(MACHINE))
    assert not any(way.fits for way in choices(found, least, None))
    way = nearest(found, least, None)
    assert way is not None
    assert (way.dropped, way.options) == ((), {})
    assert 0 < way.plan.max_context < 4096


def test_more_memory_before_other_results() -> None:
    """int4 would fit with less, but the memory for unchanged results is there."""
    asked = OffloadConfig(device_memory="64MiB")
    found = survey(QWEN, asked, dtype="bfloat16", backend=PlannedBackend(MACHINE))
    way = nearest(found, asked, COSTS)
    assert way is not None
    assert (way.dropped, set(way.options), way.unchanged) == ((), {"device_memory"}, True)


def test_no_way_where_the_machine_has_too_little() -> None:
    machine = parse_machine("ddr4-3200-1g")
    asked = OffloadConfig(exactness="bitwise")
    found = survey(QWEN.with_name("deepseek-v3.json"), asked, backend=PlannedBackend(machine))
    assert found.refusal is not None
    assert nearest(found, asked, None) is None
