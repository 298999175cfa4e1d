"""Which layers can be predicted, worked out without weights; tests/test_families.py compares every family."""

from __future__ import annotations

import pytest

from offmoe.hf.adapters.find import find_experts
from offmoe.hf.load.config import build_meta, model_class
from offmoe.hf.predict.route_recorder import unpredictable_reasons
from offmoe.hf.predict.router_probe import NOT_CALLED, PER_CALL
from tests import families


def reasons_of(family: str) -> tuple[str | None, ...] | None:
    config = families.config(family)
    model = build_meta(config, model_class(config))
    experts = list(find_experts(model).values())
    found = unpredictable_reasons(model, experts)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in experts)
    return found


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mixtral", (None, None, None)),
        ("deepseek_v3", (None, None)),
        ("deepseek_v4", (PER_CALL, None, None)),  # its first layer looks experts up by token
        ("dots3_note", (None, None, NOT_CALLED)),  # experts of the images' encoder
        ("zaya", (None, PER_CALL, PER_CALL)),  # a router that remembers the router before it
    ],
)
def test_reasons_follow_from_how_routers_are_fed(family: str, expected: tuple[str | None, ...]) -> None:
    assert reasons_of(family) == expected


@pytest.mark.parametrize("family", ["glm5_next", "dbrx"])
def test_some_families_only_a_run_can_tell(family: str) -> None:
    """glm5_next looks at values; the router of dbrx is inside its experts module."""
    assert reasons_of(family) is None
