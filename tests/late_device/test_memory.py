"""D1b: what a model takes on the device is never more than its plan, also while its KV cache grows."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import offmoe
from offmoe.budget.inspect import inspect
from offmoe.hf.load.options import sort_options
from tests import tiny
from tests.late_device.extension import LateKind

CONTEXT = 1536
EAGER = sort_options({"attn_implementation": "eager"})
"""torch's fused attention makes no scores, but the late device has none of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and values are the most of it."""
    model = tiny.build("mixtral", num_attention_heads=4, num_key_value_heads=4, head_dim=64, sliding_window=None)
    return tiny.save(model, tmp_path_factory.mktemp("memory") / "model")


@pytest.mark.parametrize("batch", [1, 3])
def test_the_peak_is_within_the_plan(folder: Path, kind: LateKind, batch: int) -> None:
    asked: dict[str, Any] = {"device": "late", "slots_per_layer": 2, "max_context": CONTEXT}
    smallest = inspect(folder, offmoe.OffloadConfig(**asked), asked=EAGER).plan.used
    asked |= {"attn_implementation": "eager", "device_memory": smallest, "prefetch": 0}
    model = offmoe.from_pretrained(folder, **asked)
    with model.offload as offload, torch.no_grad():
        plan, growth = offload.memory(), CONTEXT * 4 * 64 * 4
        assert plan.used == plan.budget == smallest
        assert plan.kv == CONTEXT * (3 * 2 + 1) * 4 * 64 * 4
        assert plan.workspace < growth, "else it would hide what is there twice"
        prompt = tiny.prompt(batch, CONTEXT // batch - 4).to("late")
        gc.collect()
        loaded = torch.accelerator.memory_allocated(0)
        torch.accelerator.reset_peak_memory_stats(0)
        model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert plan.kv - growth < torch.accelerator.max_memory_allocated(0) - loaded <= plan.kv + plan.workspace
