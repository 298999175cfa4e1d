"""max_context counts keys and values that are kept, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import offmoe
from offmoe.errors import CapacityError
from tests import families, tiny

CONTEXT = 20
LONG = tiny.prompt(4, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("context") / "mixtral")


@pytest.fixture
def model(folder: Path) -> Iterator[tiny.Model]:
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, max_context=CONTEXT)
    with model.offload:
        yield model


@pytest.fixture(scope="module")
def stock(folder: Path) -> tiny.Model:
    return tiny.comparable(AutoModelForCausalLM.from_pretrained(folder))


def test_a_pass_without_a_cache_has_no_limit(model: tiny.Model, stock: tiny.Model) -> None:
    with torch.no_grad():
        assert torch.equal(model(LONG, use_cache=False).logits, stock(LONG, use_cache=False).logits)
        positional = (LONG, None, None, None, None, LONG, False)
        assert torch.equal(model(*positional).loss, stock(*positional).loss)
        with pytest.raises(CapacityError, match=r"4 x 30 .* max_context=120 or more.*use_cache=False"):
            model(LONG)
        with pytest.raises(CapacityError, match="4 x 30"):
            model(LONG, None, None, None, None, None, True)


def test_the_models_own_config_says_whether_there_is_a_cache(model: tiny.Model, stock: tiny.Model) -> None:
    model.config.use_cache = stock.config.use_cache = False
    try:
        with torch.no_grad():
            assert torch.equal(model(LONG).logits, stock(LONG).logits)
            with pytest.raises(CapacityError, match="4 x 30"):
                model(LONG, use_cache=True)
    finally:
        stock.config.use_cache = True


def test_generating_without_a_cache_has_no_limit(model: tiny.Model, stock: tiny.Model) -> None:
    ids = tiny.prompt(2, 15)
    wanted, found = (m.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False) for m in (stock, model))
    assert torch.equal(found, wanted)


def test_a_cache_that_is_given_counts_whatever_use_cache_says(model: tiny.Model) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tiny.prompt(1, 15), past_key_values=cache)
        for call in (
            lambda: model(tiny.prompt(1, 6), past_key_values=cache, use_cache=False),
            lambda: model(tiny.prompt(1, 6), None, None, cache),
        ):
            with pytest.raises(CapacityError, match="1 x 21"):
                call()
        model(tiny.prompt(1, 5), None, None, cache)
    assert cache.get_seq_length() == CONTEXT


def test_a_static_cache_ends_where_it_ends(model: tiny.Model, tmp_path: Path) -> None:
    """A device would write past its end. A layer with a window goes round in it."""
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(tiny.prompt(1, 15), past_key_values=cache)
        model(tiny.prompt(1, 1), past_key_values=cache)
        with pytest.raises(CapacityError, match=r"17 tokens of context do not fit the StaticCache, .* made for 16"):
            model(tiny.prompt(1, 1), past_key_values=cache)
        cache.reset()
        model(tiny.prompt(1, 16), past_key_values=cache)
    folder = tiny.save(
        tiny.build("gpt_oss", sliding_window=4, layer_types=["sliding_attention"] * 3), tmp_path / "model"
    )
    windows = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, max_context=CONTEXT)
    with windows.offload, torch.no_grad():
        cache = StaticCache(config=windows.config, max_cache_len=16)
        windows(tiny.prompt(1, 12), past_key_values=cache)
        for _ in range(6):
            windows(tiny.prompt(1, 1), past_key_values=cache)


def test_a_layer_with_a_window_keeps_no_more_than_it(tmp_path: Path) -> None:
    """gpt-oss: every other layer has a window. Once the prompt is read, memory grows in the rest of the layers only."""
    folder = tiny.save(tiny.build("gpt_oss", sliding_window=4, num_hidden_layers=4), tmp_path / "model")
    stock = tiny.comparable(AutoModelForCausalLM.from_pretrained(folder))
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, max_context=CONTEXT)
    ids, options = tiny.prompt(1, 12), {"do_sample": False, "min_new_tokens": 15}
    with model.offload:
        # 4 layers x 20 tokens are reserved. 2 layers keep all; 2 keep 4 and the new one, counted with twice the heads.
        # Half a layer x 20 more are for keys that are there twice while they grow: 28 old ones leave no room for 29.
        found = model.generate(ids, max_new_tokens=15, **options)
        assert torch.equal(found, stock.generate(ids, max_new_tokens=15, **options))
        with pytest.raises(CapacityError, match="1 x 29"):
            model.generate(ids, max_new_tokens=60, **options)
        with pytest.raises(CapacityError, match="1 x 21"):  # while it is read, a layer keeps the whole prompt
            model(tiny.prompt(1, 21))


def test_a_layer_with_a_state_keeps_no_tokens(tmp_path: Path) -> None:
    folder = tiny.save(families.build("qwen3_next"), tmp_path / "model")
    stock = tiny.comparable(AutoModelForCausalLM.from_pretrained(folder))
    ids = tiny.prompt(1, 420)
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, max_context=400)
    with model.offload, torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)
        with pytest.raises(CapacityError, match="2 x 420"):
            model(ids.repeat(2, 1))


@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe"])
def test_an_encoder_keeps_nothing(tmp_path: Path, family: str) -> None:
    """What the decoder keeps for the encoder's tokens is checked when the decoder runs."""
    folder = tiny.save(families.build(family), tmp_path / "model")
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, max_context=CONTEXT)
    with model.offload, torch.no_grad():
        encoded = model.get_encoder()(LONG).last_hidden_state
        assert encoded.shape[:2] == LONG.shape
        with pytest.raises(CapacityError, match="4 x 31"):
            model.generate(LONG, max_new_tokens=2, do_sample=False)
