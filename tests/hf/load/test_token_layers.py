"""Decoder layers that one call computes give the bits of their parts, and all other passes are their own code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from offmoe.compute.kernels.token_layers import Passage, TokenLayers
from offmoe.hf.load.attach import reroute
from offmoe.hf.load.own_forward import Onlooker
from offmoe.hf.load.token_layers import DecoderLayers
from offmoe.trace.trace import read_trace
from tests import tiny
from tests.hf.load.test_token_attention import decode, kernels, loaded  # noqa: F401

WHOLE = ["mixtral", "qwen3_moe"]
"""Families whose layers are computed with their experts."""
LEFT = ["qwen2_moe", "dots1"]
"""Families whose calls end before the block."""
OTHER = ["granitemoe", "phimoe", "deepseek_v3", "gpt_oss", "olmoe"]
ALL = 1000
"""More slots than any layer has experts."""
TOKENS = 10
CALLS = {"mixtral": [(3, 0)] * TOKENS, "qwen3_moe": [(1, 1), (2, 0)] * TOKENS}
"""Where every expert has a slot. The first layer of the second has no experts."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(layers that were asked for, layers that are not complete) of each call."""
    found: list[tuple[int, int]] = []
    call = TokenLayers.__call__

    def counted(self: TokenLayers, layers: Any, *arguments: Any) -> Passage:
        passage = call(self, layers, *arguments)
        found.append((len(layers), len(layers) - len(passage.ids)))
        return passage

    monkeypatch.setattr(TokenLayers, "__call__", counted)
    return found


def layers_of(model: Any) -> DecoderLayers:
    layers = model.offload._steps.layers
    assert layers is not None
    return layers


@contextmanager
def part_by_part(model: Any) -> Iterator[None]:
    layers = layers_of(model)
    layers._is_given_up = True
    yield
    layers._is_given_up = False


@contextmanager
def ready(folder: Path, family: str, slots: int = ALL, prefetch: int = 0, **options: Any) -> Iterator[Any]:
    """A model all of whose layers were compared."""
    with loaded(folder, family, slots, prefetch=prefetch, **options) as model:
        decode(model, TOKENS)
        yield model


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("slots", [3, ALL])
def test_a_pass_has_the_bits_of_the_parts(
    tmp_path: Path, family: str, slots: int, calls: list[tuple[int, int]]
) -> None:
    with ready(tmp_path, family, slots) as model:
        depth = model.config.num_hidden_layers
        assert [layer.left for layer in layers_of(model)._layers if layer is not None] == [0] * depth
        with part_by_part(model):
            calls.clear()
            wanted = decode(model, TOKENS)
            assert not calls
        found = decode(model, TOKENS)
        assert torch.equal(found, wanted)
        if slots == ALL:
            assert calls == CALLS[family]
        else:
            assert any(left for _, left in calls)
            assert sum(asked for asked, _ in calls) <= 3 * depth * TOKENS + depth  # few are prepared in vain


@pytest.mark.parametrize("family", LEFT)
def test_other_blocks_run_between_calls(tmp_path: Path, family: str, calls: list[tuple[int, int]]) -> None:
    with ready(tmp_path, family) as model:
        with part_by_part(model):
            wanted = decode(model, TOKENS)
        calls.clear()
        assert torch.equal(decode(model, TOKENS), wanted)
        assert calls == [(1, 1)] * (model.config.num_hidden_layers * TOKENS)


@pytest.mark.parametrize("family", OTHER)
def test_other_layers_stay(tmp_path: Path, family: str, calls: list[tuple[int, int]]) -> None:
    with loaded(tmp_path, family, ALL) as model:
        decode(model, TOKENS)
        assert not calls


