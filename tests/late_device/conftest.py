"""The late device for tests: as late as allowed, with no race left at the end of a test."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from offmoe.device import select
from tests.late_device import extension
from tests.late_device.extension import LateKind
from tests.late_device.kernels import LateKernels, LateRoutedLayer
from tests.late_device.threads import watch


@pytest.fixture(scope="module", autouse=True)
def _modules_are_no_garbage() -> None:
    """`settle` collects twice per test. It does not look again at what was imported since the session began."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateKind]:
    """The late device, selectable as device="late". A race that a test does not take with `races` is its failure."""
    extension.library()
    watch(monkeypatch)
    extension.threads_apart(True)
    made = LateKind()
    monkeypatch.setitem(select.KINDS, "late", made)
    extension.schedule(extension.LATEST)
    settle()
    extension.forget()
    yield made
    extension.schedule(extension.LATEST)
    settle()
    found = extension.races()
    extension.threads_apart(False)
    extension.copies_leave_streams(False)
    extension.forget()
    assert not found


@pytest.fixture
def alone(kind: LateKind, monkeypatch: pytest.MonkeyPatch) -> Iterator[LateKind]:
    """A device with kernels, which runs by itself."""
    kind.has_kernels = True
    monkeypatch.setattr("offmoe.compute.gpu_compute.DeviceKernels", LateKernels)
    monkeypatch.setattr("offmoe.compute.gpu_compute.RoutedLayer", LateRoutedLayer)
    with extension.running():
        yield kind


def settle() -> None:
    """Let everything that was queued run, and give back what nothing refers to."""
    gc.collect()
    for device in range(2):
        torch.accelerator.synchronize(device)
    torch.accelerator.empty_cache()
    extension.clear_submitted()
