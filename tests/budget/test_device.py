"""Dividing the device's memory: never more than the budget, and refusals that name what would work."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmoe.budget.device import plan_memory, plan_on_miss
from offmoe.budget.needs import DenseLayerBytes, ModelBytes
from offmoe.config import OffloadConfig
from offmoe.errors import CapacityError, ConfigError
from offmoe.profile import Profile
from offmoe.text import format_size
from offmoe.types import DISK, HOST, CacheShape

SHAPE = CacheShape((8, 8, 4), (2, 2, 1), (100, 100, 300))
MODEL = ModelBytes(
    dense=1000, kv_per_token=2, context_limit=4096, slot_bytes=(100, 100, 300), staging=600, workspace=50
)
SMALLEST = 1000 + 600 + 50 + 2 * 256 + 2 * 300
"""With two slots in all, in a pool whose slots hold the largest expert."""


@given(st.integers(1, 12_000))
def test_parts_never_exceed_the_budget(budget):
    config = OffloadConfig(device_memory=budget)
    if budget < SMALLEST:
        with pytest.raises(CapacityError, match="smallest device_memory"):
            plan_memory(config, SHAPE, MODEL, free=10**9)
        return
    plan = plan_memory(config, SHAPE, MODEL, free=10**9)
    assert plan.used <= budget == plan.budget
    assert all(q <= e for q, e in zip(plan.slots_per_layer, SHAPE.experts, strict=True))
    if plan.scope == "layer":
        assert all(k <= q for k, q in zip(SHAPE.top_k, plan.slots_per_layer, strict=True))
    assert sum(plan.slots_per_layer) >= 2
    assert plan.reason
    assert 256 <= plan.max_context <= 8 * 4096


def test_the_smallest_budget_named_works():
    with pytest.raises(CapacityError) as refused:
        plan_memory(OffloadConfig(device_memory=2000), SHAPE, MODEL, free=10**9)
    smallest = int(str(refused.value).split("works for this model is ")[1].split(" bytes")[0])
    assert smallest == SMALLEST
    plan = plan_memory(OffloadConfig(device_memory=smallest), SHAPE, MODEL, free=10**9)
    assert (plan.scope, plan.slots_per_layer) == ("model", (1, 1, 0))
    with pytest.raises(CapacityError, match=f"2 expert slots in all: --device-memory {smallest}"):
        plan_memory(OffloadConfig(device_memory=smallest - 1), SHAPE, MODEL, free=10**9)


def test_a_refusal_names_the_option_only_where_it_helps():
    asks = "--device-memory"
    with pytest.raises(CapacityError, match=rf"what is free, .*: {asks} {SMALLEST}"):  # the share is what is too small
        plan_memory(OffloadConfig(), SHAPE, MODEL, free=SMALLEST, auto=int(0.9 * SMALLEST))
    for asked in ("auto", 10**9):
        with pytest.raises(CapacityError, match=r"what is free, .*; 1 B more must be free for it") as refused:
            plan_memory(OffloadConfig(device_memory=asked), SHAPE, MODEL, free=SMALLEST - 1)
        assert asks not in str(refused.value)


def test_layers_of_their_own_have_a_slot_each_at_least():
    own = OffloadConfig(device_memory=2000, scope="layer")
    with pytest.raises(CapacityError, match="3 expert slots in all") as refused:
        plan_memory(own, SHAPE, MODEL, free=10**9)
    smallest = int(str(refused.value).split("works for this model is ")[1].split(" bytes")[0])
    assert smallest == SMALLEST - 100
    plan = plan_memory(replace(own, device_memory=smallest), SHAPE, MODEL, free=10**9)
    assert (plan.scope, plan.slots_per_layer, plan.reason) == ("layer", (1, 1, 1), "")


def test_with_room_for_all_every_expert_has_a_slot():
    plan = plan_memory(OffloadConfig(), SHAPE, MODEL, free=10**6)
    assert plan.slots_per_layer == SHAPE.experts
    assert plan.max_context == 8 * 4096, "a batch"


def test_explicit_slots_are_held_to():
    plan = plan_memory(OffloadConfig(slots_per_layer=3), SHAPE, MODEL, free=10**6)
    assert plan.slots_per_layer == (3, 3, 3)
    assert plan.slots == 3 * 500
    with pytest.raises(CapacityError, match="slots_per_layer=8"):
        plan_memory(OffloadConfig(slots_per_layer=8, device_memory=4000), SHAPE, MODEL, free=10**9)
    assert plan_memory(OffloadConfig(slots_per_layer=1), SHAPE, MODEL, free=10**6).slots_per_layer == (1, 1, 1)
    pool = plan_memory(OffloadConfig(slots_per_layer=(3, 0, 1)), SHAPE, MODEL, free=10**6)
    assert (pool.scope, pool.slots) == ("model", 4 * 300)
    with pytest.raises(ConfigError, match="1 slots in all"):
        plan_memory(OffloadConfig(slots_per_layer=(1, 0, 0)), SHAPE, MODEL, free=10**6)


def test_an_explicit_context_is_reserved():
    plan = plan_memory(OffloadConfig(max_context=10_000, device_memory=30_000), SHAPE, MODEL, free=10**9)
    assert (plan.max_context, plan.kv) == (10_000, 20_000)


def test_a_budget_beyond_what_is_free_is_cut_to_it():
    plan = plan_memory(OffloadConfig(device_memory=10**9), SHAPE, MODEL, free=5000)
    assert plan.used <= plan.budget == 5000
    with pytest.raises(CapacityError, match="what is free"):
        plan_memory(OffloadConfig(device_memory=10**9), SHAPE, MODEL, free=100)


def test_a_pool_sizes_every_slot_for_the_largest_expert():
    plan = plan_memory(OffloadConfig(scope="model", slots_per_layer=2), SHAPE, MODEL, free=10**6)
    assert plan.slots == 3 * 2 * 300


LAYERED = replace(MODEL, layers=(DenseLayerBytes(300, 470, 40), *[DenseLayerBytes(150, 160, 20)] * 4))
"""Four layers save 600 for 180 in flight; the first one is large and would cost more than it saves."""
NEEDED = SMALLEST


def test_dense_layers_leave_only_as_far_as_they_must():
    plans = {}
    for budget in range(NEEDED - 600 + 180, NEEDED + 1):
        plan = plan_memory(OffloadConfig(device_memory=budget, scope="model"), SHAPE, LAYERED, free=10**9)
        assert plan.used <= budget
        assert (plan.dense + plan.offloaded, plan.smallest, plan.smallest_dense) == (1000, NEEDED - 420, NEEDED)
        assert plan.offloaded == 150 * plan.offloaded_layers
        assert plan.in_flight == (180 if plan.offloaded_layers else 0)
        plans.setdefault(plan.offloaded_layers, []).append(budget)
    assert list(plans) == [4, 3, 2, 0], "one alone comes back to as much room as it left"
    assert all(budgets == list(range(budgets[0], budgets[-1] + 1)) for budgets in plans.values())
    with pytest.raises(CapacityError, match=f"works for this model is {NEEDED - 420} bytes"):
        plan_memory(OffloadConfig(device_memory=NEEDED - 421), SHAPE, LAYERED, free=10**9)


MANY = CacheShape((8,) * 32, (2,) * 32, (99,) * 32)
"""Mixtral 8x7B in int4, in MB."""
MIXTRAL = ModelBytes(
    dense=3210,
    kv_per_token=0,
    context_limit=4096,
    slot_bytes=(99,) * 32,
    staging=198,
    workspace=400,
    layers=(DenseLayerBytes(84, 84, 34),) * 32,
)
REST = 3210 + 198 + 400


@pytest.mark.parametrize("slots", [2, 3, 40, 63, 64, 65, 100, 255, 256])
def test_experts_do_with_what_dense_weights_leave(slots):
    plan = plan_memory(OffloadConfig(device_memory=REST + 99 * slots + 98), MANY, MIXTRAL, free=10**9)
    assert (plan.offloaded_layers, sum(plan.slots_per_layer)) == (0, slots)
    assert plan.scope == ("model" if slots < 64 else "layer")
    assert ("one pool" in plan.reason) == (slots < 256)
    assert plan.reason in plan.describe()


def test_the_reason_says_what_either_way_would_move():
    """1.4 GB of dense weights would have to leave for top_k slots in every layer."""
    plan = plan_memory(OffloadConfig(device_memory=REST + 50 * 99), MANY, MIXTRAL, free=10**9)
    assert (plan.scope, plan.offloaded_layers, sum(plan.slots_per_layer)) == ("model", 0, 50)
    assert re.search(r"^one pool .* would take .* \d+ dense layers moved out for them$", plan.reason)
    asked = OffloadConfig(device_memory=REST + 50 * 99, scope="layer", slots_per_layer=2)
    assert plan_memory(asked, MANY, MIXTRAL, free=10**9).offloaded_layers == 18


def test_a_profile_of_the_model_decides_by_its_routing():
    """Of two recordings one hits better in layers' own slots, the other in a pool."""

    def scope(layer, model, shape=MANY):
        curves = {"layer": {"64": layer, "256": 1.0}, "model": {"64": model, "256": 1.0}}
        profile = Profile({}, None, {"hit_rates": curves})
        config = OffloadConfig(device_memory=REST + 64 * 99, profile=profile)
        return plan_memory(config, shape, MIXTRAL, free=10**9)

    assert scope(0.37, 0.33).scope == "layer"
    assert scope(0.33, 0.37).scope == "model"
    assert "by the profile's trace" in scope(0.37, 0.33).reason
    other = CacheShape((9,) * 32, (2,) * 32, (99,) * 32)
    assert "equally likely" in scope(0.33, 0.37, other).reason, "it was recorded on another model"