def test_generated_tokens_caches_and_counts(tmp_path: Path) -> None:
    with ready(tmp_path, "mixtral") as model:
        found = []
        model.generate(tiny.prompt(1, 4), max_new_tokens=200, do_sample=False)  # every expert gets its slot
        for surround in (lambda: part_by_part(model), lambda: torch.no_grad()):
            with surround():
                model.offload.reset_stats()
                cache: Any = DynamicCache(config=model.config)
                ids = model.generate(tiny.prompt(1, 4), max_new_tokens=200, past_key_values=cache, do_sample=False)
                found.append((ids, [(layer.keys, layer.values) for layer in cache.layers], model.offload.stats()))
        (ids, states, stats), (own_ids, own_states, own_stats) = found
        assert torch.equal(ids, own_ids)
        assert (stats.hits, stats.misses) == (own_stats.hits, own_stats.misses)
        for pair, own_pair in zip(states, own_states, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(pair, own_pair, strict=True))


@pytest.mark.parametrize("family", [*WHOLE, *LEFT])
@pytest.mark.parametrize(("slots", "prefetch"), [(ALL, 0), (3, 0), (3, 1), (2, 2), (ALL, 1)])
def test_recordings_are_the_same(tmp_path: Path, family: str, slots: int, prefetch: int) -> None:
    traces, logits, stats = [], [], []
    for name in ("parts", "layers"):
        with ready(tmp_path, family, slots, prefetch, trace=str(tmp_path / f"{name}.npz")) as model:
            with part_by_part(model) if name == "parts" else torch.no_grad():
                logits.append(torch.cat([decode(model, 3 * TOKENS, prompt) for prompt in (3, 5)], 1))
            stats.append(model.offload.stats())
        traces.append(read_trace(tmp_path / f"{name}.npz"))
    own, found = (list(trace.accesses()) for trace in traces)
    assert len(own) > TOKENS
    assert own == found
    assert any(access.predicted for access in own) == (prefetch > 0 and slots != ALL)
    assert stats[0].prefetched == stats[1].prefetched
    assert (stats[0].hits, stats[0].pending, stats[0].misses) == (stats[1].hits, stats[1].pending, stats[1].misses)
    assert torch.equal(*logits)


def test_a_call_goes_on_past_predictions_that_hit(tmp_path: Path, calls: list[tuple[int, int]]) -> None:
    """And ends at those that would be read ahead."""
    with ready(tmp_path, "mixtral", tiny.NUM_EXPERTS - 1, prefetch=2) as model:
        calls.clear()
        decode(model, 100)
        assert calls.count((3, 0)) > 10
        assert any(left for _, left in calls)


class Nobody:
    """Predicts nothing."""

    def predict(self, layer: int) -> torch.Tensor | None:
        return None


def test_predictions_of_others(tmp_path: Path, calls: list[tuple[int, int]]) -> None:
    """They are asked before every layer, as they know nothing of calls."""
    with ready(tmp_path, "mixtral", 3, prefetch=1) as model:
        wanted = decode(model, TOKENS)
        assert calls
        model.offload.predict_with(Nobody())
        calls.clear()
        assert torch.equal(decode(model, TOKENS), wanted)
        assert not calls


def test_hooks_beside_that_of_predictions(tmp_path: Path, calls: list[tuple[int, int]]) -> None:
    with ready(tmp_path, "mixtral", 3, prefetch=1) as model:
        seen: list[Any] = []
        norm = model.model.layers[1].post_attention_layernorm
        assert len(norm._forward_pre_hooks) == 1
        wanted = decode(model, TOKENS)
        for register in (norm.register_forward_pre_hook, norm.register_forward_hook):
            seen.clear()
            hook = register(lambda *arguments: seen.append(arguments))
            assert torch.equal(decode(model, TOKENS), wanted)
            assert len(seen) == 1 + TOKENS
            hook.remove()
        seen.clear()
        calls.clear()
        assert torch.equal(decode(model, TOKENS), wanted)
        assert any(layers > 1 for layers, _ in calls)


PARTS = ["", "self_attn", "self_attn.q_proj", "input_layernorm", "mlp", "mlp.gate", "mlp.experts"]


