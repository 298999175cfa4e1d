"""Replayed routing: recorded ids reach the experts of offmoe and of stock transformers alike, and no hook stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import offmoe
from offmoe.errors import ConfigError
from offmoe.hf.adapters import reroute
from offmoe.hf.adapters.find import find_experts
from offmoe.hf.replay import ReplayedRouting
from offmoe.trace.trace import NONE, Trace, read_trace
from offmoe.types import CacheShape
from tests import tiny

SHAPE = CacheShape((8, 8, 8), (2, 2, 2), (1000, 1000, 1000))


def routing(tokens: int = 6, layers: int = 2, seed: int = 0) -> Trace:
    """The trace of a model with fewer layers, so that the layers repeat."""
    chance = np.random.default_rng(seed)
    experts = chance.random((tokens, layers, 8)).argsort(axis=2)[..., :2].astype(np.int16)
    shape = CacheShape((8,) * layers, (2,) * layers, (1000,) * layers)
    steps = np.arange(tokens, dtype=np.int32)
    return Trace("", shape, experts, np.zeros(tokens, np.int32), steps, predicted=experts)


def test_ours_and_stock_get_the_recorded_experts(tmp_path: Path) -> None:
    stock = tiny.build("mixtral")
    folder = tiny.save(stock, tmp_path / "model")
    stock.set_experts_implementation("grouped_mm")
    trace, recording = routing(), tmp_path / "run.npz"
    ours = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, prefetch=0, trace=recording)
    ids = tiny.prompt(batch=1, length=9)
    plain = stock(input_ids=ids).logits
    outputs = []
    with ours.offload:
        for model in (stock, ours):
            replayed = ReplayedRouting(trace, SHAPE)
            replayed.attach(list(find_experts(model).values()))
            replayed.seek(4)
            first = model(input_ids=ids[:, :7], use_cache=True)
            second = model(input_ids=ids[:, 7:], past_key_values=first.past_key_values)
            outputs.append(torch.cat([first.logits, second.logits], dim=1))
            replayed.detach()
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], plain)
    assert torch.equal(stock(input_ids=ids).logits, plain)
    rows = (4 + np.arange(9)) % 6
    for layer in range(3):
        assert (read_trace(recording).experts[:, layer] == trace.experts[rows, layer % 2]).all()


def test_predictions_are_the_recorded_ones(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("mixtral"), tmp_path / "model")
    trace = routing()  # its predictions are the truth
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=4, prefetch=2)
    replayed = ReplayedRouting(trace, SHAPE)
    replayed.attach(list(find_experts(model).values()))
    with model.offload:
        model.offload.predict_with(replayed)
        for token in range(6):
            model(input_ids=torch.tensor([[token]]))
        stats = model.offload.stats()
    assert stats.prefetched > 0
    assert stats.by_layer[1].misses == 0  # predicted by layer 0 and prefetched
    assert stats.by_layer[2].prefetched == 0  # it is the trace's layer 0, which nothing predicts


def one_row(experts: int, top_k: int, tokens: int = 1, expert: int = 0) -> Trace:
    rows = np.zeros(tokens, np.int32)
    shape = CacheShape((experts,), (top_k,), (1000,))
    return Trace("", shape, np.full((tokens, 1, top_k), expert, np.int16), rows, rows)


@pytest.mark.parametrize(
    ("trace", "says"),
    [
        (one_row(9, 2), "layer 0 has 9 experts"),
        (one_row(8, 3), "top_k 3; the model's MoE layer 0 has 8, top_k 2"),
        (one_row(8, 2, tokens=0), "no token"),
    ],
)
def test_a_trace_of_another_model_is_refused(trace: Trace, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ReplayedRouting(trace, SHAPE)


def test_tokens_that_lack_an_expert_are_refused_where_all_are_needed() -> None:
    trace = routing()
    trace.experts[2, 1, 1] = NONE
    replayed = ReplayedRouting(trace, SHAPE)
    experts = list(find_experts(tiny.build("mixtral")).values())
    with pytest.raises(ConfigError, match="in layer 1, and MixtralExperts needs all"):
        replayed.attach(experts)
    assert not any(module._forward_pre_hooks for module in experts)


def test_a_layer_without_recorded_experts_is_refused_when_it_is_called() -> None:
    model = tiny.build("mixtral")
    trace = routing(layers=3)
    trace.experts[:, 1] = NONE
    replayed = ReplayedRouting(trace, SHAPE)
    replayed.attach(list(find_experts(model).values()))
    with pytest.raises(ConfigError, match="no experts for MoE layer 1"):
        model(input_ids=tiny.prompt(1, 3))


def test_parts_that_ran_in_steps_of_their_own_get_their_own_rows() -> None:
    trace = routing(tokens=7, layers=3)
    trace.experts[:4, 1:] = NONE  # an encoder's layer, then two of a decoder
    trace.experts[4:, 0] = NONE
    layers = [tiny.build("mixtral", num_hidden_layers=1).model.layers[0].mlp.experts for _ in range(3)]
    seen: list[list[list[int]]] = [[], [], []]
    replayed = ReplayedRouting(trace, SHAPE)
    replayed.attach(layers)
    for layer, module in enumerate(layers):
        module.register_forward_pre_hook(lambda _, args, layer=layer: seen[layer].extend(args[1].tolist()))
    replayed.seek(1)
    for layer, tokens in ((0, 5), (1, 2), (2, 2), (1, 1), (2, 1)):
        some = torch.zeros(tokens, 2, dtype=torch.int64)
        layers[layer](torch.zeros(tokens, 32), some, torch.ones(tokens, 2))
    wanted = ([1, 2, 3, 0, 1], [5, 6, 4], [5, 6, 4])
    assert seen == [trace.experts[rows, layer].tolist() for layer, rows in enumerate(wanted)]


def test_modules_without_ids_are_refused() -> None:
    layer = torch.nn.Identity()
    reroute.ids_argument(layer, lambda ids: ids)
    with pytest.raises(ConfigError, match="Identity cannot be replaced"):
        layer(torch.zeros(2, 2))
