"""What a KV cache takes is never less than transformers' own caches hold, and less than all tokens in all layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from offmoe.budget.kv import KvBytes
from offmoe.budget.needs import kv_bytes_per_token, kv_growth_per_token
from offmoe.hf.upstream import cache_layer_types
from tests import families, tiny

EXOTIC = [
    family
    for family in families.FAMILIES
    if not families.config(family).is_encoder_decoder
    and any(kind != "full_attention" for kind, _ in cache_layer_types(families.config(family).get_text_config()))
]


def held(cache: Any) -> int:
    """Bytes of memory that a cache keeps, behind views too."""
    storages = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.ndim:  # not the size of a window
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("family", [*EXOTIC, "mixtral", "deepseek_v3"])
def test_no_cache_holds_more(family: str) -> None:
    config = families.config(family)
    model = families.build(family)
    kv = KvBytes.of(config, torch.float32)
    cache, past = None, 0
    for length in (7, 1, 1, 5, 1):
        ids = tiny.prompt(2, length)
        with torch.no_grad():
            cache = model(ids, past_key_values=cache, use_cache=True).past_key_values
        assert 0 < held(cache) <= kv.after(2, past, length), (family, past, length)
        past += length


def test_full_attention_needs_what_is_reserved_per_token() -> None:
    config = AutoConfig.for_model("mixtral", **tiny.COMMON, **tiny.CONFIGS["mixtral"], sliding_window=None)
    growing = kv_growth_per_token(config, torch.float32)
    assert KvBytes.of(config, torch.float32) == KvBytes(kv_bytes_per_token(config, torch.float32), growing=growing)
    assert KvBytes(10).after(3, 5, 2) == 3 * 7 * 10
    assert KvBytes(10, growing=4).peak(3, 5, 2) == 3 * (7 * 10 + 5 * 4)


def test_a_window_holds_its_tokens_and_those_of_the_pass() -> None:
    kv = KvBytes(per_token=10, windows=((4, 100),), per_sequence=1000)
    assert kv.after(1, 0, 50) == 10 * 50 + 100 * 50 + 1000
    assert kv.after(2, 50, 1) == 2 * (10 * 51 + 100 * 5 + 1000)
    assert kv.peak(2, 50, 1) == kv.after(2, 50, 1) + 2 * 4 * 100