@pytest.mark.parametrize("part", PARTS)
def test_hooks_see_everything(tmp_path: Path, part: str, calls: list[tuple[int, int]]) -> None:
    with ready(tmp_path, "qwen3_moe") as model:
        seen: list[Any] = []
        module = model.model.layers[1].get_submodule(part)
        hook = module.register_forward_hook(lambda *arguments: seen.append(arguments))
        with part_by_part(model):
            wanted = decode(model, TOKENS)
        calls.clear()
        assert torch.equal(decode(model, TOKENS), wanted)
        assert len(seen) == 2 * (1 + TOKENS)
        assert (2, 0) not in calls
        hook.remove()
        calls.clear()
        decode(model, TOKENS)
        assert calls == CALLS["qwen3_moe"]


def test_hooks_that_only_want_to_be_called(tmp_path: Path, calls: list[tuple[int, int]]) -> None:
    """They are, before every layer; one that raises leaves the caches of later layers as they were."""
    with ready(tmp_path, "mixtral") as model:
        wanted, seen = decode(model, TOKENS), []
        hook = model.model.layers[1].register_forward_pre_hook(Onlooker(lambda: seen.append(1)))
        calls.clear()
        assert torch.equal(decode(model, TOKENS), wanted)
        assert len(seen) == 1 + TOKENS
        assert calls == CALLS["mixtral"]
        hook.remove()

        def fail() -> None:
            raise Interrupted

        cache = model(tiny.prompt(1, 5), use_cache=True).past_key_values
        model.model.layers[1].register_forward_pre_hook(Onlooker(fail))
        with pytest.raises(Interrupted):
            model(tiny.prompt(1, 1), past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [6, 5, 5]


def replaced(model: Any) -> None:
    """Another layer in the place of a projection, as adapters put one there."""
    attention = model.model.layers[1].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)


def weighted(model: Any) -> None:
    norm = model.model.layers[1].post_attention_layernorm
    norm.weight = nn.Parameter(norm.weight * 2, requires_grad=False)


def fewer(model: Any) -> None:
    model.model.layers[1].mlp.gate.top_k = 1


def eager(model: Any) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [replaced, weighted, fewer, eager])
def test_what_changes_a_layer_is_seen(tmp_path: Path, change: Callable[[Any], None]) -> None:
    with ready(tmp_path, "qwen3_moe") as model:
        before = decode(model, TOKENS)
        change(model)
        found = decode(model, TOKENS)
        with part_by_part(model):
            assert torch.equal(decode(model, TOKENS), found)
        assert not torch.equal(before, found)


def test_hidden_states_that_are_asked_for(tmp_path: Path) -> None:
    with ready(tmp_path, "mixtral") as model:
        ids = tiny.prompt(1, 6)
        states = []
        for own in (True, False):
            cache = model(ids[:, :5], use_cache=True).past_key_values
            layers_of(model)._is_given_up = own
            states.append(model(ids[:, 5:], past_key_values=cache, output_hidden_states=True).hidden_states)
        assert len(states[0]) == model.config.num_hidden_layers + 1
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_other_ids_than_the_routers(tmp_path: Path) -> None:
    with ready(tmp_path, "mixtral") as model:
        undo = reroute(model.model.layers[1].mlp.experts, lambda ids: torch.zeros_like(ids))
        found = decode(model, TOKENS)
        with part_by_part(model):
            assert torch.equal(decode(model, TOKENS), found)
        undo()
        assert not torch.equal(decode(model, TOKENS), found)


def test_a_difference_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call = TokenLayers.__call__

    def wrong(self: TokenLayers, *arguments: Any) -> Passage:
        passage = call(self, *arguments)
        for out in passage.outs:
            out.view(-1)[3] += 0.5
        return passage

    monkeypatch.setattr(TokenLayers, "__call__", wrong)
    with loaded(tmp_path, "mixtral", ALL) as model, caplog.at_level(logging.WARNING):
        found = decode(model, TOKENS)
        assert caplog.text.count("part by part") == 1
        assert torch.equal(decode(model, TOKENS), found)
        assert caplog.text.count("part by part") == 1