def test_where_little_memory_is_left_the_context_is_short():
    roomy = replace(MIXTRAL, kv_per_token=1)
    tokens = [
        plan_memory(OffloadConfig(device_memory=REST + 256 + n * 99), MANY, roomy, free=10**9).max_context
        for n in (2, 20, 60)
    ]
    assert tokens[0] >= 256
    assert tokens[2] <= 99 * 60 / 16 + 99
    assert tokens == sorted(tokens)


def test_dense_layers_make_room_for_what_was_asked_for():
    enough = plan_memory(OffloadConfig(slots_per_layer=3, device_memory=NEEDED + 500), SHAPE, LAYERED, free=10**9)
    assert (enough.slots_per_layer, enough.offloaded_layers) == ((3, 3, 3), 4)
    longer = plan_memory(OffloadConfig(max_context=500, device_memory=NEEDED + 100), SHAPE, LAYERED, free=10**9)
    assert (longer.max_context, longer.offloaded_layers > 0) == (500, True)


@pytest.mark.parametrize(("host_free", "place"), [(0, DISK), (599, DISK), (600, HOST)])
def test_dense_layers_go_to_the_host_if_it_has_room(host_free, place):
    config = OffloadConfig(device_memory=NEEDED - 420)
    plan = plan_memory(config, SHAPE, LAYERED, free=10**9, host_free=host_free)
    assert (plan.offloaded, plan.offloaded_in) == (600, place)
    assert f"4 layers, 600 B, come from {place}" in plan.describe()
    roomy = plan_memory(OffloadConfig(), SHAPE, LAYERED, free=10**6, host_free=host_free)
    assert (roomy.offloaded_in, roomy.in_flight) == (None, 0)
    assert "come from" not in roomy.describe()


