"""The temporary bytes of a forward pass are never above their bound, and the bound is not far above them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import offmoe
from offmoe.budget.forward_pass import PassBytes, PassRoom, pass_bytes
from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from tests import families, tiny

TOKENS = 200
FAMILIES = (
    *("mixtral", "qwen3_moe", "deepseek_v3", "granitemoe", "llama4_text", "granitemoehybrid", "qwen3_next", "jamba"),
    *("nemotron_h", "kimi_linear", "gemma4_text", "deepseek_v32", "longcat_flash"),
)
LOOSEST = 4.0
"""The bound is at most this many times the bytes."""


class PeakBytes(TorchDispatchMode):
    """The most bytes that results of torch's operators take at once, but for memory that existed before."""

    def __init__(self, existing: list[torch.Tensor]):
        super().__init__()
        self._existing = {tensor.untyped_storage()._cdata for tensor in existing}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._existing:
                    self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return out


def cached_bytes(cache: Any) -> int:
    """Bytes of keys and values in a KV cache."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_pass_takes_more_than_its_bound(tmp_path: Path, family: str, attention: str) -> None:
    dtype = torch.bfloat16
    stock = tiny.build(family, dtype) if family in tiny.CONFIGS else families.build(family, dtype)
    model = offmoe.from_pretrained(
        tiny.save(stock, tmp_path), device="cpu", slots_per_layer=3, prefetch=0, attn_implementation=attention
    )
    needs = pass_bytes(model.config, dtype, max(model.offload._executor.shape.top_k))
    slots = model.offload._executor._transfer.writer.arena.memory
    with model.offload, torch.no_grad():
        cache: Any = None
        for past in (0, TOKENS):
            before = 0 if cache is None else cached_bytes(cache)
            with PeakBytes([*model.parameters(), *model.buffers(), slots]) as seen:
                out = model(tiny.prompt(1, TOKENS), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            taken = seen.peak - (cached_bytes(cache) - before)
            bound = needs.of(1, TOKENS, past + TOKENS, 1)
            assert taken <= bound
            if past or attention == "eager":
                assert bound <= LOOSEST * taken


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_has_a_bound(family: str) -> None:
    needs = pass_bytes(families.config(family), torch.bfloat16, 2)
    assert needs.per_token > 0
    assert needs.per_pair > 0
    assert needs.block >= 1


ROOM = PassRoom(PassBytes(100, 1, 500), workspace=10_000, kv_per_token=10, max_context=1000)


def test_what_passes_at_once_shrinks_with_the_context() -> None:
    assert ROOM.chunk(1, 50, 0) == 50
    chunks = [ROOM.chunk(1, length, 0) for length in (100, 200, 400, 800, 1000)]
    assert chunks == sorted(chunks, reverse=True)
    for length, chunk in zip((100, 200, 400, 800, 1000), chunks, strict=True):
        assert not ROOM.missing(1, chunk, length, 1)
        assert chunk == length or ROOM.missing(1, chunk + 64, length, 1)
    assert all(chunk % 64 == 0 for chunk, n in zip(chunks, (100, 200, 400, 800, 1000), strict=True) if n > chunk > 64)


def test_several_sequences_share_the_room() -> None:
    assert ROOM.chunk(4, 100, 0) <= ROOM.chunk(1, 100, 0) // 2
    assert ROOM.chunk(1000, 2, 0) == 1, "whatever fits"


def test_one_token_always_passes() -> None:
    none = ROOM._replace(workspace=0, kv_per_token=0)
    assert none.missing(8, 1, 1000, 1) == 0
    assert none.missing(1, 2, 2, 1) > 0


def test_logits_of_every_token_count() -> None:
    assert ROOM.missing(1, 50, 50, 50) > 0
    chunk = ROOM.chunk(1, 50, 0, logits=50)
    assert not ROOM.missing(1, chunk, 50, chunk)
    assert ROOM.missing(1, chunk + 1, 50, chunk + 1)


def test_the_longest_prompt_that_passes_whole() -> None:
    whole = ROOM.longest_whole(10_000)
    assert ROOM.chunk(1, whole, 0) == whole
    assert ROOM.chunk(1, whole + 1, 0) < whole
    assert ROOM.longest_whole(7) == 7
    assert ROOM._replace(workspace=0, kv_per_token=0).longest_whole(100) == 1


def test_an_explicit_chunk_is_the_most() -> None:
    assert ROOM._replace(largest_chunk=8).chunk(1, 50, 0) == 8
    assert ROOM._replace(largest_chunk=80).chunk(1, 1000, 0) < 80, "attention to 1000 tokens leaves less"


def test_blocks_are_counted_whole() -> None:
    needs = PassBytes(100, 0, 0, block=64)
    assert needs.of(1, 2, 2, 1) == 6400 == needs.of(1, 64, 64, 1)
    room = PassRoom(needs, workspace=20_000, kv_per_token=0, max_context=1000)
    assert room.chunk(1, 500, 0) == 192
    assert room.chunk(4, 500, 0) == 1, "one token takes another way"


def test_a_chunk_that_followed_from_one_plan_asks_nothing_of_another(tmp_path: Path) -> None:
    """A model without a limit of context passes a prompt of a million tokens whole; that is no wish for a workspace."""
    tiny.save(families.build("switch_transformers"), tmp_path)
    first = inspect(tmp_path, OffloadConfig(device="cpu", device_memory="8GiB"))
    assert "prefill_chunk" not in first.config.explicit
    again = inspect(tmp_path, first.config.resolved(device_memory="2GiB", max_context=512))
    assert again.plan.workspace == first.plan.workspace
    assert again.plan.budget == 2 << 30
