"""Runs whose victims are named one step ahead: equal to stock, and every recording replays to the run's statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offmoe
from offmoe.config import EVICTIONS
from offmoe.simulate.replay import replay
from offmoe.trace.trace import read_trace
from tests import tiny
from tests.test_families import stock_model

GREEDY: dict[str, Any] = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
PROMPTS = (tiny.prompt(1, 12), tiny.prompt(3, 5))
POPULARITY = tuple(tuple(float(e * 7 % 5) for e in range(8)) for _ in range(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("lag") / "model")


@pytest.fixture(scope="module")
def texts(folder: Path) -> list[torch.Tensor]:
    model = stock_model(folder, torch.float32)
    return [model.generate(prompt, **GREEDY) for prompt in PROMPTS]


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_recording_replays_to_the_run(folder: Path, texts: list[torch.Tensor], tmp_path: Path, eviction: str) -> None:
    """Prompts, single tokens, and batches of three."""
    popularity = POPULARITY if eviction == "static" else None
    model = offmoe.from_pretrained(
        folder, device="cpu", lag=1, eviction=eviction, popularity=popularity, slots_per_layer=(4, 5, 6),
        trace=tmp_path / "run.npz",
    )  # fmt: skip
    with model.offload:
        for prompt, text in zip(PROMPTS, texts, strict=True):
            assert torch.equal(model.generate(prompt, **GREEDY), text)
        stats = model.offload.stats()
    recorded = read_trace(tmp_path / "run.npz")
    assert recorded.options is not None
    assert recorded.options.lag == 1
    assert stats.evictions > 0
    assert replay(recorded, recorded.options).stats == stats