def test_the_plan_begins_with_what_it_uses():
    plan = plan_memory(OffloadConfig(device_memory="1MiB"), SHAPE, LAYERED, free=10**9)
    assert plan.describe().startswith(f"{format_size(plan.used)} of 1.0 MiB: dense ")
    assert plan.used < plan.budget


@pytest.mark.parametrize(
    ("options", "free", "resolved", "scratch"),
    [
        ({"slots_per_layer": 3}, 10**6, "fetch", 0),  # quotas: choosing gains nothing
        ({"slots_per_layer": 3, "on_miss": "auto"}, 10**6, "fetch", 0),
        ({"slots_per_layer": 3, "scope": "model"}, 10**6, "auto", 600),
        ({"slots_per_layer": 3, "on_miss": "fetch"}, 10**6, "fetch", 0),
        ({"slots_per_layer": 3, "on_miss": "cpu"}, 10**6, "cpu", 600),
        ({"scope": "model"}, 10**6, "fetch", 0),  # everything has a slot
        # two of so few slots are worth more as such
        ({"device_memory": 5000, "max_context": 256, "scope": "model"}, 10**6, "fetch", 0),
        ({"device_memory": 5000, "max_context": 256, "on_miss": "cpu"}, 10**6, "cpu", 600),
        ({"device_memory": SMALLEST}, 10**6, "fetch", 0),
    ],
)
def test_scratch_slots_where_they_are_worth_it(options, free, resolved, scratch):
    on_miss, plan = plan_on_miss(OffloadConfig(**options), SHAPE, MODEL, free=free)
    assert (on_miss, plan.scratch) == (resolved, scratch)
    assert plan.used <= plan.budget
    assert ("scratch" in plan.describe()) == bool(scratch)


def test_scratch_that_does_not_fit_is_refused_only_where_it_was_asked_for():
    with pytest.raises(CapacityError, match="smallest device_memory"):
        plan_on_miss(OffloadConfig(device_memory=SMALLEST, on_miss="cpu"), SHAPE, MODEL, free=10**6)
    on_miss, plan = plan_on_miss(OffloadConfig(device_memory=SMALLEST), SHAPE, MODEL, free=10**6)
    assert (on_miss, plan.scratch, sum(plan.slots_per_layer)) == ("fetch", 0, 2)


@pytest.mark.parametrize(
    ("slots", "on_miss"), [(2, "fetch"), (3, "fetch"), (4, "auto"), (40, "auto"), (50, "fetch"), (64, "fetch")]
)
def test_a_small_pool_passes_by_what_is_not_worth_a_slot(slots, on_miss):
    """Two of the slots are scratch slots then."""
    config = OffloadConfig(device_memory=REST + 99 * slots)
    resolved, plan = plan_on_miss(config, MANY, MIXTRAL, free=10**9)
    assert resolved == on_miss
    assert (sum(plan.slots_per_layer), plan.scratch) == ((slots - 2, 198) if on_miss == "auto" else (slots, 0))
    assert plan.offloaded_layers == 0
    assert plan.used <= plan.budget
