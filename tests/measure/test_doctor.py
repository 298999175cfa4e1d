"""Checks of the machine: each finding with a way to be otherwise, and none that stops the others."""

from __future__ import annotations

import builtins
import os
import re
import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offmoe.compute.kernels import library
from offmoe.device import cuda
from offmoe.measure import doctor

ROOT = Path(__file__).resolve().parents[2]


def test_versions_are_those_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    lines = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert lines
    wanted = dict(re.findall(r'"(\w+)([<>=][^"]*)"', lines[1]))
    assert wanted.keys() == doctor.LIBRARIES.keys()
    for name, (working, _) in doctor.LIBRARIES.items():
        assert working.replace(" ", "") == wanted[name]


@pytest.mark.parametrize(
    ("name", "version", "verdict", "says"),
    [
        ("torch", None, "fail", "Install torch >= 2.10."),
        ("torch", "2.9.1+cu130", "fail", "2.9.1+cu130 is outside"),
        ("torch", "2.14.0", "warn", "newer than 2.13"),
        ("transformers", "5.24.0", "fail", "< 5.24"),
        ("safetensors", "0.5.0rc1", "ok", ""),
    ],
)
def test_libraries(monkeypatch, name, version, verdict, says) -> None:
    newest = {lib: tested or working.strip(">= ") for lib, (working, tested) in doctor.LIBRARIES.items()}
    installed = newest | {name: version}

    def find(library: str) -> str:
        if installed[library] is None:
            raise metadata.PackageNotFoundError(library)
        return installed[library]

    monkeypatch.setattr(metadata, "version", find)
    check = doctor.libraries()
    assert check.verdict == verdict
    assert says in check.advice
    assert check.values[name] == version


def test_little_memory(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "cgroup_free_bytes", lambda: 10**9)
    monkeypatch.setattr(doctor, "memory_limit", lambda: (3 * 10**9, 2))
    check = doctor.memory()
    assert check.verdict == "warn"
    assert check.advice.startswith("Raise the container's memory limit")
    assert "a cgroup (v2) allows" in check.finding
    assert "slots in RAM fill as experts are used" in check.finding
    assert (check.values["available"], check.values["cgroup_limit"], check.values["cgroup_version"]) == (
        10**9,
        3 * 10**9,
        2,
    )


@pytest.fixture
def small_probe(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_BYTES", 4 << 20)
    monkeypatch.setattr(doctor, "REQUEST_BYTES", 1 << 20)


@pytest.mark.usefixtures("small_probe")
def test_the_disk_is_read_and_left_as_it_was(tmp_path: Path) -> None:
    check = doctor.disk(tmp_path)
    read = check.values["read_gb_s"]
    assert isinstance(read, float)
    assert read > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_probe")
@pytest.mark.parametrize("absent", ["O_DIRECT", "preadv", "posix_fadvise"])
def test_the_disk_where_the_system_has_less(tmp_path: Path, monkeypatch, absent: str) -> None:
    monkeypatch.delattr(os, absent, raising=False)
    check = doctor.disk(tmp_path)
    read = check.values["read_gb_s"]
    assert isinstance(read, float)
    assert read > 0
    if absent != "posix_fadvise":
        assert (check.verdict, check.values["direct"]) == ("warn", False)


def test_a_full_disk_is_not_written(tmp_path: Path, monkeypatch) -> None:
    usage = SimpleNamespace(total=10, used=9, free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    check = doctor.disk(tmp_path)
    assert (check.verdict, check.values["free"]) == ("warn", 1)
    assert "it is full" in check.advice


def test_an_unused_gpu(monkeypatch) -> None:
    monkeypatch.setattr(cuda, "cuda_devices", lambda: [])
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert doctor.device().verdict == "warn"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert doctor.device().verdict == "ok"


def test_a_gpu_is_described(monkeypatch) -> None:
    found = cuda.CudaDevice("Some GPU", "9.0", 80 << 30, 70 << 30)
    monkeypatch.setattr(cuda, "cuda_devices", lambda: [found])
    check = doctor.device()
    assert "cuda:0 Some GPU, 70.0 GiB of 80.0 GiB free" in check.finding
    devices: Any = check.values["cuda"]
    assert devices[0]["total"] == 80 << 30


def test_kernels_that_are_not_built(monkeypatch) -> None:
    missing = library.KernelStatus(None, "the CPU kernels were not built: install a compiler")
    monkeypatch.setattr(library, "status", lambda: missing)
    check = doctor.kernels()
    assert (check.verdict, check.finding) == ("warn", "the CPU kernels were not built")
    assert check.advice == "install a compiler"


def test_what_cannot_be_checked_stops_nothing(tmp_path: Path, monkeypatch) -> None:
    real = builtins.__import__

    def broken(name: str, *rest: Any) -> object:
        if name == "offmoe.device.cuda":
            raise ImportError("torch does not start")
        return real(name, *rest)

    monkeypatch.setattr(doctor, "disk", lambda folder: doctor._check("disk", "ok", "", ""))
    monkeypatch.setattr(builtins, "__import__", broken)
    checks = list(doctor.examine(tmp_path))
    assert [c.name for c in checks if "torch does not start" in c.finding] == ["device", "pinning", "link"]
    assert {"system", "libraries", "memory"} <= {c.name for c in checks}
