"""Every family can be calibrated and driven by a recorded routing, and then routes by itself again."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import offmoe
from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.hf.adapters.find import find_experts, require_adapter
from offmoe.hf.replay import ReplayedRouting
from offmoe.measure import calibrate
from offmoe.trace.trace import NONE, Trace, read_trace
from offmoe.types import CacheShape
from tests import families, tiny
from tests.test_families import greedy, in_registry, logits, stock_model

ROUNDING = 1e-5
"""By how much stock's implementations of some families differ; docs/families.md has the exact figures."""
ROW = 3
OFTEN = (
    *("dbrx", "jetmoe", "llama4_text", "longcat_flash", "nllb-moe", "step3p7", "switch_transformers"),  # by an adapter
    *("deepseek_v4", "diffusion_gemma", "dots3_note", "ernie4_5_vl_moe", "gpt_oss", "mixtral", "zaya"),
)
"""One family for each way in which ids reach experts; every other family shares one of these ways."""


def random_routing(shape: CacheShape, dropping: bool) -> Trace:
    """Nine tokens, each in a step of its own; dropping: some choices have no expert."""
    chance = np.random.default_rng(1)
    experts = np.full((9, shape.layers, max(shape.top_k)), NONE, np.int16)
    for layer, (number, top_k) in enumerate(zip(shape.experts, shape.top_k, strict=True)):
        experts[:, layer, :top_k] = chance.random((9, number)).argsort(axis=1)[:, :top_k]
    if dropping:
        experts[chance.random(experts.shape) < 0.2] = NONE
    return Trace("", shape, experts, request=np.zeros(9, np.int32), step=np.arange(9, dtype=np.int32))


def plain(model: tiny.Model, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # one family begins with random tokens
    return logits(model, inputs)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated"
)  # diffusion_gemma imports torch's compiler
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in OFTEN else pytest.mark.slow) for f in families.FAMILIES]
)
def test_family(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(calibrate, "LEAST_ROUNDS", 1)
    folder = tiny.save(families.build(family), tmp_path / "model")
    inspected = inspect(folder, OffloadConfig(device="cpu", slots_per_layer=3, prefetch=0))
    costs = calibrate.calibrate(inspected, 0.0).to_dict()
    for name, value in costs.items():
        assert isinstance(value, int | float), name
        assert math.isfinite(value), name
        assert value > 0 or name != "dense_us_per_token"

    recording = tmp_path / "run.npz"
    ours = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3, prefetch=0, trace=recording)
    stock, inputs = stock_model(folder, torch.float32), families.inputs(family)
    own = plain(stock, inputs)
    modules = [find_experts(stock)[layer.name] for layer in inspected.catalog.layers]
    dropping = all(require_adapter(module).null_ids(module) for module in modules)
    routing = random_routing(inspected.shape, dropping)
    found = []
    for model in (ours, stock):
        by_name = find_experts(model)
        replayed = ReplayedRouting(routing, inspected.shape)
        replayed.attach([by_name[layer.name] for layer in inspected.catalog.layers])
        replayed.seek(ROW)
        found.append((plain(model, inputs), greedy(model)))
        replayed.detach()
    assert ours.offload.trace is not None
    replayed_tokens = ours.offload.trace.tokens
    with ours.offload:
        torch.testing.assert_close(plain(ours, inputs), own, rtol=0, atol=ROUNDING)
    assert torch.equal(found[0][1], found[1][1])
    if family == "nllb-moe" or any(map(in_registry, modules)):  # rows without an expert, weighted 0
        torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=ROUNDING)
    else:
        assert torch.equal(found[0][0], found[1][0])
    assert (found[1][0] - own).abs().max() > 100 * ROUNDING
    assert torch.equal(plain(stock, inputs), own)
    check_recorded(read_trace(recording).experts[:replayed_tokens], routing)


def check_recorded(found: np.ndarray, routing: Trace) -> None:
    """Check that every layer that was called got consecutive rows of the routing, from the row that `seek` set.

    found: ids int [T, L, k].
    """
    called = (found != NONE).any(axis=(0, 2)).nonzero()[0]
    assert len(called)
    again = np.tile(np.roll(routing.experts, -ROW, axis=0), (len(found), 1, 1))
    for layer in called:
        asked, wanted = (rows[(rows != NONE).any(axis=1)] for rows in (found[:, layer], again[:, layer]))
        assert len(asked) > routing.tokens
        assert (asked == wanted[: len(asked)]).all()
