"""From two slots in all to all experts: the same tokens as stock, replay follows, and no budget is exceeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import offmoe
import offmoe.budget.inspect
from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.device.backend import Backend, CpuBackend
from offmoe.simulate.replay import replay
from offmoe.trace.trace import read_trace
from tests import tiny
from tests.doubles import DeferredBackend

LAYERS, CONTEXT = 6, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.build("mixtral", num_hidden_layers=LAYERS, intermediate_size=256)
    return tiny.save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    return generate(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())


@pytest.fixture(params=[CpuBackend, DeferredBackend])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    made: Backend = request.param()
    monkeypatch.setattr(offmoe.budget.inspect, "select_backend", lambda name: made)
    return made


def generate(model: tiny.Model) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(input_ids=tiny.prompt(), max_new_tokens=10, min_new_tokens=10)
    return tokens


@pytest.mark.parametrize("extra", [0, 1, 2, 5, 8, 9, 10, 20, 46])
def test_tokens_are_stocks_with_any_number_of_slots(
    tmp_path: Path, folder: Path, expected: torch.Tensor, backend: Backend, extra: int
) -> None:
    """extra: slots that fit beyond the two that must."""
    options: dict[str, Any] = {"max_context": CONTEXT, "prefetch": 1}
    found = inspect(folder, OffloadConfig(**options))
    slot = found.needs.bytes.slot_bytes[0]
    path = tmp_path / "run.npz"
    budget = found.plan.smallest_dense + extra * slot
    model = offmoe.from_pretrained(folder, device_memory=budget, trace=path, **options)
    with model.offload:
        if isinstance(backend, DeferredBackend):
            backend.guard(model.offload._executor._transfer.writer)
        assert torch.equal(generate(model), expected)
        stats, plan, config = model.offload.stats(), model.offload.memory(), model.offload.config
    scratch = plan.scratch // slot
    assert (plan.offloaded_layers, sum(plan.slots_per_layer) + scratch) == (0, 2 + extra)
    assert scratch == (2 if 4 <= 2 + extra <= 10 else 0), "up to a sixth of 48 experts"
    assert config.on_miss == ("auto" if scratch else "fetch")
    assert config.scope == plan.scope == ("model" if 2 + extra < 2 * LAYERS else "layer")
    assert bool(stats.host_computed) == bool(scratch)
    assert plan.used <= budget
    trace = read_trace(path)
    assert trace.options == config.cache()
    assert replay(trace, config.cache()).stats == stats


def test_a_pool_grows_and_shrinks(folder: Path, expected: torch.Tensor, backend: Backend) -> None:
    """With and without scratch slots, which pay in a small pool only."""
    found = inspect(folder, OffloadConfig(max_context=CONTEXT))
    slot, least = found.needs.bytes.slot_bytes[0], found.plan.smallest_dense
    model = offmoe.from_pretrained(folder, device_memory=least + 3 * slot, max_context=CONTEXT)
    with model.offload as offload:
        for extra in (3, 30, 46, 4, 0):
            offload.resize(device_memory=least + extra * slot)
            plan = offload.memory()
            assert sum(plan.slots_per_layer) + plan.scratch // slot == 2 + extra
            assert torch.equal(generate(model), expected)