class Interrupted(Exception):
    pass


def test_what_was_computed_for_layers_that_are_not_called_is_taken_back(tmp_path: Path) -> None:
    """A pass that fails behind its first layer leaves the cache of the others as it was."""
    with ready(tmp_path, "mixtral") as model:
        ids, stack = tiny.prompt(1, 7), model.model.layers
        cache = model(ids[:, :5], use_cache=True).past_key_values

        def fail(*_: Any, **__: Any) -> None:
            raise Interrupted

        second = stack[1].__dict__["forward"]
        object.__setattr__(stack[1], "forward", fail)
        with pytest.raises(Interrupted):
            model(ids[:, 5:6], past_key_values=cache)
        object.__setattr__(stack[1], "forward", second)
        assert [layer.get_seq_length() for layer in cache.layers] == [6] + [5] * (len(stack) - 1)
        cache.layers[0].crop(-1)
        logits = model(ids[:, 5:6], past_key_values=cache).logits
        with part_by_part(model):
            again = model(ids[:, :5], use_cache=True).past_key_values
            assert torch.equal(model(ids[:, 5:6], past_key_values=again).logits, logits)


def test_layers_that_are_called_otherwise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody changes what passes from one layer to the next: the rest is computed from that."""
    with ready(tmp_path, "mixtral") as model, caplog.at_level(logging.WARNING):
        second = model.model.layers[1]
        own = second.__dict__["forward"]
        object.__setattr__(second, "forward", lambda x, **options: own(x * 2, **options))
        found = decode(model, TOKENS)
        assert caplog.text.count("another order") == 1
        with part_by_part(model):
            wanted = decode(model, TOKENS)
        assert torch.equal(found, wanted)


def test_a_draft_that_leaves_layers_out(tmp_path: Path, calls: list[tuple[int, int]]) -> None:
    with ready(tmp_path, "mixtral") as model:
        calls.clear()
        model.config.num_hidden_layers -= 1
        decode(model, TOKENS)
        model.config.num_hidden_layers += 1
        assert not calls


def test_a_layer_by_itself_is_its_own_code(tmp_path: Path, calls: list[tuple[int, int]]) -> None:
    with ready(tmp_path, "mixtral") as model:
        cache = model(tiny.prompt(1, 5), use_cache=True).past_key_values
        calls.clear()
        x, positions = torch.randn(1, 1, model.config.hidden_size).bfloat16(), torch.tensor([[5]])
        layer = model.model.layers[0]
        angles = model.model.rotary_emb(x, positions)
        layer(x, position_embeddings=angles, past_key_values=cache)
        assert not calls
        assert [held.get_seq_length() for held in cache.layers] == [6] + [5] * (model.config.num_hidden_layers - 1)


def test_passes_of_several_tokens_and_sequences(tmp_path: Path, calls: list[tuple[int, int]]) -> None:
    with ready(tmp_path, "mixtral") as model:
        calls.clear()
        model(tiny.prompt(2, 1), use_cache=True)
        cache = model(tiny.prompt(1, 4), use_cache=True).past_key_values
        model(tiny.prompt(1, 2), past_key_values=cache)
        model(tiny.prompt(1, 1), use_cache=False)
        assert not calls


def test_a_model_that_was_resized(tmp_path: Path, calls: list[tuple[int, int]]) -> None:
    """Slots have moved: addresses of experts are those of now."""
    with ready(tmp_path, "mixtral") as model:
        wanted = decode(model, TOKENS)
        model.offload.resize(slots_per_layer=2)
        assert torch.equal(decode(model, TOKENS), wanted)
        model.offload.resize(slots_per_layer=ALL)
        decode(model, TOKENS)
        calls.clear()
        assert torch.equal(decode(model, TOKENS), wanted)
        assert calls == [(model.config.num_hidden_layers, 0)] * TOKENS
