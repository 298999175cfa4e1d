"""Caches that grow in place hold what transformers' own hold, whatever is done with them between tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import offmoe
from offmoe.compute.kernels.library import status
from offmoe.hf.load import roomy_cache
from offmoe.hf.load.roomy_cache import RoomyLayer, give_room, without_room
from tests import tiny

LAYERS = 2
SHAPE = (3, 2, 1, 8)


def states(seed: int, tokens: int = 1) -> torch.Tensor:
    return torch.randn(*SHAPE[:2], tokens, SHAPE[3], generator=torch.Generator().manual_seed(seed))


def put(cache: Any, seed: int, tokens: int = 1) -> None:
    for layer in range(LAYERS):
        found = cache.update(states(seed + layer, tokens), -states(seed + layer, tokens), layer)
        held = cache.layers[layer]
        assert found[0] is held.keys
        assert found[1] is held.values


def pair(prompt: int = 5) -> tuple[Any, Any]:
    """A cache as transformers has it, and one with room, both with a prompt."""
    plain: Any = DynamicCache()
    roomy: Any = DynamicCache()
    for cache in (plain, roomy):
        put(cache, 0, prompt)
    give_room(roomy)
    assert all(type(layer) is RoomyLayer for layer in roomy.layers)
    return plain, roomy


def check(plain: Any, roomy: Any) -> None:
    assert roomy.get_seq_length() == plain.get_seq_length()
    for ours, theirs in zip(roomy.layers, plain.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_tokens_are_written_behind_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    token_bytes = LAYERS * 2 * states(0).nbytes
    monkeypatch.setattr(roomy_cache, "ROOM_BYTES", 4 * token_bytes)
    plain, roomy = pair()
    memories = []
    for token in range(11):
        put(plain, 10 * token)
        put(roomy, 10 * token)
        check(plain, roomy)
        memories.append(roomy.layers[0].keys.data_ptr())
    assert len(set(memories)) == 3  # room for four tokens, twice filled
    storage = roomy.layers[0].keys.untyped_storage().nbytes()
    assert storage == states(0, 5 + 12).nbytes


def cropped(cache: Any) -> None:
    for layer in cache.layers:
        layer.crop(-2)


def assigned(cache: Any) -> None:
    """A shorter view of the same memory, as who crops by hand makes it."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :-2], layer.values[:, :, :-2]


def reordered(cache: Any) -> None:
    cache.reorder_cache(torch.tensor([2, 0, 0]))


def selected(cache: Any) -> None:
    cache.batch_select_indices(torch.tensor([1, 2, 0]))


def longer(cache: Any) -> None:
    put(cache, 500, 3)


def reset(cache: Any) -> None:
    cache.reset()
    put(cache, 600, 4)


@pytest.mark.parametrize("change", [cropped, assigned, reordered, selected, longer, reset])
def test_whatever_happens_between_tokens(change: Callable[[Any], None]) -> None:
    plain, roomy = pair()
    for token in range(4):
        for cache in (plain, roomy):
            put(cache, 10 * token)
            put(cache, 1000 + token)
            change(cache)
        check(plain, roomy)
    for cache in (plain, roomy):
        put(cache, 77)
    check(plain, roomy)


@pytest.mark.parametrize("share", [copy.deepcopy, copy.copy], ids=["deep copy", "shared tensors"])
def test_who_was_given_keys_keeps_them(share: Callable[[Any], Any]) -> None:
    """Another cache goes on from the same tensors, and neither sees the other's tokens."""
    plain, roomy = pair()
    for cache in (plain, roomy):
        put(cache, 1)
    other: Any = DynamicCache()
    other.layers = [share(layer) for layer in roomy.layers]
    if share is copy.copy:
        for layer in other.layers:
            layer.rooms = {}
    seen = [layer.keys for layer in roomy.layers]
    before = [keys.clone() for keys in seen]
    put(roomy, 2)
    put(other, 3)
    put(roomy, 4)
    assert all(torch.equal(now, then) for now, then in zip(seen, before, strict=True))
    for seeds, cache in (((2, 4), roomy), ((3,), other)):
        wanted = copy.deepcopy(plain)
        for seed in seeds:
            put(wanted, seed)
        check(wanted, cache)


def test_other_states_are_joined_as_before() -> None:
    plain, roomy = pair()
    for cache in (plain, roomy):
        put(cache, 1)
        cache.layers[0].keys = cache.layers[0].keys.double()
        put(cache, 2)
    check(plain, roomy)
    assert roomy.layers[0].keys.dtype == torch.float64


def test_tensors_of_inference_mode_are_not_written_outside_it() -> None:
    with torch.inference_mode():
        plain, roomy = pair()
        for cache in (plain, roomy):
            put(cache, 1)
    for cache in (plain, roomy):
        put(cache, 2)
        put(cache, 3)
    check(plain, roomy)


def test_unused_room_can_be_given_back() -> None:
    plain, roomy = pair()
    for cache in (plain, roomy):
        put(cache, 1)
    assert roomy.layers[0].keys.untyped_storage().nbytes() > states(0, 6).nbytes
    without_room(roomy.layers)
    without_room(plain.layers)
    assert roomy.layers[0].keys.untyped_storage().nbytes() == states(0, 6).nbytes
    check(plain, roomy)


def test_room_is_bounded_by_bytes() -> None:
    plain: Any = DynamicCache()
    roomy: Any = DynamicCache()
    wide = torch.zeros(1, 128, 1, 4096)
    for cache in (plain, roomy):
        for layer in range(LAYERS):
            cache.update(wide, wide, layer)
    give_room(roomy)
    for _ in range(3):
        roomy.update(wide, wide, 0)
    unused = roomy.layers[0].keys.untyped_storage().nbytes() - 4 * wide.nbytes
    assert 0 <= unused <= roomy_cache.ROOM_BYTES


def test_other_caches_stay() -> None:
    config = tiny.build("mixtral").config
    window: Any = DynamicCache(config=config)
    static: Any = StaticCache(config=config, max_cache_len=8)
    config.sliding_window, config.layer_types = 4, None
    for cache in (static, None, object()):
        give_room(cache)
    assert not any(isinstance(layer, RoomyLayer) for layer in static.layers)
    give_room(window)
    assert all(isinstance(layer, RoomyLayer) for layer in window.layers)


def test_models_on_a_cpu_get_it(tmp_path: Path) -> None:
    if status().library is None:
        pytest.skip(status().message)
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    tiny.save(tiny.build("mixtral", torch.bfloat16, **sizes), tmp_path)
    ids, greedy = tiny.prompt(1, 6), {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    for exactness in ("numeric", "bitwise"):
        model: Any = offmoe.from_pretrained(tmp_path, device="cpu", slots_per_layer=3, exactness=exactness)
        with model.offload:
            out = model.generate(ids, return_dict_in_generate=True, **greedy)
        kinds = {type(layer) is RoomyLayer for layer in out.past_key_values.layers}
        assert kinds == {exactness == "numeric"}
