"""What the host waits for: one copy of ids per MoE layer in decode, in both modes, and nothing else of offmoe.

The lint sees every operator, and names the copy, its direction and the line that asked for it.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

import offmoe
from offmoe.compute.kernels import device as device_kernels
from offmoe.device.accelerator import DeviceEvent
from offmoe.device.backend import Stream
from tests import tiny
from tests.late_device import extension
from tests.late_device.extension import LateKind
from tests.late_device.kernels import LateKernels

PACKAGE = str(Path(offmoe.__file__).parent)
VALUES = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}
"""Operators that the host needs values for."""
LAYERS = 3


class Wait(NamedTuple):
    """One operator for which the host waits: why, and the innermost function of offmoe that asked for it."""

    why: str
    where: str


class SyncLint(TorchDispatchMode):
    """Collects the operators for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Wait] = Counter()
        self.async_copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        sources = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        results = {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        why = None
        if name in VALUES and "late" in sources:
            why = f"value of {name}"
        elif name in ("copy_", "_to_copy") and {"late", "cpu"} <= sources | results:
            if kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]):
                self.async_copies += 1
            else:
                why = "copy to the host" if results == {"cpu"} else "pageable copy to the device"
        if why is not None:
            frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
            where = f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].name}" if frames else "transformers"
            self.found[Wait(why, where)] += 1
        return out


def decode(folder: Path, steps: int, **options: Any) -> tuple[Counter[Wait], extension.Counts, Any]:
    """What the host waited for in some decode steps, by the lint and by the device; and the statistics of the steps."""
    model = offmoe.from_pretrained(folder, device="late", **options)
    with model.offload, torch.no_grad():
        cache = DynamicCache(config=model.config)
        for seed in range(3):
            model(tiny.prompt(1, 60, seed=seed).to("late"))
        model(tiny.prompt(1, 8).to("late"), past_key_values=cache)
        tokens = [torch.tensor([[5 + i]]).to("late") for i in range(steps)]
        model(tokens[0], past_key_values=cache)
        torch.accelerator.synchronize()
        stats, before, lint = model.offload.stats(), extension.counts(), SyncLint()
        with lint:
            for token in tokens:
                model(token, past_key_values=cache)
        return lint.found, extension.since(before), model.offload.stats() - stats


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("sync") / "model")


MODES = [
    "bitwise",
    pytest.param("numeric", marks=pytest.mark.skipif(not device_kernels.available(), reason="no Triton")),
]


@pytest.mark.parametrize("slots", [8, 3], ids=["hits", "misses"])
@pytest.mark.parametrize("mode", MODES)
def test_decode_waits_for_ids_alone(
    folder: Path, kind: LateKind, mode: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D3: the tables of the numeric kernels came from pageable memory, and the host stood until the miss had landed."""
    kind.has_kernels = True
    monkeypatch.setattr("offmoe.compute.gpu_compute.DeviceKernels", LateKernels)
    steps = 6
    found, counts, stats = decode(
        folder, steps, slots_per_layer=slots, exactness=mode, on_miss="fetch", prefetch=0, host_memory="64MiB"
    )
    assert (stats.misses > 0) == (slots < 8)
    offmoes = {wait: n for wait, n in found.items() if wait.where != "transformers"}
    assert offmoes == {Wait("copy to the host", "device/backend.py:to_host"): steps * LAYERS}
    assert counts.blocking_d2h == steps * LAYERS
    assert counts.blocking_h2d == counts.scalars == 0


@pytest.mark.parametrize("prefetch", [0, "auto"])
def test_predictions_cost_no_wait(folder: Path, kind: LateKind, prefetch: int | str) -> None:
    found, _, _ = decode(folder, 4, slots_per_layer=3, prefetch=prefetch, host_memory="64MiB")
    assert sum(n for wait, n in found.items() if wait.where != "transformers") == 4 * LAYERS


def test_one_event_per_layer(folder: Path, kind: LateKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """D11: it was one event per expert."""
    record, recorded = DeviceEvent.record, []

    def counted(event: DeviceEvent, stream: Stream) -> None:
        recorded.append(event)
        record(event, stream)

    monkeypatch.setattr(DeviceEvent, "record", counted)
    numbers = []
    for steps in (2, 6):
        recorded.clear()
        _, _, stats = decode(folder, steps, slots_per_layer=8, prefetch=0)
        assert stats.misses == 0
        numbers.append(len(recorded))
    assert numbers[1] - numbers[0] == 4 * LAYERS
