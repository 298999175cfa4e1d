"""Attention whose heads are rows: what stock's function gives, and stock's function wherever it is no plain token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from offmoe.hf.load import grouped_attention as ours
from offmoe.hf.upstream import ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
from tests import tiny

BATCH, HEADS, GROUPS, LENGTH, WIDTH, VALUES = 2, 8, 2, 21, 16, 24


class Layer(nn.Module):
    num_key_value_groups = HEADS // GROUPS
    is_causal = True


def inputs(tokens: int = 1, groups: int = GROUPS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(3)
    shapes = (BATCH, HEADS, tokens, WIDTH), (BATCH, groups, LENGTH, WIDTH), (BATCH, groups, LENGTH, VALUES)
    query, key, value = (torch.randn(shape, generator=chance) for shape in shapes)
    return query, key, value


def stock(*args: Any, **kwargs: Any) -> torch.Tensor:
    out: torch.Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](Layer(), *args, **kwargs)[0]
    return out


def never(*_: object, **__: object) -> Any:
    raise AssertionError("stock's function was asked")


def hidden_tail() -> torch.Tensor:
    """A mask [batch, 1, 1, length] that hides other tokens of each sequence."""
    mask = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    mask[0, ..., -3:] = mask[1, ..., :5] = False
    return mask


@pytest.mark.parametrize("mask", [None, hidden_tail()], ids=["no mask", "mask"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_token(monkeypatch: pytest.MonkeyPatch, mask: torch.Tensor | None, scaling: float | None) -> None:
    expected = stock(*inputs(), mask, scaling=scaling)
    with monkeypatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", never)
        out, probabilities = ours.grouped_attention(Layer(), *inputs(), mask, scaling=scaling, position_ids=None)
    assert probabilities is None
    assert out.shape == expected.shape == (BATCH, 1, HEADS, VALUES)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "groups", "mask", "more"),
    [
        (3, GROUPS, None, {}),
        (1, HEADS, None, {}),
        (1, GROUPS, hidden_tail().expand(-1, HEADS, -1, -1), {}),
        (1, GROUPS, None, {"position_bias": torch.zeros(1, HEADS, 1, LENGTH)}),
    ],
    ids=["several tokens", "no groups", "a mask per head", "a bias"],
)
def test_stock_computes_the_rest(tokens: int, groups: int, mask: torch.Tensor | None, more: dict[str, Any]) -> None:
    query, key, value = inputs(tokens, groups)
    layer = Layer()
    layer.num_key_value_groups = HEADS // groups
    expected = ALL_ATTENTION_FUNCTIONS["sdpa"](layer, query, key, value, mask, **more)[0]
    assert torch.equal(ours.grouped_attention(layer, query, key, value, mask, **more)[0], expected)


def test_masks_are_those_of_stock() -> None:
    assert ALL_MASK_ATTENTION_FUNCTIONS["offmoe_sdpa"] is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def test_models_get_it() -> None:
    model = tiny.build("qwen3_moe", torch.float32)
    assert model.config._attn_implementation == "sdpa"
    ids = tiny.prompt(1, 9)
    with torch.no_grad():
        expected = model(ids, use_cache=True)
        expected = model(ids[:, :1], past_key_values=expected.past_key_values).logits
        assert ours.group_heads(model)
        assert model.config._attn_implementation == "offmoe_sdpa"
        out = model(ids, use_cache=True)
        out = model(ids[:, :1], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_what_the_user_has_chosen_stays() -> None:
    model = tiny.build("qwen3_moe", torch.float32)
    model.set_attn_implementation("eager")
    assert not ours.group_heads(model)
    assert model.config._attn_implementation == "eager"


def test_code_that_compares_names_keeps_its_name() -> None:
    model = tiny.build("qwen3_moe", torch.float32)

    class Compares(nn.Module):
        def forward(self, config: Any) -> bool:
            return bool(config._attn_implementation == "sdpa")

    model.add_module("extra", Compares())
    assert not ours.group_heads(model)
    assert model.config._attn_implementation == "sdpa"
