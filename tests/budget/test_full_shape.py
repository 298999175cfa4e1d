"""Mixtral 8x7B at full shape, planned from headers alone: it runs in as little memory as is said, on either device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import offmoe.budget.inspect
from offmoe.budget.inspect import inspect
from offmoe.compute.kernels.library import status
from offmoe.config import OffloadConfig
from offmoe.device.backend import Backend, CpuBackend
from offmoe.errors import CapacityError
from offmoe.pack.pack import weight_format
from offmoe.profile import Profile
from tests.doubles import DeferredBackend
from tools.bench.synthetic import mixtral_config, write_packed, write_sparse

TIB = 1 << 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint in bf16 and with int4 experts. Neither takes room on the disk."""
    root = tmp_path_factory.mktemp("mixtral")
    config = mixtral_config(4096, 14336, layers=32, experts=8, top_k=2, vocabulary=32000)
    write_sparse(root / "bf16", config)
    write_packed(root / "int4", config, weight_format("int4"), root, sparse=True)
    return {"bf16": root / "bf16", "int4": root / "int4"}


class RoomyCpu(CpuBackend):
    def free_bytes(self) -> int:
        return TIB


class RoomyDevice(DeferredBackend):
    """A device with memory of its own."""

    ram = TIB

    def free_bytes(self) -> int:
        return TIB


@pytest.fixture(params=[RoomyCpu, RoomyDevice])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    made: Backend = request.param()
    monkeypatch.setattr(offmoe.budget.inspect, "select_backend", lambda name: made)
    return made


@pytest.mark.parametrize(
    ("form", "budget", "exactness", "dense_is_there"),
    [
        ("bf16", "4.5GiB", "bitwise", True),
        ("int4", "4GiB", "numeric", True),
        ("int4", "4GiB", "bitwise", False),  # an expert decoded as in transformers takes 1 GiB
        ("int4", "5GiB", "bitwise", True),
    ],
)
def test_dense_weights_and_a_few_experts_are_enough(
    folders: dict[str, Path], backend: Backend, form: str, budget: str, exactness: str, dense_is_there: bool
) -> None:
    plan = inspect(folders[form], OffloadConfig(device_memory=budget, exactness=exactness)).plan
    assert plan.scope == "model"
    has_kernels = exactness == "numeric" and backend.unified_memory and status().library is not None
    assert (plan.offloaded_layers == 0) == (dense_is_there and (exactness == "bitwise" or has_kernels))
    assert 2 <= sum(plan.slots_per_layer) < 32
    assert plan.max_context >= 256
    assert plan.used <= plan.budget
    assert "top_k=2 slots in each of 32 layers do not fit" in plan.reason


@pytest.mark.parametrize("form", ["bf16", "int4"])
def test_more_memory_never_moves_dense_weights_out(folders: dict[str, Path], backend: Backend, form: str) -> None:
    scopes = []
    for gib in (5, 8, 12, 24, 100):
        inspected = inspect(folders[form], OffloadConfig(device_memory=f"{gib}GiB"))
        plan = inspected.plan
        assert plan.offloaded_layers == 0
        assert plan.used <= plan.budget
        assert inspected.config.scope == plan.scope
        scopes.append(plan.scope)
    assert scopes == sorted(scopes, reverse=True), "a pool while memory is scarce, then slots of each layer's own"
    assert set(scopes) == {"model", "layer"}


def test_slots_of_a_profile_that_do_not_fit_are_as_many_as_fit(
    folders: dict[str, Path], backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    profile = Profile({"slots_per_layer": 4, "scope": "layer", "eviction": "lru", "prefetch": 0})
    tuned = OffloadConfig(device_memory="48GiB", profile=profile)
    assert inspect(folders["bf16"], tuned).plan.slots_per_layer == (4,) * 32
    inspected = inspect(folders["bf16"], OffloadConfig(device_memory="8GiB", profile=profile))
    assert "the profile's slots_per_layer=4 do not fit" in caplog.text
    assert (inspected.plan.scope, inspected.plan.offloaded_layers) == ("model", 0)
    assert (inspected.config.eviction, inspected.config.prefetch) == ("lru", 0)
    with pytest.raises(CapacityError, match="slots_per_layer=4, which needs"):
        inspect(folders["bf16"], OffloadConfig(device_memory="8GiB", slots_per_layer=4))


def test_what_would_work_is_named(folders: dict[str, Path], backend: Backend) -> None:
    with pytest.raises(CapacityError, match=r"smallest device_memory .* 2 expert slots in all: --device-memory") as no:
        inspect(folders["bf16"], OffloadConfig(device_memory="512MiB"))
    named = re.findall(r"--device-memory ([\d.]+GiB)", str(no.value))[0]
    plan = inspect(folders["bf16"], OffloadConfig(device_memory=named)).plan
    assert sum(plan.slots_per_layer) == 2
    assert plan.offloaded_layers == 32
