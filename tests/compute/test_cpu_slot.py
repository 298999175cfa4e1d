"""Slots for the C kernels: what stands in one after an expert was placed, and what placing it allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offmoe.budget.inspect import inspect
from offmoe.config import OffloadConfig
from offmoe.device.backend import copy_in_ram
from offmoe.hf.catalog.catalog import CatalogLayer
from tests import gguf_models, native
from tests.gguf_models import Q, all_of, q4_k_m
from tests.packed import values

pytestmark = native.installed


class Allocations(TorchDispatchMode):
    """Sums up the memory of results that are no views of arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in _tensors(args)}
        result = func(*args, **(kwargs or {}))
        fresh = [t for t in _tensors((result,)) if t.untyped_storage().data_ptr() not in before]
        self.nbytes += sum(t.untyped_storage().nbytes() for t in fresh)
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [t for value in values for t in _tensors(value)] if isinstance(values, (tuple, list)) else []


KINDS = {"Q8_0": all_of(Q.Q8_0), "Q4_K_M": q4_k_m, "MXFP4": all_of(Q.MXFP4), "BF16": all_of(Q.BF16)}


def layers(file: Path, exactness: str) -> tuple[CatalogLayer, ...]:
    return inspect(file, OffloadConfig(device="cpu", exactness=exactness)).catalog.layers


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_expert_is_placed_without_memory_in_between(tmp_path: Path, kind: str, fused: bool) -> None:
    written = gguf_models.save(tmp_path, "mixtral", KINDS[kind], wide=kind == "Q4_K_M", fused=fused)
    for layer, raw in zip(layers(written.file, "numeric"), layers(written.file, "bitwise"), strict=True):
        slot, segments = layer.cpu_slot, layer.records[1].segments
        assert slot is not None
        data = [torch.from_numpy(np.fromfile(written.file, np.uint8, s.nbytes, offset=s.offset)) for s in segments]
        views = slot.layout.views(torch.full((slot.layout.nbytes,), 255, dtype=torch.uint8))
        with Allocations() as allocations:
            slot.assembly.place(segments, data, views, copy_in_ram)
        assert allocations.nbytes == 0
        expert = slot.expert(views)
        gate, up, down = (
            weight if isinstance(weight, torch.Tensor) else values(weight)
            for weight in (expert.gate, expert.up, expert.down)
        )
        wanted = raw.layout.views(torch.empty(raw.layout.nbytes, dtype=torch.uint8))
        raw.assembly.place(segments, data, wanted, copy_in_ram)
        if raw.decode is not None:
            wanted = raw.decode(wanted, torch.float32)
        assert torch.equal(torch.cat([gate, up]), wanted["gate_up_proj"])
        assert torch.equal(down, wanted["down_proj"])
